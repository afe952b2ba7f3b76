"""A dialogue as the decoder reads it: what prompt_encoder.py makes and generation.py runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from .arrays import Float
from .image import Runs
from .rotary import Positions

Key: TypeAlias = "int | tuple[bytes, int]"  # identifies a position: a token id, or a picture's digest and a row of it


class Seen(NamedTuple):
    """A picture or a video of a prompt, or a group of the video's frames."""

    key: bytes  # its digest, and how it is encoded
    runs: Runs
    grid: tuple[int, int] | None  # (rows, columns) in which its rows stand, if they do
    times: tuple[int, ...]  # of the groups of a video's frames, whose rows stand in such a grid each
    first: int  # its first row in the picture or video: of a further group above 0
    tiles: int  # encoded for this prompt
    sha256: str
    video: bool

    @property
    def rows(self) -> int:
        """How many positions it takes: its rows, and the separators around and between its tiles."""
        return sum(map(len, self.runs))


@dataclass(frozen=True)
class ShownPicture:
    """What a picture or a video took of a prompt."""

    tokens: int  # as Seen.rows, of all groups of a video's frames
    tiles: int  # encoded for this prompt: 0 if the conversation knew its rows
    sha256: str  # of its pixels, or of the video's frames as they are encoded; see image.digest
    video: bool


Probed: TypeAlias = "list[list[int]]"  # by judged turn: positions whose mean the prober reads, ascending; []: too short


def is_probed(turns: Probed) -> bool:
    """Whether the prober can read every judged turn."""
    return bool(turns) and all(turns)


@dataclass(frozen=True)
class EncodedPrompt:
    """A dialogue as the decoder's input: S positions."""

    inputs_embeds: Float  # (1, S, D)
    token_ids: list[int]  # of the text only; the repetition penalty reads them
    keys: list[Key]  # S of them. Two prompts that share a prefix of keys share those positions' keys and values
    positions: Positions  # (3, S), for rotary
    probed: Probed
    seen: tuple[Seen, ...] = ()  # pictures, videos, and the groups of videos' frames, in the prompt's order
    deepstack: Mapping[int, Float] = field(default_factory=dict)  # (n, L * D) of each picture, by first position

    @property
    def shown(self) -> tuple[ShownPicture, ...]:
        """What each picture and each video took of the prompt, in its order."""
        found: list[ShownPicture] = []
        for one in self.seen:
            if one.first:
                found[-1] = replace(found[-1], tokens=found[-1].tokens + one.rows)
            else:
                found.append(ShownPicture(one.rows, one.tiles, one.sha256, one.video))
        return tuple(found)

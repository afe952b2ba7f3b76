"""From a dialogue to token ids and image slots, and from token ids back to text.

The export took the chat template apart into pieces (PromptSpec). Special tokens enter a prompt only as pieces of the
template. In user text they are plain text, so nobody can forge a turn or an image by typing `<|im_end|>` or `<image>`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .errors import InputError, PackageError
from .image import ImageLike
from .manifest import PromptSpec, TemplatePiece, TurnSpec
from .video import VideoLike, open_video


@dataclass(frozen=True)
class Message:
    """One turn: its role and its parts in order, each a text, an image or a video."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @staticmethod
    def user(text: str, images: Sequence[ImageLike] = (), videos: Sequence[VideoLike] = ()) -> Message:
        """A user turn: images, videos, then a text.

        A video is a file or folder, from which open_video takes frames, or a list of frames, all of which are used.
        """
        films = (open_video(video) if isinstance(video, (str, Path)) else video for video in videos)
        return Message("user", (*map(ImagePart, images), *(VideoPart(tuple(frames)) for frames in films), text))

    @staticmethod
    def assistant(text: str) -> Message:
        """An earlier answer."""
        return Message("assistant", (text,))

    @property
    def images(self) -> list[ImageLike]:
        """The turn's images, in order."""
        return [part.image for part in self.parts if isinstance(part, ImagePart)]

    @property
    def videos(self) -> list[tuple[ImageLike, ...]]:
        """The frames of the turn's videos, in order."""
        return [part.frames for part in self.parts if isinstance(part, VideoPart)]


@dataclass(frozen=True)
class ImagePart:
    """An image among a turn's parts."""

    image: ImageLike


@dataclass(frozen=True)
class VideoPart:
    """A video among a turn's parts."""

    frames: tuple[ImageLike, ...]


Part: TypeAlias = "str | ImagePart | VideoPart"

IMAGE, VIDEO = object(), object()  # mark the place of an image or a video in a rendered prompt
SLOTS = {"image": IMAGE, "video": VIDEO}  # by TemplatePiece.kind
Rendered = list["list[int] | object"]  # runs of token ids, and IMAGE and VIDEO


def load_tokenizer(path: Path) -> Tokenizer:
    """Load tokenizer.json, with special tokens in text treated as plain text. Raises PackageError if it is damaged."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises plain Exception
        raise PackageError(f"{path}: not a tokenizer ({err})") from err
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def render(messages: Sequence[Message], spec: PromptSpec, tokenizer: Tokenizer, *, generation: bool = True) -> Rendered:
    """Token ids of a dialogue, with IMAGE and VIDEO in the places of images and videos.

    `generation`: add the tokens that open the answer.
    Raises InputError for an empty dialogue, an unknown role, an image or a video in a turn that takes none, or text
    that is not valid Unicode.
    """
    if not messages:
        raise InputError("the dialogue is empty")
    return _tokenise(_pieces(messages, spec, generation), lambda text: _encode(text, tokenizer))


@dataclass(frozen=True)
class AskedTurn:
    """A turn that the prober scores: every user turn, and the last turn."""

    index: int  # among the messages
    before: int  # text tokens before its content: earlier turns and its prefix
    through: int  # text tokens before its answer


def asked_turns(messages: Sequence[Message], spec: PromptSpec, tokenizer: Tokenizer) -> list[AskedTurn]:
    """The turns of a dialogue that the prober scores, each counted as if the dialogue ended there."""
    encode = functools.cache(lambda text: _encode(text, tokenizer))  # each turn repeats the text before it

    def tokens(pieces: Sequence[tuple[TemplatePiece, str]]) -> int:
        return sum(len(run) for run in _tokenise(pieces, encode) if isinstance(run, list))

    found = []
    for n, message in enumerate(messages):
        if message.role != "user" and n + 1 < len(messages):
            continue
        turn = {"system": spec.system, "user": spec.user, "assistant": spec.assistant}[message.role]
        assert turn is not None  # `render` has refused it
        opened = list(_pieces([*messages[:n], Message(message.role, ())], spec, generation=False))
        asked = list(_pieces(messages[: n + 1], spec, generation=True))
        found.append(AskedTurn(n, tokens(opened[: len(opened) - len(turn.suffix)]), tokens(asked)))
    return found


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError) as err:  # a lone surrogate, as from a badly decoded argument
        raise InputError("the prompt is not valid Unicode text") from err
    return ids


def _tokenise(pieces: Iterable[tuple[TemplatePiece, str]], encode: Callable[[str], Sequence[int]]) -> Rendered:
    out: Rendered = []
    for run in _merge(pieces):
        ids: list[int] | object = [run] if isinstance(run, int) else run
        if isinstance(run, str):
            ids = list(encode(run))
        if isinstance(ids, list) and out and isinstance(out[-1], list):
            out[-1].extend(ids)
        else:
            out.append(ids)
    return out


def _pieces(messages: Sequence[Message], spec: PromptSpec, generation: bool) -> Iterator[tuple[TemplatePiece, str]]:
    """(piece, text) of the rendered dialogue; the text fills pieces of kind `text`."""
    turns: dict[str, TurnSpec | None] = {"system": spec.system, "user": spec.user, "assistant": spec.assistant}
    if messages[0].role != "system":
        yield from ((piece, "") for piece in spec.begin)
    for message in messages:
        turn = turns.get(message.role)
        if turn is None:
            raise InputError(f"this model's prompts have no {message.role!r} turn")
        parts = list(message.parts)
        if spec.images_first:
            parts.sort(key=lambda part: (isinstance(part, str), isinstance(part, VideoPart)))  # stable
        yield from ((piece, "") for piece in turn.prefix)
        if parts and isinstance(parts[0], str):
            yield from ((piece, "") for piece in turn.lead)
        for part in parts:
            if isinstance(part, str):
                text = part.strip() if spec.strip_text else part
                yield from ((piece, text) for piece in turn.text)
                continue
            if not isinstance(part, (ImagePart, VideoPart)):
                raise InputError(
                    f"a part of the {message.role!r} turn is no text, image or video: {type(part).__name__}"
                )
            kind, slot = ("image", turn.image) if isinstance(part, ImagePart) else ("video", turn.video)
            if not slot:  # never drop a picture silently, nor move it to another turn
                raise InputError(f"this model's {message.role!r} turns take no {kind}s")
            yield from ((piece, "") for piece in slot)
        yield from ((piece, "") for piece in turn.suffix)
    if generation:
        yield from ((piece, "") for piece in spec.generation)


def _merge(pieces: Iterable[tuple[TemplatePiece, str]]) -> Iterator[str | int | object]:
    """Join adjacent literal and user text: they are tokenised together, as in the template's own rendering."""
    text = ""
    for piece, filling in pieces:
        if piece.kind in ("literal", "text"):
            text += piece.text if piece.kind == "literal" else filling
            continue
        if text:
            yield text
            text = ""
        yield piece.id if piece.kind == "token" else SLOTS[piece.kind]
    if text:
        yield text


class Detokeniser:
    """Turns token ids into text as they come. Emits whole characters only, and no part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` completes; sets `stopped` once a stop string is complete."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [i for i in (self._held.find(stop) for stop in self._stop) if i >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        """The text held back, if the answer ends without a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

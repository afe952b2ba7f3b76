"""Rows to tensors: one picture prefix shared by several dialogues.

    <|im_start|>user <image>...<image> | \\nQ1<|im_end|>...A1<|im_end|> | \\nQ2<|im_end|>...A2<|im_end|> | ...
    `---------- prefix --------------'   `------- branch 1 -------'   `------- branch 2 -------'

A branch sees the prefix and itself (4-D mask) and its positions go on from the prefix, so training equals
one row per dialogue while the picture is paid for once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .corpus import Branch, Row
from .scenes import Scene, render
from .tiling import frame, image_token_count, tiles, video_token_count

FRAMES = 4  # of every video: those of a batch are one tensor


@dataclass(frozen=True)
class Batch:
    """Model inputs and what to learn.

    input_ids, position_ids: (B, T)
    attention_mask: (B, 1, T, T) bool
    learn: (B, T) bool, True where the next token is part of an answer
    pixel_values: (images, tiles, 3, 56, 56) float32; None without pictures
    pixel_values_videos: (videos, frames, 3, 56, 56) float32; None without videos
    image_sizes: (images, 2), (height, width)
    batch_num_images: pictures per row, rows without any left out
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    learn: torch.Tensor
    pixel_values: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    image_sizes: torch.Tensor | None
    batch_num_images: torch.Tensor | None


def frames_of(scenes: Sequence[Scene]) -> list[Scene]:
    """FRAMES of a video that shows the scenes one after the other, each for about as long."""
    return [scenes[at * len(scenes) // FRAMES] for at in range(FRAMES)]


@dataclass
class _Tokens:
    """Parallel lists, one entry per token. floor: first position (beside 0) that the token may look at."""

    ids: list[int]
    position: list[int]
    branch: list[int]
    floor: list[int]
    learn: list[bool]


class Packer:
    """Packs rows with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.encode = functools.cache(lambda text: tuple(tokenizer(text).input_ids))
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.frame = tokenizer.convert_tokens_to_ids("<video>")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def _branch(self, branch: Branch) -> tuple[list[int], list[bool], int]:
        """(ids, learn, where the last question ends) of one dialogue, from its first newline on."""
        ids: list[int] = []
        learn: list[bool] = []
        last = len(branch.turns) - 1
        for n, turn in enumerate(branch.turns):
            spaced = n < last and branch.template_history
            question = (self.encode("<|im_start|>user ") if n else ()) + self.encode("\n" + turn.question) + (self.end,)
            question += self.encode("<|im_start|>assistant " if spaced else "<|im_start|>assistant") + self.encode("\n")
            answer = (*self.encode("\n" + turn.answer)[1:], self.end)
            ids += question + answer
            learn += [False] * (len(question) - 1) + [turn.learn] * len(answer) + [False]
            end_of_question = len(ids) - len(answer) - (4 if spaced else 3) - 1
        return ids, learn, end_of_question

    def _shown(self, scenes: Sequence[Scene], *, alone: bool) -> list[int]:
        return [self.image] * sum(image_token_count(s.height, s.width, alone=alone) for s in scenes)

    def row(self, row: Row) -> _Tokens:
        """One row."""
        alone = len(row.pictures) == 1
        ids = [*self.encode("<|im_start|>system "), *self.encode("\n" + row.system), self.end] if row.system else []
        for shown in row.before:
            ids += [*self.encode("<|im_start|>user "), *self._shown(shown.scenes, alone=alone)]
            ids += [*self.encode("\n" + shown.turn.question), self.end]
            ids += [*self.encode("<|im_start|>assistant "), *self.encode("\n" + shown.turn.answer), self.end]
        ids += self.encode("<|im_start|>user ")
        ids += [self.frame] * video_token_count(FRAMES) if row.video else self._shown(row.scenes, alone=alone)
        prefix = len(ids)
        out = _Tokens(ids, list(range(prefix)), [0] * prefix, [0] * prefix, [False] * prefix)
        for number, branch in enumerate(row.branches, 1):
            ids, learn, end_of_question = self._branch(branch)
            start = len(out.ids)
            out.floor += [
                start + end_of_question if branch.summary and i > end_of_question else 0 for i in range(len(ids))
            ]
            out.ids += ids
            out.learn += learn
            out.position += range(prefix, prefix + len(ids))
            out.branch += [number] * len(ids)
        return out

    def length(self, row: Row) -> int:
        """Tokens of the row."""
        return len(self.row(row).ids)

    def batch(self, rows: Sequence[Row]) -> Batch:
        packed, pixels, sizes, counts = [self.row(row) for row in rows], [], [], []
        for row in rows:
            pixels += [tiles(render(s), alone=len(row.pictures) == 1) for s in row.pictures]
            sizes += [(s.height, s.width) for s in row.pictures]
            counts += [len(row.pictures)] if row.pictures else []
        videos = [np.stack([frame(render(s)) for s in frames_of(row.scenes)]) for row in rows if row.video]
        longest = max(len(p.ids) for p in packed)

        def padded(name: str, fill: int) -> torch.Tensor:
            lists = [getattr(p, name) for p in packed]
            return torch.tensor([values + [fill] * (longest - len(values)) for values in lists])

        branch, floor = padded("branch", -1), padded("floor", 0)
        key = torch.arange(longest)
        mask = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        mask &= (key >= floor[:, :, None]) | (key == 0)
        mask &= key[:, None] >= key
        mask |= torch.eye(longest, dtype=torch.bool)  # a padding row of nothing but False would give NaN
        most = max((len(p) for p in pixels), default=0)
        stacked = [np.pad(p, ((0, most - len(p)), (0, 0), (0, 0), (0, 0))) for p in pixels]
        return Batch(
            padded("ids", 0),
            padded("position", 0),
            mask[:, None],
            padded("learn", False),
            torch.from_numpy(np.stack(stacked)) if pixels else None,
            torch.from_numpy(np.stack(videos)) if videos else None,
            torch.tensor(sizes) if pixels else None,
            torch.tensor(counts) if pixels else None,
        )

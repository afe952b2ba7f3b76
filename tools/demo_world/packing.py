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
from .scenes import render
from .tiling import image_token_count, tiles


@dataclass(frozen=True)
class Batch:
    """Model inputs and what to learn.

    input_ids, position_ids: (B, T)
    attention_mask: (B, 1, T, T) bool
    learn: (B, T) bool, True where the next token is part of an answer
    pixel_values: (images, tiles, 3, 56, 56) float32; None without pictures
    image_sizes: (images, 2), (height, width)
    batch_num_images: pictures per row, rows without any left out
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    learn: torch.Tensor
    pixel_values: torch.Tensor | None
    image_sizes: torch.Tensor | None
    batch_num_images: torch.Tensor | None


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

    def row(self, row: Row, sizes: Sequence[tuple[int, int]]) -> _Tokens:
        """One row; sizes: (height, width) of its pictures."""
        ids = [*self.encode("<|im_start|>system "), *self.encode("\n" + row.system), self.end] if row.system else []
        for turn in row.before:
            ids += [*self.encode("<|im_start|>user "), *self.encode("\n" + turn.question), self.end]
            ids += [*self.encode("<|im_start|>assistant "), *self.encode("\n" + turn.answer), self.end]
        ids += self.encode("<|im_start|>user ")
        for height, width in sizes:
            ids += [self.image] * image_token_count(height, width, alone=len(sizes) == 1)
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
        return len(self.row(row, [(s.height, s.width) for s in row.scenes]).ids)

    def batch(self, rows: Sequence[Row]) -> Batch:
        packed, pixels, sizes, counts = [], [], [], []
        for row in rows:
            own = [(s.height, s.width) for s in row.scenes]
            pixels += [tiles(render(s), alone=len(own) == 1) for s in row.scenes]
            sizes += own
            counts += [len(own)] if own else []
            packed.append(self.row(row, own))
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
            torch.tensor(sizes) if pixels else None,
            torch.tensor(counts) if pixels else None,
        )

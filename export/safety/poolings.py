"""What the prober reads of a turn, and how it is trained on that.

    last        the state at the prompt's last token, as in the paper
    mean        the mean over the turn's text positions
    max         the state at the position that the prober finds most unsafe: later words cannot hide what was asked
    attention   a mean whose weights come from one learned query vector

Each of them reads one state of hidden_size, so that the prober itself has the paper's shape. Which of them a gate uses
is decided on rewordings of kinds that it was not trained on (other_words.py): on plain prompts all of them look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch.nn import functional

from .prober import (
    BATCH,
    DROPOUT,
    HIDDEN,
    LEARNING_RATE,
    MAX_EPOCHS,
    MEMBERS,
    PATIENCE,
    READ_ROWS,
    UNSAFE,
    WEIGHT_DECAY,
    Split,
    fold_standardisation,
    prober_logits,
)

if TYPE_CHECKING:
    from .prober import Prober
    from .rows import TurnRows

Pooling = Literal["last", "mean", "max", "attention"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class PooledProber:
    """A prober, and what it reads of a turn."""

    pooling: Pooling
    prober: Prober
    query: torch.Tensor | None = None  # (d,), of "attention"

    def read(self, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """rows (b, n, d), of which `real` (b, n) count -> the states (b, d) that the prober reads."""
        return READ[self.pooling](self, rows, real)

    def states(self, rows: TurnRows) -> torch.Tensor:
        """The states (n, d) that the prober reads of all prompts."""
        parts = np.array_split(np.arange(len(rows)), max(1, len(rows) // READ_ROWS))
        return torch.cat([self.read(*rows[part]) for part in parts])


def _last(p: PooledProber, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return rows[torch.arange(len(rows)), real.sum(dim=1) - 1]


def _mean(p: PooledProber, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return (rows * real[..., None]).sum(dim=1) / real.sum(dim=1)[:, None]


def _max(p: PooledProber, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    margin = prober_logits(p.prober, rows) @ _margin(rows)
    return rows[torch.arange(len(rows)), margin.masked_fill(~real, -torch.inf).argmax(dim=1)]


def _attention(p: PooledProber, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    assert p.query is not None
    weight = (rows @ p.query).masked_fill(~real, -torch.inf).softmax(dim=1)
    return (weight[:, None] @ rows)[:, 0]


def _margin(like: torch.Tensor) -> torch.Tensor:
    """(2,): logits @ it is how much more unsafe than safe they are."""
    return torch.tensor([1.0, -1.0] if UNSAFE == 0 else [-1.0, 1.0], dtype=like.dtype)


READ: dict[Pooling, Callable[[PooledProber, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "last": _last,
    "mean": _mean,
    "max": _max,
    "attention": _attention,
}


def train_pooled(
    rows: TurnRows, unsafe: np.ndarray, weight: np.ndarray, split: Split, pooling: Pooling, *, seed: int
) -> PooledProber:
    """Train a prober that reads `pooling` of rows: gradients from split.train, kept from the epoch with the lowest loss
    on split.validation. unsafe (n,) bool, weight (n,).

    As in `train_probers`, it is the mean of MEMBERS small ones. They share the attention's query.
    """
    training = _Training(rows, unsafe, weight, split, pooling, seed)
    lowest, stale = float("inf"), 0
    best = training.parameters
    for _ in range(MAX_EPOCHS):
        training.epoch()
        loss = training.validation_loss()
        lowest, stale = min(loss, lowest), 0 if loss < lowest else stale + 1
        if not stale:
            best = [p.detach().clone() for p in training.parameters]
        if stale >= PATIENCE:
            break
    return training.whole(best)


class _Training:
    """The parameters of a prober in training, of standardised states."""

    def __init__(
        self, rows: TurnRows, unsafe: np.ndarray, weight: np.ndarray, split: Split, pooling: Pooling, seed: int
    ):
        self._rows, self._split, self._pooling = rows, split, pooling
        self._target = torch.from_numpy(unsafe).float()
        self._weight = torch.from_numpy(weight / weight[split.train].mean()).float()
        self._generator = torch.Generator().manual_seed(seed)
        self._plain = None if pooling in ("max", "attention") else PooledProber(pooling, {}).states(rows)
        self._mean, self._std = self._moments()
        width, units = len(self._mean), HIDDEN // MEMBERS
        shapes = ((width, HIDDEN), (1, HIDDEN), (MEMBERS, units, 2), (MEMBERS, 2))
        bounds = (width**-0.5, width**-0.5, units**-0.5, units**-0.5)
        start = [torch.empty(s).uniform_(-b, b, generator=self._generator) for s, b in zip(shapes, bounds, strict=True)]
        self.parameters = [p.requires_grad_() for p in (*start, torch.zeros(width))]
        self._optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def epoch(self) -> None:
        """One pass over the training part."""
        train = torch.from_numpy(self._split.train)
        for batch in train[torch.randperm(len(train), generator=self._generator)].split(BATCH):
            self._optimizer.zero_grad()
            (self._loss(batch, dropout=True) / len(batch)).backward()
            self._optimizer.step()

    def validation_loss(self) -> float:
        """The sum over the validation part."""
        with torch.no_grad():
            batches = torch.from_numpy(self._split.validation).split(READ_ROWS)
            return sum(float(self._loss(batch, dropout=False)) for batch in batches)

    def whole(self, parameters: list[torch.Tensor]) -> PooledProber:
        """The mean of the members, of raw states."""
        first, first_bias, second, second_bias, query = parameters
        prober = {
            "0.weight": first.T,
            "0.bias": first_bias[0],
            "2.weight": second.flatten(0, 1).T / MEMBERS,
            "2.bias": second_bias.mean(dim=0),
        }
        folded = fold_standardisation(prober, self._mean, self._std)
        folded = {name: t.contiguous() for name, t in folded.items()}
        return PooledProber(self._pooling, folded, query / self._std if self._pooling == "attention" else None)

    def _loss(self, batch: torch.Tensor, *, dropout: bool) -> torch.Tensor:
        margins = self._margins(batch, dropout=dropout)
        target = self._target[batch][:, None].expand_as(margins)
        each = functional.binary_cross_entropy_with_logits(margins, target, reduction="none")
        return self._weight[batch] @ each.mean(dim=1)

    def _margins(self, batch: torch.Tensor, *, dropout: bool) -> torch.Tensor:
        """(b, MEMBERS): how much more unsafe than safe each member finds the prompts."""
        first, first_bias, second, second_bias, query = self.parameters
        x, real = self._read(batch)
        x = (x - self._mean) / self._std
        if self._pooling == "attention":
            weight = (x @ query).masked_fill(~real, -torch.inf).softmax(dim=1)
            x, real = weight[:, None] @ x, real[:, :1]
        if dropout:
            x = x * (torch.rand(len(x), 1, x.shape[-1], generator=self._generator) >= DROPOUT) / (1 - DROPOUT)
        own = (x @ first + first_bias).relu().unflatten(-1, (MEMBERS, -1))
        margins = (torch.einsum("bnmu,muk->bnmk", own, second) + second_bias) @ _margin(x)
        return margins.masked_fill(~real[..., None], -torch.inf).amax(dim=1)

    def _read(self, prompts: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What training sees of prompts: their rows (b, n, d) and which are real (b, n), or one state of each."""
        if self._plain is None:
            return self._rows[np.asarray(prompts)]
        return self._plain[prompts][:, None], torch.ones(len(prompts), 1, dtype=torch.bool)

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation) of the training part's states, (d,) each; 1 for a constant feature."""
        total = square = torch.zeros(1, dtype=torch.float64)
        count, train = 0, self._split.train
        for some in np.array_split(train, max(1, len(train) // READ_ROWS)):
            x, real = self._read(some)
            states = x[real].double()
            total, square, count = total + states.sum(dim=0), square + states.square().sum(dim=0), count + len(states)
        mean = total / count
        std = (square / count - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std > 1e-6 * std.amax(), std, torch.ones_like(std))
        return mean.float(), std.float()

"""The prober: Linear(d, h) - ReLU - Linear(h, 2) - softmax on one hidden state, row 0 = unsafe.

The paper's training applies cross-entropy to softmax outputs, which drives every score to 0 or 1. This one trains on
raw logits and stops early, so that it can be calibrated (calibrate.py). It is the mean of small probers, its members,
because on prompts of another kind the quality of a single prober depends on its seed (docs/design-notes.md).

The prompts are split into FOLDS folds by query text, so that no wording is in two folds.

    held-out     the last fold, used once, for the final prober: every measurement in safety.json
    validation   of the other folds, each in turn: early stopping and temperature of MEMBERS members that are trained on
                 the rest. The gate's prober is the mean of all, so h = 256.

Layers are ranked by MEMBERS members, with the paper's 64 units together, of the last such rotation alone: its rows are
the train and the validation part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autosteer.runtime.errors import InputError

from . import DROPOUT

if TYPE_CHECKING:
    import torch

    Read = Callable[[np.ndarray], torch.Tensor]  # row numbers (b,) -> states (b, K, w) float32
    Prober = dict[str, torch.Tensor]  # "0.weight" (h, w), "0.bias" (h,), "2.weight" (2, h), "2.bias" (2,)

    Rotation = tuple[np.ndarray, np.ndarray]  # row numbers to train on, row numbers for validation

HIDDEN = 64  # units of MEMBERS members
MEMBERS = 8
UNSAFE = 0  # row of the last layer, as in the authors' prober
MAX_CLUSTER = 0.02  # share of all prompts that a chain of pairs with common prompts may put into one cluster
FOLDS = 5
READ_ROWS = 256  # states in memory at a time: (256, K, w)
LEARNING_RATE, WEIGHT_DECAY, BATCH, MAX_EPOCHS, PATIENCE = 3e-3, 1e-2, 64, 40, 6


@dataclass(frozen=True)
class Split:
    """Row numbers of the labelled prompts; the folds are disjoint and cover all."""

    folds: tuple[np.ndarray, ...]  # FOLDS; the last one is held out

    @property
    def heldout(self) -> np.ndarray:
        """The last fold: nothing is trained or calibrated on it."""
        return self.folds[-1]

    @property
    def rotations(self) -> list[Rotation]:
        """Each fold but the held-out one validates what trains on the others."""
        used = self.folds[:-1]
        others = [np.sort(np.concatenate([*used[:i], *used[i + 1 :]])) for i in range(len(used))]
        return list(zip(others, used, strict=True))

    @property
    def validation(self) -> np.ndarray:
        """What the last rotation validates on. The layer, the positions and the rewordings are chosen by these rows."""
        return self.rotations[-1][1]

    @property
    def size(self) -> int:
        """How many rows there are."""
        return sum(map(len, self.folds))

    @property
    def used(self) -> np.ndarray:
        """All rows that are not held out."""
        return np.sort(np.concatenate(self.folds[:-1]))

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The last rotation and the held-out fold, by name."""
        train, validation = self.rotations[-1]
        return {"train": train, "validation": validation, "heldout": self.heldout}


def split_by_text(
    texts: Sequence[str],
    strata: Sequence[tuple[bool, str]],
    *,
    seed: int,
    together: Iterable[tuple[int, int]] = (),
) -> Split:
    """Folds of one size such that equal texts (up to case and white space) stay together.

    strata: (unsafe, group) of each prompt; each stratum is spread over the folds as evenly as possible. together: rows
    that also stay together, such as the two prompts of a pair, unless that puts more than MAX_CLUSTER into one cluster.
    Raises InputError if a fold would lack one of the two classes.
    """
    by_text: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        by_text.setdefault(" ".join(text.casefold().split()), []).append(row)
    cluster_of = {row: rows for rows in by_text.values() for row in rows}
    for a, b in together:
        one, other = cluster_of[a], cluster_of[b]
        if one is not other and len(one) + len(other) <= max(2, MAX_CLUSTER * len(texts)):
            one.extend(other)
            cluster_of.update(dict.fromkeys(other, one))
    clusters = list({id(rows): rows for rows in cluster_of.values()}.values())
    names = sorted(set(strata))
    stratum = np.array([names.index(s) for s in strata])
    share = 1 / np.bincount(stratum, minlength=len(names))  # a prompt's weight: its part of its stratum
    rng = np.random.default_rng(seed)
    order = [clusters[i] for i in rng.permutation(len(clusters))]
    order.sort(key=len, reverse=True)  # large clusters first, the small ones fill the gaps; stable, so still shuffled

    filled = np.zeros((FOLDS, len(names)))
    fold = np.empty(len(texts), dtype=int)
    for rows in order:
        added = np.bincount(stratum[rows], minlength=len(names)) * share
        growth = ((filled + added) ** 2 - filled**2).sum(axis=1)  # least where these strata are scarcest
        best = int(growth.argmin())
        filled[best] += added
        fold[rows] = best
    unsafe = np.array([unsafe for unsafe, _ in strata])
    for label, name in ((True, "unsafe"), (False, "benign")):
        if len(set(fold[unsafe == label].tolist())) < FOLDS:
            raise InputError(
                f"the prompts have too few different texts to split them into {FOLDS} folds: one would have no {name} "
                "ones; add prompts that are worded differently"
            )
    return Split(tuple(np.flatnonzero(fold == i) for i in range(FOLDS)))


def row_weights(unsafe: np.ndarray, sources: Sequence[str]) -> np.ndarray:
    """(n,) weights that sum to 0.5 in each class; within a class, a data set weighs as the square root of its size.

    Weighted by size, 3,000 prompts of one kind would outweigh 300 of another; weighted equally, a handful would count
    as much as thousands.
    """
    names = np.array(sources)
    weight = np.zeros(len(names))
    for label in (True, False):
        for name in set(names[unsafe == label].tolist()):
            rows = (unsafe == label) & (names == name)
            weight[rows] = rows.sum() ** -0.5
        if (total := weight[unsafe == label].sum()) > 0:
            weight[unsafe == label] /= 2 * total
    return weight


def train_probers(
    read: Read,
    unsafe: np.ndarray,
    weight: np.ndarray,
    rotations: Sequence[Rotation],
    *,
    seed: int,
    dropout: float = DROPOUT,
) -> list[Prober]:
    """Fit K * R probers at once: one for each of the K columns in `read(rows)`, (len(rows), K, w) float32 of raw
    states, and each of the R rotations; the first column's come first.

    Gradients come from a rotation's rows to train on; each member is kept from the epoch with its lowest loss on the
    rows for validation. unsafe (n,) bool, weight (n,). Inputs are standardised in training, a share of `dropout` of
    them left out at random, and the results take raw states. Training all with one `baddbmm` takes a fraction of the
    time, and reads the states from disk once. Each of a prober's MEMBERS has its own initial weights and its own loss.
    """
    import torch
    from torch.nn import functional

    train, validation = (np.unique(np.concatenate(rows)) for rows in zip(*rotations, strict=True))
    mean, std = _moments(read, train)
    columns, width = mean.shape
    members, units = len(rotations) * MEMBERS, HIDDEN // MEMBERS  # of a column, of a member
    target = torch.from_numpy(~unsafe).long()  # class 0 = unsafe
    scaled = [_weights(weight, [rotation[part] for rotation in rotations]) for part in (0, 1)]
    generator = torch.Generator().manual_seed(seed)
    layers = [  # torch.nn.Linear's own start
        torch.empty(columns * members, *shape).uniform_(-bound, bound, generator=generator).requires_grad_()
        for fan_in, outputs in ((width, units), (units, 2))
        for shape, bound in (((fan_in, outputs), fan_in**-0.5), ((1, outputs), fan_in**-0.5))
    ]

    def losses(rows: torch.Tensor, each_weighs: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """(K * members,) sums over `rows`; each_weighs (R, n)"""
        x = ((read(rows.numpy()) - mean) / std).transpose(0, 1)
        if dropout:
            x = x * (torch.rand(x.shape, generator=generator) >= dropout) / (1 - dropout)
        hidden = torch.baddbmm(_joined(layers[1], members), x, _joined(layers[0], members)).relu()
        own = hidden.unflatten(-1, (members, units)).movedim(-2, 1).flatten(0, 1)  # (K * members, b, units)
        logits = torch.baddbmm(layers[3], own, layers[2])
        each = functional.cross_entropy(logits.flatten(0, 1), target[rows].repeat(columns * members), reduction="none")
        of_rotation = each.view(columns, len(rotations), MEMBERS, len(rows))
        return torch.einsum("krmb,rb->krm", of_rotation, each_weighs[:, rows]).flatten()

    optimizer = torch.optim.AdamW(layers, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    lowest, stale = torch.full((columns * members,), float("inf")), torch.zeros(columns * members)
    best = [t.detach().clone() for t in layers]
    for _ in range(MAX_EPOCHS):
        for batch in torch.from_numpy(train)[torch.randperm(len(train), generator=generator)].split(BATCH):
            optimizer.zero_grad()
            (losses(batch, scaled[0], dropout=dropout).sum() / len(batch)).backward()
            optimizer.step()
        with torch.no_grad():
            batches = torch.from_numpy(validation).split(READ_ROWS)
            loss = torch.stack([losses(batch, scaled[1], dropout=0) for batch in batches]).sum(dim=0)
        better = loss < lowest
        lowest, stale = torch.minimum(loss, lowest), torch.where(better, 0, stale + 1)
        for kept, now in zip(best, layers, strict=True):
            kept[better] = now.detach()[better]
        if (stale >= PATIENCE).all():
            break
    return [
        fold_standardisation(prober, mean[k // len(rotations)], std[k // len(rotations)])
        for k, prober in enumerate(_means_of_members(best))
    ]


def _weights(weight: np.ndarray, parts: Sequence[np.ndarray]) -> torch.Tensor:
    """(R, n) float32: of each part, `weight` (n,) scaled to a mean of 1, and 0 for other rows."""
    import torch

    scaled = torch.zeros(len(parts), len(weight))
    for own, rows in zip(scaled, parts, strict=True):
        own[rows] = torch.from_numpy(weight[rows] / weight[rows].mean()).float()
    return scaled


def _joined(t: torch.Tensor, members: int) -> torch.Tensor:
    """(K * members, .., n) -> (K, .., members * n)"""
    side_by_side: torch.Tensor = t.unflatten(0, (-1, members)).movedim(1, -2).flatten(-2)
    return side_by_side


def _means_of_members(layers: Sequence[torch.Tensor]) -> list[Prober]:
    """Probers whose logits are the mean of MEMBERS members' logits."""
    first, first_bias, second, second_bias = layers
    whole = {
        "0.weight": _joined(first, MEMBERS).transpose(1, 2),
        "0.bias": _joined(first_bias, MEMBERS)[:, 0],
        "2.weight": second.view(-1, HIDDEN, 2).transpose(1, 2) / MEMBERS,
        "2.bias": second_bias.view(-1, MEMBERS, 2).mean(dim=1),
    }
    return [{name: t[k].contiguous() for name, t in whole.items()} for k in range(len(whole["2.bias"]))]


def train_on_folds(
    states: torch.Tensor,
    unsafe: np.ndarray,
    split: Split,
    *,
    seed: int,
    weight: np.ndarray | None = None,
    dropout: float = DROPOUT,
) -> tuple[Prober, torch.Tensor]:
    """The mean of one prober per rotation of `split`, on states (n, w) in memory; and logits (n, 2) of the rows that
    are not held out, by the prober that has not trained on them.

    Without `weight`, both classes weigh the same.
    """
    import torch

    weight = row_weights(unsafe, [""] * len(unsafe)) if weight is None else weight
    probers = train_probers(
        *(lambda rows: states[rows][:, None], unsafe, weight, split.rotations), seed=seed, dropout=dropout
    )
    logits = torch.full((len(states), 2), float("nan"))
    for prober, (_, rows) in zip(probers, split.rotations, strict=True):
        logits[rows] = prober_logits(prober, states[rows])
    return _mean(probers), logits


def _mean(probers: Sequence[Prober]) -> Prober:
    """The prober whose logits are the mean of the `probers`'."""
    import torch

    count = len(probers)
    return {
        "0.weight": torch.cat([prober["0.weight"] for prober in probers]),
        "0.bias": torch.cat([prober["0.bias"] for prober in probers]),
        "2.weight": torch.cat([prober["2.weight"] for prober in probers], dim=1) / count,
        "2.bias": torch.stack([prober["2.bias"] for prober in probers]).mean(dim=0),
    }


def _moments(read: Read, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) over `rows`, (K, w) each; 1 for a constant feature."""
    import torch

    total = square = torch.zeros((), dtype=torch.float64)
    for some in np.array_split(rows, math.ceil(len(rows) / READ_ROWS)):
        x = read(some).double()
        total, square = total + x.sum(dim=0), square + x.square().sum(dim=0)
    mean = total / len(rows)
    std = (square / len(rows) - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6 * std.amax(dim=-1, keepdim=True), std, torch.ones_like(std))
    return mean.float(), std.float()


def fold_standardisation(prober: Prober, mean: torch.Tensor, std: torch.Tensor) -> Prober:
    """The prober of (h - mean) / std, as a prober of h."""
    weight = prober["0.weight"].double() / std.double()
    bias = prober["0.bias"].double() - weight @ mean.double()
    return {**prober, "0.weight": weight.float(), "0.bias": bias.float()}


def prober_logits(prober: Prober, states: torch.Tensor) -> torch.Tensor:
    """states (n, d) -> raw logits (n, 2); column 0 is unsafe."""
    hidden = (states @ prober["0.weight"].T + prober["0.bias"]).relu()
    return hidden @ prober["2.weight"].T + prober["2.bias"]


def p_unsafe(prober: Prober, states: torch.Tensor) -> np.ndarray:
    """states (n, d) -> p_unsafe (n,) float64, as the package's prober graph computes it."""
    return prober_logits(prober, states).softmax(dim=-1)[:, UNSAFE].double().numpy()


def balanced_accuracy(p: np.ndarray, unsafe: np.ndarray, threshold: float, weight: np.ndarray | None = None) -> float:
    """Mean of recall and specificity. As in the runtime's gate, every score that is not at or below the threshold
    fires.

    `weight` (n,), as from `row_weights`, weighs data sets instead of prompts.
    """
    right = (~(p <= threshold)) == unsafe
    each = np.ones(len(p)) if weight is None else weight
    return float(sum(np.average(right[unsafe == label], weights=each[unsafe == label]) for label in (True, False)) / 2)

"""The prober: Linear(d, 64) - ReLU - Linear(64, 2) - softmax on one hidden state, row 0 = unsafe.

The paper's training applies cross-entropy to softmax outputs, which drives every score to 0 or 1. This one trains on
raw logits and stops early, so that there is something left to calibrate (calibrate.py).

The prompts are split three ways, by query text, so that no wording is on two sides:

    train       gradients
    validation  early stopping, temperature, the accuracy in the table of layers
    held-out    touched once, by the final prober: every fact in safety.json is measured here
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from autosteer.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

    Prober = dict[str, torch.Tensor]  # "0.weight" (64, d), "0.bias" (64,), "2.weight" (2, 64), "2.bias" (2,)

HIDDEN = 64
UNSAFE = 0  # row of the last layer (method.md: the official prober's order)
FOLDS = 5  # one held out, one for validation, three to train on
WORD_HASHES = 1024
LEARNING_RATE, WEIGHT_DECAY, BATCH, MAX_EPOCHS, PATIENCE = 3e-3, 1e-2, 64, 60, 8


@dataclass(frozen=True)
class Split:
    """Row numbers of the labelled prompts; the three parts are disjoint and cover all."""

    train: np.ndarray
    validation: np.ndarray
    heldout: np.ndarray


def split_by_text(texts: Sequence[str], strata: Sequence[tuple[bool, str]], *, seed: int) -> Split:
    """Three parts (3/5, 1/5, 1/5) such that equal texts (but for case and white space) stay together.

    strata: (unsafe, group) of each prompt; each is spread over the parts as evenly as its texts allow.
    Raises InputError where a part would lack one of the two classes.
    """
    clusters: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        clusters.setdefault(" ".join(text.casefold().split()), []).append(row)
    names = sorted(set(strata))
    stratum = np.array([names.index(s) for s in strata])
    share = 1 / np.bincount(stratum, minlength=len(names))  # a prompt's weight: its part of its stratum
    rng = np.random.default_rng(seed)
    order = [list(clusters.values())[i] for i in rng.permutation(len(clusters))]
    order.sort(key=len, reverse=True)  # large clusters first, the small ones fill the gaps; stable, so still shuffled

    filled = np.zeros((FOLDS, len(names)))
    fold = np.empty(len(texts), dtype=int)
    for rows in order:
        added = np.bincount(stratum[rows], minlength=len(names)) * share
        growth = ((filled + added) ** 2 - filled**2).sum(axis=1)  # least where these strata are scarcest
        best = int(growth.argmin())
        filled[best] += added
        fold[rows] = best
    split = Split(*(np.flatnonzero(np.isin(fold, part)) for part in ([0, 1, 2], [3], [4])))
    _need_both_classes(split, np.array([unsafe for unsafe, _ in strata]))
    return split


def _need_both_classes(split: Split, unsafe: np.ndarray) -> None:
    for part, rows in vars(split).items():
        for label, name in ((True, "unsafe"), (False, "benign")):
            if not (unsafe[rows] == label).any():
                raise InputError(
                    f"the prompts have too few different texts to split them: no {name} ones would be left for the "
                    f"{part} part; add prompts in other words"
                )


def train_prober(states: torch.Tensor, unsafe: torch.Tensor, split: Split, *, seed: int) -> Prober:
    """Fit on split.train, stop at the lowest loss on split.validation. Both classes weigh the same.

    states (n, d) float32, unsafe (n,) bool. Inputs are standardised in training; the result takes raw states.
    """
    import torch
    from torch.nn import functional

    mean, std = states[split.train].mean(dim=0), states[split.train].std(dim=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))  # a constant feature says nothing
    x = (states - mean) / std
    y = (~unsafe).long()  # class 0 = unsafe
    weight = 1 / torch.bincount(y[split.train], minlength=2).float()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 2))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    train = torch.from_numpy(split.train)
    best_loss, best, stale = float("inf"), copy.deepcopy(net.state_dict()), 0
    for _ in range(MAX_EPOCHS):
        for batch in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[batch]), y[batch], weight=weight).backward()
            optimizer.step()
        with torch.no_grad():
            loss = functional.cross_entropy(net(x[split.validation]), y[split.validation], weight=weight).item()
        stale += 1
        if loss < best_loss:
            best_loss, best, stale = loss, copy.deepcopy(net.state_dict()), 0
        elif stale >= PATIENCE:
            break
    return fold_standardisation(best, mean, std)


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
    """states (n, d) -> (n,) float64, what the package's prober graph will compute."""
    return prober_logits(prober, states).softmax(dim=-1)[:, UNSAFE].double().numpy()


def words_only_accuracy(texts: Sequence[str], unsafe: np.ndarray, split: Split, *, seed: int) -> float:
    """Held-out balanced accuracy, at 0.5, of the same prober on hashed word 1- and 2-grams instead of hidden states.

    The yardstick for the real one: no better than this, and it knows words, not what the model makes of them.
    """
    import torch

    seen = torch.zeros(len(texts), WORD_HASHES)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.casefold())
        for gram in (*words, *map(" ".join, pairwise(words))):
            seen[row, zlib.crc32(gram.encode()) % WORD_HASHES] = 1
    prober = train_prober(seen, torch.from_numpy(unsafe), split, seed=seed)
    return balanced_accuracy(p_unsafe(prober, seen[split.heldout]), unsafe[split.heldout], 0.5)


def balanced_accuracy(p: np.ndarray, unsafe: np.ndarray, threshold: float) -> float:
    """Mean of recall and specificity. Like the runtime's gate: whatever is not at or below the threshold fires."""
    fires = ~(p <= threshold)
    return float((fires[unsafe].mean() + 1 - fires[~unsafe].mean()) / 2)

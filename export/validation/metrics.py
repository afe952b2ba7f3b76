"""Distances between what a package computes and what PyTorch computes. NaN is never near."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from autosteer.runtime.self_test import POSSIBLE

MASKED_LOGIT = -1e38  # a logit below it belongs to a token that HF masks with the lowest float32


def worse(one: float, other: float) -> float:
    """The larger of two errors; NaN counts as infinite. `max` may drop a NaN, and a graph of NaNs would pass."""
    return math.inf if math.isnan(one) or math.isnan(other) else max(one, other)


def worst_of(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """The largest error of each name."""
    lines: dict[str, float] = {}
    for errors in found:
        lines |= {name: worse(lines.get(name, 0.0), error) for name, error in errors.items()}
    return lines


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest |ours - theirs|, arrays of any one shape; inf if the shapes differ."""
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest |ours - theirs| over the largest |theirs|, arrays of any one shape; inf if the shapes differ or there is
    nothing, inf or NaN (which no limit allows) if theirs is all zeros.
    """
    if ours.shape != theirs.shape or not theirs.size:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def row_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over rows (R, D) of |ours - theirs| / |theirs|."""
    sizes = np.maximum(np.linalg.norm(theirs, axis=1), 1e-30)
    return float((np.linalg.norm(ours - theirs, axis=1) / sizes).mean())


def share_lost(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How much of theirs (R, D) is not in ours: 0 if ours is theirs plus unrelated noise, 1 if it is zeros or unrelated
    to theirs. |1 - mean over rows of <ours, theirs> / <theirs, theirs>|
    """
    present = (ours * theirs).sum(axis=1) / np.maximum((theirs * theirs).sum(axis=1), 1e-30)
    return float(abs(1 - present.mean()))


def cosine_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """1 - cosine of the angle between two arrays, as vectors."""
    if ours.shape != theirs.shape:
        return float("inf")
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    return 1.0 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """KL divergence of our next-token distributions from theirs in nats, mean over n. Logits are (n, V)."""
    if ours.shape != theirs.shape:
        return math.inf
    p, q = _log_softmax(theirs), _log_softmax(ours)
    possible = theirs > MASKED_LOGIT
    return float(np.where(possible, np.exp(p) * (p - q), 0.0).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_probabilities: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probabilities


def differing_tokens(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """How many tokens come after the two's common beginning; 0 if they are equal."""
    agree = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return float(max(len(ours), len(theirs)) - agree)


def lead(logits: np.ndarray) -> float:
    """Margin of the likeliest token over the runner-up, in standard deviations of the logits (V,)."""
    possible = logits[~(np.abs(logits) > POSSIBLE)]
    second, first = np.partition(possible, -2)[-2:]
    return float((first - second) / max(float(possible.std()), 1e-30))

"""How well scores tell unsafe prompts from benign ones: AUC, ROC, reliability, and the words-only baseline.

The baseline is the same prober on hashed word 1- and 2-grams instead of hidden states. A gate that is no better uses
the words alone, and nothing of the model's understanding. The baseline is cheap, so every number is reported beside it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import mannwhitneyu

from .calibrate import ECE_BINS, class_weights

if TYPE_CHECKING:
    import torch

WORD_HASHES = 1024


def auc(unsafe: np.ndarray, benign: np.ndarray) -> float:
    """Probability that an unsafe prompt scores above a benign one, ties counting half: scores (n,), (m,)."""
    return float(mannwhitneyu(unsafe, benign).statistic / (len(unsafe) * len(benign)))


def roc(unsafe: np.ndarray, benign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of benign, share of unsafe) above every threshold from infinity down to the lowest score."""
    steps = np.concatenate([[np.inf], np.unique(np.concatenate([unsafe, benign]))[::-1], [-np.inf]])
    above = (1 - np.searchsorted(np.sort(scores), steps, side="right") / len(scores) for scores in (benign, unsafe))
    share_of_benign, share_of_unsafe = above
    return share_of_benign, share_of_unsafe


def reliability(p: np.ndarray, unsafe: np.ndarray) -> list[dict[str, float]]:
    """Per bin of p that has prompts in it: its mean p, the class-balanced share that is unsafe, how many prompts."""
    weight, bins = class_weights(unsafe), np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    rows = ((b, bins == b) for b in range(ECE_BINS))
    return [
        {
            "from": b / ECE_BINS,
            "mean_p": float(np.average(p[inside], weights=weight[inside])),
            "share_unsafe": float(np.average(unsafe[inside], weights=weight[inside])),
            "prompts": int(inside.sum()),
        }
        for b, inside in rows
        if inside.any()
    ]


def word_features(texts: Sequence[str]) -> torch.Tensor:
    """(n, WORD_HASHES) float32: 1 at the hash of each word and of each pair of neighbouring words."""
    import torch

    features = torch.zeros(len(texts), WORD_HASHES)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.casefold())
        for gram in (*words, *map(" ".join, pairwise(words))):
            features[row, zlib.crc32(gram.encode()) % WORD_HASHES] = 1
    return features

"""Calibrate a prober: temperature and threshold, with measurements of both.

The temperature is fitted on prompts that are not held out, each scored by members that have not trained on it; the
threshold and every fact come from held-out prompts (prober.py). Both classes weigh the same throughout, so
p_unsafe = 0.5 means "as likely as not, if unsafe prompts were as common as benign ones". How common they are in use is
unknown.

A false-positive rate measured on n prompts is only an estimate. `clopper_pearson_upper` bounds the true rate, and
--target-fpr applies to that bound, not to the measured rate. Prompts of one family say the same thing and score alike,
so the bound counts families (`independent`): a rate of 4 in 300 prompts of 20 equal families is one in 20.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from autosteer.runtime.errors import InputError

from .prober import UNSAFE

if TYPE_CHECKING:
    import torch

    from .prober import Prober

CONFIDENCE = 0.95  # one-sided
ECE_BINS = 10
TEMPERATURES = (0.05, 20.0)


def class_weights(unsafe: np.ndarray) -> np.ndarray:
    """(n,) bool -> (n,) weights that sum to 1, half of it on each class."""
    weights: np.ndarray = np.where(unsafe, 0.5 / unsafe.sum(), 0.5 / (~unsafe).sum())
    return weights


def fit_temperature(logits: torch.Tensor, unsafe: np.ndarray) -> float:
    """T that minimises the class-balanced cross-entropy of softmax(logits / T); logits (n, 2).

    Uses Platt's smoothed targets, (n + 1) / (n + 2) for n prompts of a class. On data that are separated perfectly,
    targets of 0 and 1 would drive T to 0 and every score to 0 or 1.
    """
    margin = (logits[:, UNSAFE] - logits[:, 1 - UNSAFE]).double().numpy()
    counts = np.where(unsafe, unsafe.sum(), (~unsafe).sum())
    right = (counts + 1) / (counts + 2)
    target, weight = np.where(unsafe, right, 1 - right), class_weights(unsafe)

    def loss(log_t: float) -> float:
        z = margin / math.exp(log_t)
        return float(weight @ (np.logaddexp(0, z) - target * z))

    # the loss is convex in 1 / T, so it has one valley in log T as well
    found = minimize_scalar(loss, bounds=tuple(map(math.log, TEMPERATURES)), options={"xatol": 1e-9})
    return math.exp(float(found.x))


def fold_temperature(prober: Prober, temperature: float) -> Prober:
    """The prober whose logits are divided by `temperature`."""
    return {**prober, **{name: prober[name] / temperature for name in ("2.weight", "2.bias")}}


def clopper_pearson_upper(events: int, trials: int, *, confidence: float = CONFIDENCE) -> float:
    """One-sided upper bound on a rate: the p at which `events` or fewer in `trials` has probability 1 - confidence."""
    return float(binomtest(events, trials, alternative="less").proportion_ci(confidence, method="exact").high)


def prompts_needed(target_fpr: float) -> int:
    """How many held-out benign prompts are needed to show `target_fpr`, if none of them fires."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-target_fpr))


def independent(clusters: Iterable[str]) -> int:
    """How many independent prompts tell as much as these, which fire alike within a cluster: Kish's effective sample
    size, (sum m)^2 / sum m^2 over their sizes m. With equal sizes, the number of clusters.
    """
    sizes = Counter(clusters).values()
    return sum(sizes) ** 2 // sum(size * size for size in sizes)


def rate_upper(fires: np.ndarray, clusters: Sequence[str]) -> float:
    """Upper bound on the rate at which prompts (n,) of these clusters fire, as many as are `independent`."""
    trials = independent(clusters)
    return clopper_pearson_upper(math.ceil(float(fires.mean()) * trials - 1e-9), trials)


def allowed_false_positives(benign: int, *, target_fpr: float) -> int:
    """The most false positives among `benign` independent held-out prompts that still show `target_fpr`.

    Raises InputError if not even zero would. Needs no scores, so it is called before the expensive part.
    """
    allowed = -1
    while allowed + 1 < benign and clopper_pearson_upper(allowed + 1, benign) <= target_fpr:
        allowed += 1
    if allowed < 0:
        needed = prompts_needed(target_fpr)
        raise InputError(
            f"--target-fpr {target_fpr:g} cannot be shown with {benign} held-out benign prompts: it takes {needed}, so "
            f"about {5 * needed} benign prompts in all (of one family all count as one); add --benign, or allow a "
            "higher rate"
        )
    return allowed


def choose_threshold(p: np.ndarray, unsafe: np.ndarray, clusters: Sequence[str], *, target_fpr: float) -> float:
    """The threshold with the highest recall whose upper bound on the false-positive rate is at most `target_fpr`.

    p (n,) scores, unsafe (n,) bool, clusters (n,), of which as many prompts count as are `independent`. Of thresholds
    with equal recall, the one with the fewest false positives is used, moved half way to the next score above it, so
    that rounding on a device changes no verdict. The allowed number of false positives depends on their numbers alone,
    so choosing among the scores does not invalidate the bound. Raises InputError if there are too few benign prompts to
    show the target, or no threshold below 1 meets it.
    """
    benign = np.sort(p[~unsafe])[::-1]
    trials = independent(cluster for cluster, is_unsafe in zip(clusters, unsafe, strict=True) if not is_unsafe)
    allowed = allowed_false_positives(trials, target_fpr=target_fpr) * len(benign) // trials
    floor = benign[allowed]  # at or above this score at most `allowed` benign prompts fire (p > threshold)
    caught = p[unsafe & (p > floor)]
    below = (
        benign[benign < caught.min()].max() if caught.size else floor
    )  # as many unsafe above `below` as above `floor`
    above = p[p > below]
    threshold = float((below + above.min()) / 2) if above.size else float(below)
    if threshold >= 1.0:
        raise InputError(
            f"--target-fpr {target_fpr:g}: benign prompts score 1.0; more varied --benign prompts are needed"
        )
    return threshold


def expected_calibration_error(p: np.ndarray, unsafe: np.ndarray) -> float:
    """Class-balanced ECE over equal-width bins: sum over bins of weight * |mean p - share unsafe|."""
    weight, bins = class_weights(unsafe), np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = (abs((weight * (p - unsafe))[bins == b].sum()) for b in range(ECE_BINS))
    return float(sum(gaps))


def heldout_facts(
    p: np.ndarray, unsafe: np.ndarray, groups: Sequence[str], clusters: Sequence[str], *, threshold: float
) -> dict[str, float]:
    """Measurements of the gate on the held-out part, for safety.json.

    p (n,) calibrated scores, unsafe (n,) bool, clusters (n,) as in `choose_threshold`, groups (n,) channel or group
    names: if there are several, recall and false-positive rate are also given for each, as "heldout_recall.<channel>"
    and "heldout_fpr.<group>".
    """
    fires = ~(p <= threshold)
    recall, fpr = float(fires[unsafe].mean()), float(fires[~unsafe].mean())
    facts = {
        "heldout_unsafe": float(unsafe.sum()),
        "heldout_benign": float((~unsafe).sum()),
        "heldout_accuracy": (recall + 1 - fpr) / 2,
        "heldout_recall": recall,
        "heldout_fpr": fpr,
        "fpr_upper_95": rate_upper(fires[~unsafe], [clusters[row] for row in np.flatnonzero(~unsafe).tolist()]),
        "brier": float(class_weights(unsafe) @ (p - unsafe) ** 2),
        "ece": expected_calibration_error(p, unsafe),
    }
    names = np.array(groups)
    for group in sorted(set(groups)) if len(set(groups)) > 1 else ():
        for label, key in ((unsafe, "heldout_recall"), (~unsafe, "heldout_fpr")):
            rows = label & (names == group)
            if rows.any():
                facts[f"{key}.{group}"] = float(fires[rows].mean())
    return facts

"""Measure a fitted gate: on held-out prompts, on each data set left out of the fit, on external prompts.

Three probers are compared, trained and calibrated in the same way: the gate's own; the paper's, which reads the last
token (left out if the gate's own does, or if its states are not known); and one that sees only the words (measure.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .calibrate import fit_temperature, fold_temperature, rate_upper
from .measure import auc, reliability, word_features
from .prober import Split, balanced_accuracy, p_unsafe, row_weights, train_on_folds

if TYPE_CHECKING:
    import torch

    from .prober import Prober
    from .states import Pooling

OURS, PAPER, WORDS = "prober", "paper's prober", "words alone"
SMALLEST = 10  # prompts of a class; a smaller data set is not left out
NO_BETTER = 0.01  # an AUC counts as better only if it exceeds the words-only AUC by more


@dataclass(frozen=True)
class Table:
    """All prompts: first the fit's, then external ones, then rewordings of the fit's (reworded.py); arrays (n,)."""

    texts: list[str]
    unsafe: np.ndarray  # bool
    groups: list[str]
    source_of: list[str]  # data set
    split: Split  # of the fit's prompts
    clusters: list[str]  # what stays on one side of a split (Labelled.cluster); of a rewording, its prompt's
    external: np.ndarray  # row numbers
    taught: Split  # `split`, with the rewordings that are trained on

    @property
    def sources(self) -> list[str]:
        """The fit's data sets, in order of appearance."""
        return list(dict.fromkeys(self.source_of[: self.split.size]))

    def rows_of(self, source: str) -> np.ndarray:
        """Row numbers of a data set, rewordings included."""
        return np.flatnonzero(np.array(self.source_of) == source)


@dataclass(frozen=True)
class Gate:
    """A calibrated prober with its threshold, and measurements of both."""

    prober: Prober
    threshold: float
    facts: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Unsafe prompts of one origin against benign ones of another, by prober."""

    kind: str  # "held out", "left out", "external"
    unsafe: str
    benign: str
    unsafe_prompts: int
    benign_prompts: int
    auc: dict[str, float]
    recall: dict[str, float]  # share of the unsafe above the gate's threshold
    fpr: dict[str, float]


@dataclass(frozen=True)
class FlagRate:
    """Share of a group's prompts that is flagged, by prober."""

    kind: str  # "held out" or "external"
    group: str
    unsafe: bool
    prompts: int
    flagged: dict[str, float]
    upper_95: float  # bound on the gate's own share
    p: np.ndarray  # the gate's scores, for the plots


@dataclass(frozen=True)
class Evidence:
    """Everything that the report shows about the prober."""

    threshold: float
    comparisons: tuple[Comparison, ...]
    rates: tuple[FlagRate, ...]
    reliability: tuple[dict[str, float], ...]  # of the held-out part
    words_accuracy: float  # balanced, held out, at 0.5

    def facts(self) -> dict[str, float]:
        """The numbers for safety.json."""
        held = next(c for c in self.comparisons if c.kind == "held out")
        names = {OURS: "heldout_auc", PAPER: "paper_heldout_auc", WORDS: "words_heldout_auc"}
        return {names[name]: value for name, value in held.auc.items()} | {"words_only_accuracy": self.words_accuracy}

    def no_better_than_words(self) -> list[Comparison]:
        """Comparisons in which the prober is no better than the words-only baseline."""
        return [c for c in self.comparisons if c.auc[OURS] < c.auc[WORDS] + NO_BETTER]


def gather(
    t: Table,
    pooled: Mapping[Pooling, torch.Tensor],
    pooling: Pooling,
    gate: Gate,
    *,
    seed: int,
    dropout: float,
    advance: Callable[[int], None] = lambda done: None,
) -> Evidence:
    """Train the other probers, leave data sets out, compare. pooled: "last", "mean" -> states (n, d) of the layer;
    `pooling`, which the gate reads, must be among them.
    """
    inputs = {OURS: pooled[pooling], WORDS: word_features(t.texts)}
    if pooling != "last" and "last" in pooled:
        inputs[PAPER] = pooled["last"]

    def scores_of(split: Split) -> dict[str, np.ndarray]:
        return {name: _train(states, t, split, seed=seed, dropout=dropout) for name, states in inputs.items()}

    scores = scores_of(t.taught) | {OURS: p_unsafe(gate.prober, inputs[OURS])}
    advance(1)
    compare = _Comparer(t, gate.threshold)
    unsafe, benign = (t.split.heldout[t.unsafe[t.split.heldout] == label] for label in (True, False))
    comparisons = [compare("held out", "held out", "held out", unsafe, benign, scores)]
    external = {
        label: {s: t.external[[t.source_of[i] == s and t.unsafe[i] == label for i in t.external]] for s in _names(t)}
        for label in (True, False)
    }
    against = {"held out": unsafe} | external[True], {"held out": benign} | external[False]
    comparisons += [
        compare("external", one, other, u, b, scores)
        for one, u in against[0].items()
        for other, b in against[1].items()
        if (one, other) != ("held out", "held out") and len(u) and len(b)
    ]
    for source in t.sources:
        comparisons += _leave_out(t, source, scores_of, compare)
        advance(1)
    held = t.split.heldout
    rates = [*_rates("held out", held, t, scores, gate), *_rates("external", t.external, t, scores, gate)]
    advance(1)
    return Evidence(
        threshold=gate.threshold,
        comparisons=tuple(comparisons),
        rates=tuple(rates),
        reliability=tuple(reliability(scores[OURS][held], t.unsafe[held])),
        words_accuracy=balanced_accuracy(scores[WORDS][held], t.unsafe[held], 0.5),
    )


def _train(states: torch.Tensor, t: Table, split: Split, *, seed: int, dropout: float) -> np.ndarray:
    """(n,) calibrated scores of all prompts, by a prober trained on `split`."""
    weight, used = np.zeros(len(t.texts)), split.used
    weight[used] = row_weights(t.unsafe[used], [t.source_of[i] for i in used])
    prober, logits = train_on_folds(states, t.unsafe, split, seed=seed, weight=weight, dropout=dropout)
    return p_unsafe(fold_temperature(prober, fit_temperature(logits[used], t.unsafe[used])), states)


@dataclass(frozen=True)
class _Comparer:
    table: Table
    threshold: float

    def __call__(
        self, kind: str, one: str, other: str, unsafe: np.ndarray, benign: np.ndarray, scores: dict[str, np.ndarray]
    ) -> Comparison:
        return Comparison(
            kind,
            one,
            other,
            len(unsafe),
            len(benign),
            auc={name: auc(p[unsafe], p[benign]) for name, p in scores.items()},
            recall={name: _flagged(p[unsafe], self.threshold) for name, p in scores.items()},
            fpr={name: _flagged(p[benign], self.threshold) for name, p in scores.items()},
        )


def _leave_out(
    t: Table, source: str, scores_of: Callable[[Split], dict[str, np.ndarray]], compare: _Comparer
) -> list[Comparison]:
    """Train without `source` and what has its words or families, then compare its prompts with each other and with the
    rest's held-out ones.

    Empty if the rest lacks a class: a gate cannot be trained on benign prompts alone.
    """
    left = t.rows_of(source)
    clusters = {t.clusters[row] for row in left}
    kin = np.array([row for row, cluster in enumerate(t.clusters) if cluster in clusters], dtype=np.int64)
    rest = Split(tuple(np.setdiff1d(rows, kin) for rows in t.taught.folds))
    left = left[left < t.split.size]
    if any(len(set(t.unsafe[rows].tolist())) < 2 for rows in rest.folds):
        return []
    scores = scores_of(rest)
    own = {label: left[t.unsafe[left] == label] for label in (True, False)}
    others = {label: rest.heldout[t.unsafe[rest.heldout] == label] for label in (True, False)}
    sides = [(source, source, own[True], own[False])] if min(map(len, own.values())) >= SMALLEST else []
    sides += [(source, "the rest", own[True], others[False])] if len(own[True]) >= SMALLEST else []
    sides += [("the rest", source, others[True], own[False])] if len(own[False]) >= SMALLEST else []
    return [compare("left out", one, other, u, b, scores) for one, other, u, b in sides]


def _rates(kind: str, rows: np.ndarray, t: Table, scores: dict[str, np.ndarray], gate: Gate) -> list[FlagRate]:
    rates = []
    for unsafe, group in sorted({(bool(t.unsafe[i]), t.groups[i]) for i in rows}, reverse=True):
        mine = rows[[t.groups[i] == group and t.unsafe[i] == unsafe for i in rows]]
        flagged = {name: _flagged(p[mine], gate.threshold) for name, p in scores.items()}
        upper = rate_upper(~(scores[OURS][mine] <= gate.threshold), [t.clusters[row] for row in mine])
        rates.append(FlagRate(kind, group, unsafe, len(mine), flagged, upper, scores[OURS][mine]))
    return rates


def _names(t: Table) -> list[str]:
    return list(dict.fromkeys(t.source_of[i] for i in t.external))


def _flagged(p: np.ndarray, threshold: float) -> float:
    """Share of scores that fire: as in the runtime's gate, all that are not at or below the threshold."""
    return float((~(p <= threshold)).mean())

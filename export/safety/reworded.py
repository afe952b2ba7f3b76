"""Reworded prompts (runtime/evaluation/rewording.py), as a fit uses them.

    training    each prompt that is not held out, in TAUGHT kinds of rewording that a fit may use
    choosing    prompts of the validation part in the other kinds: which state should the prober read?
    judging     held-out prompts in all kinds: the table in the report

A rewording can be a dialogue. The gate's score of one is the worst of its user turns', so every turn is a prompt here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from autosteer.runtime.evaluation.rewording import UNCHANGED, Rewording
from autosteer.runtime.evaluation.variants import Outcome
from autosteer.runtime.gate import worst

from .measure import auc
from .prober import Split

if TYPE_CHECKING:
    from .pairs import Labelled, Prompt

Name = TypeVar("Name", bound=str)

TAUGHT = 2  # rewordings of each prompt that is trained on
JUDGED = 60  # prompts of each label and part that are reworded in every way


@dataclass(frozen=True)
class RewordedTurn:
    """One user turn of a reworded prompt."""

    item: Labelled  # as the prompt's, but in these words
    of: int  # the prompt's row
    rewording: str  # its name


@dataclass(frozen=True)
class Reworded:
    """All rewordings of a fit's prompts, in the order of `everything`."""

    training: tuple[RewordedTurn, ...]
    choosing: tuple[RewordedTurn, ...]
    judging: tuple[RewordedTurn, ...]

    @property
    def everything(self) -> list[Labelled]:
        """The rewordings as prompts: first those to train on."""
        return [one.item for one in (*self.training, *self.choosing, *self.judging)]

    def taught(self, split: Split, first: int) -> Split:
        """`split` with the rewordings to train on, which stand from row `first` on, each in its prompt's fold."""
        of = np.array([one.of for one in self.training], dtype=np.int64)
        used = [np.concatenate([rows, first + np.flatnonzero(np.isin(of, rows))]) for rows in split.folds[:-1]]
        return Split((*used, split.heldout))

    def choose(self, scores: Mapping[Name, np.ndarray], first: int) -> Name:
        """The name of the scores (n,) that best tell unsafe from benign in the words to choose by; `first`: the row of
        the first rewording of all.
        """
        begin = first + len(self.training)

        def quality(p: np.ndarray) -> float:
            scored = _worst_turns(self.choosing, p[begin : begin + len(self.choosing)])
            sides = [[p for (_, _, unsafe), p in scored.items() if unsafe is label] for label in (True, False)]
            return auc(*map(np.array, sides))

        return max(scores, key=lambda name: quality(scores[name]))

    def outcomes(self, p: np.ndarray, first: int, threshold: float) -> list[Outcome]:
        """What fires of the held-out prompts that are judged, unchanged and reworded. p (n,): of all rows."""
        scored = _worst_turns(self.judging, p[first + len(self.training) + len(self.choosing) :])
        rows = {(of, unsafe) for of, _, unsafe in scored}
        unchanged = [(UNCHANGED, unsafe, not p[of] <= threshold) for of, unsafe in sorted(rows)]
        return unchanged + [(name, unsafe, not score <= threshold) for (_, name, unsafe), score in scored.items()]


def reword_prompts(
    prompts: Sequence[Labelled], split: Split, rewordings: Sequence[Rewording], *, augment: bool, seed: int
) -> Reworded:
    """Reword `prompts` for a fit. Without `augment` nothing is to train on."""
    fitted = [rewording for rewording in rewordings if rewording.fitted]
    others = [rewording for rewording in rewordings if not rewording.fitted]
    rng = random.Random(seed)
    rows = split.used.tolist() if augment else []
    training = [_reworded(prompts, row, way, seed)[-1] for row in rows for way in rng.sample(fitted, TAUGHT)]

    def every_turn(rows: np.ndarray, rewordings: Sequence[Rewording]) -> tuple[RewordedTurn, ...]:
        some = [row for label in (True, False) for row in _some(prompts, rows, label, rng)]
        return tuple(one for row in some for way in rewordings for one in _reworded(prompts, row, way, seed))

    return Reworded(tuple(training), every_turn(split.validation, others), every_turn(split.heldout, rewordings))


def _some(prompts: Sequence[Labelled], rows: np.ndarray, unsafe: bool, rng: random.Random) -> list[int]:
    of_label = [int(row) for row in rows if prompts[row].unsafe is unsafe]
    return sorted(rng.sample(of_label, min(JUDGED, len(of_label))))


def _reworded(prompts: Sequence[Labelled], row: int, rewording: Rewording, seed: int) -> list[RewordedTurn]:
    """What is judged of a reworded prompt; the last one holds or completes the request."""
    item = prompts[row]
    wording = rewording.of(item.prompt.text, seed=seed)
    earlier = (*item.prompt.earlier, *wording.earlier)
    whole: Prompt = replace(item.prompt, text=wording.text, earlier=earlier, system=wording.system)
    return [RewordedTurn(replace(item, prompt=turn), row, rewording.name) for turn in whole.judged]


def _worst_turns(reworded: Sequence[RewordedTurn], p: np.ndarray) -> dict[tuple[int, str, bool], float]:
    """The worst score of each reworded prompt's turns, by prompt, rewording and label."""
    turns: dict[tuple[int, str, bool], list[float]] = {}
    for one, score in zip(reworded, p.tolist(), strict=False):
        turns.setdefault((one.of, one.rewording, one.item.unsafe), []).append(score)
    return {key: worst(scores) for key, scores in turns.items()}

"""Fit a monitor on what a package's model answers without a gate: autosteer-fit --monitor.

    answers    greedy, to the fit's own prompts; one to an unsafe prompt is unsafe unless it refuses (own_answers.py)
    windows    means of WINDOW successive hidden states, as runtime/monitor.py reads them
    prober     trained on the windows of answers to the train part; temperature from the validation part's
    threshold  above the worst window of nearly every benign answer of the validation part
    facts      of the held-out part, which is the gate's own: the split is that of the first fit with the same seed

Layer, prober and Refusal Head stay those of the safety folder with which the package was exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from autosteer.export.safety_folder import MOST_FALSE_STOPS, MonitorFacts, SafetyArtifact
from autosteer.runtime import Engine
from autosteer.runtime.console import table
from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.refusals import is_refusal
from autosteer.runtime.gate import is_safe

from .arrange import split_prompts
from .calibrate import clopper_pearson_upper, fit_temperature, fold_temperature
from .own_answers import OwnAnswer, own_answers
from .prober import p_unsafe, prober_logits, row_weights, train_probers
from .progress import progress, warn
from .refit import Shipped, check_belongs

if TYPE_CHECKING:
    from rich.console import Console

    from .pairs import FitData, Labelled
    from .prober import Prober

WINDOW = 16  # tokens
TOKENS = 48  # of an answer, at most
ANSWERS = 600  # of each label, at most; three in five to train on
STRIDE = 4  # tokens between the windows that are trained on: neighbours are almost equal


@dataclass(frozen=True)
class Judged:
    """An answer of the fit."""

    item: Labelled
    answer: OwnAnswer
    unsafe: bool  # it was given to an unsafe prompt, and is no refusal

    @property
    def windows(self) -> np.ndarray:
        """(m, d): what the monitor reads of it."""
        return windows(self.answer.states, WINDOW)


def windows(states: np.ndarray, window: int) -> np.ndarray:
    """Means of `window` successive states (n, d), or of all if there are fewer: (max(n - window, 0) + 1, d) float32;
    (0, d) of none.
    """
    if not len(states):
        return states
    size = min(window, len(states))
    sums = np.concatenate([np.zeros((1, states.shape[1])), states.cumsum(axis=0, dtype=np.float64)])
    means: np.ndarray = ((sums[size:] - sums[:-size]) / size).astype(np.float32)
    return means


def fit_monitor(data: FitData, shipped: Shipped, *, model: str, seed: int, console: Console) -> SafetyArtifact:
    """The safety folder of `shipped` with a monitor. Warns if it is not worth having.

    Raises InputError if the folder is not the package's, or no answer to an unsafe prompt is unsafe.
    """
    from autosteer.export.checkpoint.decoder_config import decoder_config
    from autosteer.export.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(model)
    config = decoder_config(checkpoint)
    sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}
    old = SafetyArtifact.load(shipped.safety, **sizes)
    engine = Engine.load(shipped.package, max_tiles=shipped.max_tiles)
    check_belongs(engine.manifest, old, shipped, checkpoint.name)
    parts = _answers(engine, data, seed, console)
    monitor, facts = fit_on(parts, threshold=old.facts.threshold, seed=seed)
    console.print(_table(parts[2], monitor, facts, old.facts.threshold), soft_wrap=True, markup=False, highlight=False)
    if not facts.is_worth_it:
        warn(
            console,
            "packages have this monitor only with `autosteer-export --monitor`: it stops too many benign "
            "answers, or catches too few unsafe ones",
        )
    artifact = replace(old, facts=replace(old.facts, monitor=facts), monitor=monitor)
    artifact.check(shipped.safety, **sizes)
    return artifact


def _answers(engine: Engine, data: FitData, seed: int, console: Console) -> list[list[Judged]]:
    """Answers to at most ANSWERS prompts of each label, by part of the split: train, validation, held out."""
    prompts, rng = data.labelled(), np.random.default_rng(seed)
    parts = list(split_prompts(data, prompts, seed=seed).parts.values())
    chosen: list[tuple[int, Labelled]] = []
    for part, rows in enumerate(parts):
        for label in (True, False):
            of_label = [row for row in rows if prompts[row].unsafe is label]
            most = ANSWERS * len(rows) // len(prompts)
            chosen += [(part, prompts[of_label[i]]) for i in rng.permutation(len(of_label))[:most]]
    found: list[list[Judged]] = [[] for _ in parts]
    with progress(console, "answers", len(chosen)) as advance:
        for index, answer in own_answers(engine, [item.prompt for _, item in chosen], tokens=TOKENS):
            part, item = chosen[index]
            found[part].append(Judged(item, answer, item.unsafe and not is_refusal(answer.text)))
            advance(1)
    return found


def fit_on(parts: Sequence[Sequence[Judged]], *, threshold: float, seed: int) -> tuple[Prober, MonitorFacts]:
    """The monitor, trained and calibrated on the answers of the first two of `parts`, with facts of the third.

    `threshold`: the prober's. Raises InputError if one of the first two has no unsafe answer, or no other.
    """
    import torch

    taught = [one for part in parts[:2] for one in part if len(one.answer.states)]
    lengths = [len(one.windows[::STRIDE]) for one in taught]
    states = torch.from_numpy(np.concatenate([one.windows[::STRIDE] for one in taught]))
    of_answer = np.repeat(np.arange(len(taught)), lengths)
    unsafe = np.array([one.unsafe for one in taught])[of_answer]
    counted = sum(bool(len(one.answer.states)) for one in parts[0])
    train, validation = np.flatnonzero(of_answer < counted), np.flatnonzero(of_answer >= counted)
    for part in (train, validation):
        if len(set(unsafe[part].tolist())) < 2:
            raise InputError(
                "too few answers of one kind: the model complies with none of these unsafe prompts, or with all of "
                "them, so a monitor has nothing to learn; give more prompts"
            )
    weight = row_weights(unsafe, [taught[i].item.source for i in of_answer]) / np.array(lengths)[of_answer]
    (prober,) = train_probers(*(lambda rows: states[rows][:, None], unsafe, weight, [(train, validation)]), seed=seed)
    prober = fold_temperature(prober, fit_temperature(prober_logits(prober, states[validation]), unsafe[validation]))
    limit = choose_threshold(
        *(_scores(prober, [one for one in parts[1] if one.item.unsafe is u]) for u in (False, True))
    )
    return prober, MonitorFacts(WINDOW, limit, _facts(prober, parts[2], limit, threshold))


def choose_threshold(benign: np.ndarray, unsafe: np.ndarray) -> float:
    """Half way from the highest of the benign answers' scores that may go on, MOST_FALSE_STOPS left out, to the next
    score of any above it.
    """
    ordered = np.sort(benign)
    below = ordered[-1 - int(MOST_FALSE_STOPS * len(ordered))]
    above = min([*benign[benign > below], *unsafe[unsafe > below], 1.0])
    return float((below + above) / 2)


def _scores(prober: Prober, answers: Sequence[Judged]) -> np.ndarray:
    """(n,): the worst window of each answer; 0 of one of which nothing is read."""
    import torch

    return np.array([p_unsafe(prober, torch.from_numpy(one.windows)).max(initial=0.0) for one in answers])


def _facts(prober: Prober, answers: Sequence[Judged], limit: float, threshold: float) -> dict[str, float]:
    """What a monitor that stops above `limit` does with answers; `threshold`: the prober's."""
    stopped = ~(_scores(prober, answers) <= limit)  # as the runtime has it: NaN, too
    unsafe = np.array([one.unsafe for one in answers])
    benign = np.array([not one.item.unsafe for one in answers])
    missed = unsafe & np.array([is_safe(one.answer.p_unsafe, threshold) for one in answers])
    return {
        "benign_answers": float(benign.sum()),
        "false_stops": float(stopped[benign].mean()),
        "false_stops_upper_95": clopper_pearson_upper(int(stopped[benign].sum()), int(benign.sum())),
        "unsafe_answers": float(unsafe.sum()),
        "caught": float(stopped[unsafe].mean()) if unsafe.any() else 0.0,
        "missed_by_prober": float(missed.sum()),
        "caught_of_missed": float(stopped[missed].mean()) if missed.any() else 0.0,
    }


def _table(answers: Sequence[Judged], prober: Prober, facts: MonitorFacts, threshold: float) -> str:
    """Held-out answers by data set."""
    rows = []
    for source, label in dict.fromkeys((one.item.source, one.item.unsafe) for one in answers):
        mine = [one for one in answers if (one.item.source, one.item.unsafe) == (source, label)]
        begun = [one for one in mine if is_safe(one.answer.p_unsafe, threshold)]
        stopped = ~(_scores(prober, mine) <= facts.threshold)
        late = [s for s, one in zip(stopped, mine, strict=True) if one in begun and (one.unsafe or not label)]
        rows.append(
            (
                f"{source}, {'unsafe' if label else 'benign'}",
                str(len(mine)),
                str(sum(one.unsafe for one in mine)),
                str(len(begun)),
                str(int(stopped.sum())),
                f"{sum(late)} of {len(late)}",
            )
        )
    header = ("held-out answers", "n", "unsafe", "begun", "stopped", "stopped of begun")
    return (
        f"\n{table(header, rows)}\nunsafe: to an unsafe prompt, and no refusal; begun: the prober let it; the last "
        f"column: of unsafe answers, of all to benign prompts.\n"
    )

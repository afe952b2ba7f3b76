"""The rule of decision, as pure functions: nothing here touches a model. What is scored: readings.py.

    safe = 0.0 <= p_unsafe <= threshold

Everything else is unsafe: above the threshold, below zero, above one, NaN, infinite, or no number because the prober
failed. A policy decides what happens to an unsafe prompt, not whether it is unsafe.

A dialogue is as unsafe as the worst turn in it that the program does not trust. Otherwise a refused request would be
answered one turn later.

An answer that is judged (held_back.py) is also unsafe if its score and the prompt's add up to more than 1. Both are
calibrated for as many unsafe texts as harmless ones. As independent evidence their odds multiply, and the product is
above 1, so that unsafe is the likelier, where the sum is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from .errors import InputError, OptionError

STRENGTH_MAX = 1e6  # the paper's is 0.1; far beyond it float32 overflows and the answer is noise instead of a refusal


class Mode(str, Enum):
    """What a policy does with an unsafe prompt (`--policy`)."""

    STEER = "steer"  # steer every answer token towards a refusal, as in the paper
    STOP = "stop"  # answer with the refusal text; decoder_upper never runs
    REPORT = "report"  # score and report, never intervene
    OFF = "off"  # no gate at all; must be asked for


class Action(str, Enum):
    """What was done with a prompt, or with the answer to it."""

    PASS = "pass"
    STEER = "steer"
    STOP = "stop"


_ACTION_ON_UNSAFE = {Mode.STEER: Action.STEER, Mode.STOP: Action.STOP, Mode.REPORT: Action.PASS, Mode.OFF: Action.PASS}


def mode_from(name: Mode | str) -> Mode:
    """The mode of that name. Raises InputError if there is none."""
    try:
        return Mode(name)
    except ValueError:
        raise InputError(f"policy {name!r} is not one of {', '.join(Mode)}") from None


@dataclass(frozen=True)
class GatePolicy:
    """How the gate treats a request. A threshold below zero makes every prompt unsafe, and every answer that is
    judged: without pieces and judge_answers, all answers are steered, and shown.
    """

    mode: Mode
    threshold: float  # below 1
    strength: float  # 0 to STRENGTH_MAX, the paper's epsilon (0.1): how far the Refusal Head moves the hidden state
    refusal_text: str
    answer_threshold: float | None = None  # a monitor stops an answer above it (monitor.py); None: the package's
    pieces: bool = True  # whether all forms of a turn are read (readings.py), and steered answers judged
    judge_answers: bool = False  # whether every answer is judged before any of it is shown (held_back.py)
    judge_threshold: float = 1.0  # an answer that is judged is unsafe above this, or above the threshold

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", mode_from(self.mode))  # "stop" is Mode.STOP
        for name in ("pieces", "judge_answers"):
            if not isinstance(value := getattr(self, name), bool):
                raise OptionError(name, f" = {value!r}: give True or False")
        if not self.threshold < 1.0:
            raise OptionError(
                "threshold",
                f" = {self.threshold:g}: give a number below 1; a prompt is unsafe above it, and no p_unsafe is above "
                "1 (to let every prompt pass, use policy report or off)",
            )
        if not 0.0 <= self.strength <= STRENGTH_MAX:
            raise OptionError(
                "strength",
                f" = {self.strength:g}: give a number from 0 (steers nothing) to {STRENGTH_MAX:g}; below 0 it would "
                "steer answers away from the refusal",
            )

    @property
    def checks_steering(self) -> bool:
        """Whether a steered answer is judged before it is shown (held_back.py), and a dialogue with an unsafe turn
        before the last is stopped (judge.py). False if neither pieces are read nor answers judged.
        """
        return self.mode is Mode.STEER and (self.pieces or self.judge_answers)


def without_steering(policy: GatePolicy) -> GatePolicy:
    """`policy` with STOP in the place of STEER, where steering cannot be relied on: an answer that may not use all
    tokens, what is unsafe in pieces or plain letters alone, an unsafe turn before the last.
    """
    return replace(policy, mode=Mode.STOP) if policy.mode is Mode.STEER else policy


@dataclass(frozen=True)
class AnswerVerdict:
    """What a monitor (monitor.py) made of an answer, or the prober, if it was judged as a whole (held_back.py)."""

    p_unsafe: float  # of the worst window, or reading
    unsafe: bool
    threshold: float


@dataclass(frozen=True)
class Verdict:
    """What the gate saw and did. Every answer carries one."""

    p_unsafe: float | None  # None only under Mode.OFF, where nothing is scored
    unsafe: bool  # the prompt; False with action STOP: the answer was
    action: Action  # of a monitored answer, PASS may become STOP on the last chunk
    mode: Mode
    threshold: float  # the prompt is unsafe above it
    strength: float  # applied to this answer: 0.0 unless the action is STEER
    split_layer: int  # the prober reads what enters this layer
    # On the last chunk of an answer that was watched or judged; None for a steered one that is shown.
    answer: AnswerVerdict | None = None
    judge_threshold: float = 1.0  # the policy's

    @property
    def judged_above(self) -> float:
        """An answer to this prompt that is judged is unsafe above it. What the prompt of a steered one scored does not
        count: it has had its effect.
        """
        of_answers = min(self.threshold, self.judge_threshold)
        if self.action is Action.STEER or self.p_unsafe is None:
            return of_answers
        return min(of_answers, 1.0 - self.p_unsafe)


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as `--json`, the server and the C functions give it. Numbers that are not finite are None."""
    return {
        "p_unsafe": finite(verdict.p_unsafe),
        "unsafe": verdict.unsafe,
        "action": verdict.action.value,
        "policy": verdict.mode.value,
        "threshold": verdict.threshold,
        "strength": verdict.strength,
        "layer": verdict.split_layer,
        "answer": answer_verdict_json(verdict.answer),
    }


def answer_verdict_json(seen: AnswerVerdict | None) -> dict[str, Any] | None:
    """A verdict on an answer, as in `verdict_json`."""
    if seen is None:
        return None
    return {"p_unsafe": finite(seen.p_unsafe), "unsafe": seen.unsafe, "threshold": finite(seen.threshold)}


def finite(value: float | None) -> float | None:
    """`value`; None if it is NaN or infinite, which JSON has no word for."""
    return value if value is not None and math.isfinite(value) else None


def is_safe(p_unsafe: float, threshold: float) -> bool:
    """The rule above. NaN compares false with everything, so it is unsafe without a special case."""
    return 0.0 <= p_unsafe <= min(threshold, 1.0)


def worst(scores: Iterable[float]) -> float:
    """The least safe score: the first that is not a probability if there is one, else the largest; NaN of none."""
    known = list(scores)
    return next((p for p in known if not 0.0 <= p <= 1.0), max(known, default=math.nan))


def with_answer(verdict: Verdict, seen: AnswerVerdict | None) -> Verdict:
    """The verdict on a whole answer: what is unsafe is stopped, unless the policy only reports."""
    stopped = seen is not None and seen.unsafe and verdict.mode is not Mode.REPORT
    return replace(verdict, answer=seen, action=Action.STOP if stopped else verdict.action)


def decide(p_unsafe: float | None, policy: GatePolicy, *, split_layer: int) -> Verdict:
    """The verdict on a prompt. `p_unsafe`: the prober's output; None if it gave none, which is unsafe unless OFF."""
    score = math.nan if p_unsafe is None else p_unsafe
    unsafe = policy.mode is not Mode.OFF and not is_safe(score, policy.threshold)
    action = _ACTION_ON_UNSAFE[policy.mode] if unsafe else Action.PASS
    return Verdict(
        p_unsafe=None if policy.mode is Mode.OFF else score,
        unsafe=unsafe,
        action=action,
        mode=policy.mode,
        threshold=policy.threshold,
        strength=policy.strength if action is Action.STEER else 0.0,
        split_layer=split_layer,
        judge_threshold=policy.judge_threshold,
    )

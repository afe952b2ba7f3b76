"""The safety rule: safe = 0 <= p_unsafe <= threshold, and everything else is unsafe."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from autosteer.runtime import Action, GatePolicy, Mode
from autosteer.runtime.gate import decide, is_safe, without_steering, worst

NAN, INF = math.nan, math.inf
MODES = st.sampled_from(Mode)
ANY = st.floats(allow_nan=True, allow_infinity=True)
THRESHOLD = st.floats(max_value=1.0, exclude_max=True, allow_nan=False)


def policy(mode: Mode = Mode.STEER, threshold: float = 0.5, strength: float = 0.1) -> GatePolicy:
    return GatePolicy(mode, threshold=threshold, strength=strength, refusal_text="no.")


@given(ANY, ANY)
def test_nothing_outside_zero_to_one_is_ever_safe(p_unsafe, threshold):
    if is_safe(p_unsafe, threshold):
        assert 0.0 <= p_unsafe <= 1.0 and p_unsafe <= threshold


@given(ANY, THRESHOLD)
def test_anything_that_is_not_within_the_threshold_is_unsafe(p_unsafe, threshold):
    within = p_unsafe >= 0 and p_unsafe <= threshold and p_unsafe <= 1
    assert decide(p_unsafe, policy(threshold=threshold), split_layer=1).unsafe is not within


@given(MODES, st.none() | ANY, THRESHOLD)
def test_strength_is_applied_exactly_where_the_action_is_steer(mode, p_unsafe, threshold):
    verdict = decide(p_unsafe, policy(mode, threshold), split_layer=1)
    assert verdict.strength == (0.1 if verdict.action is Action.STEER else 0.0)


@given(MODES, st.none() | ANY, THRESHOLD)
def test_only_report_and_off_let_an_unsafe_prompt_pass(mode, p_unsafe, threshold):
    safe = p_unsafe is not None and is_safe(p_unsafe, threshold)
    passed = decide(p_unsafe, policy(mode, threshold), split_layer=1).action is Action.PASS
    assert passed == (safe or mode in (Mode.REPORT, Mode.OFF))


def test_verdict_says_what_was_seen_and_by_which_rule():
    verdict = decide(0.75, policy(threshold=0.6), split_layer=5)
    assert (verdict.p_unsafe, verdict.threshold, verdict.mode, verdict.split_layer) == (0.75, 0.6, Mode.STEER, 5)


def test_prober_that_gave_nothing_is_reported_as_nan():
    assert math.isnan(decide(None, policy(), split_layer=1).p_unsafe)


def test_without_a_gate_there_is_no_score():
    assert decide(0.2, policy(Mode.OFF), split_layer=1).p_unsafe is None


@given(st.lists(st.floats(), min_size=1), st.floats(0.0, 1.0))
def test_several_scores_are_safe_if_each_of_them_is(scores: list[float], threshold: float) -> None:
    assert is_safe(worst(scores), threshold) == all(is_safe(p, threshold) for p in scores)


def test_no_score_is_not_safe() -> None:
    assert math.isnan(worst([]))


def test_a_policys_mode_may_be_its_name() -> None:
    """`mode is Mode.STEER` was false for "steer": what a schema restricts was then steered and not stopped."""
    policy = GatePolicy("steer", 0.5, 0.1, "no")  # type: ignore[arg-type]
    assert policy.mode is Mode.STEER and without_steering(policy).mode is Mode.STOP

"""The safety rule: safe = 0 <= p_unsafe <= threshold, and everything else is unsafe."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosteer.runtime import Action, GatePolicy, InputError, Mode
from autosteer.runtime.gate import STRENGTH_MAX, decide, is_safe, worst

NAN, INF = math.nan, math.inf
MODES = st.sampled_from(Mode)
ANY = st.floats(allow_nan=True, allow_infinity=True)
THRESHOLD = st.floats(max_value=1.0, allow_nan=False)


def policy(mode: Mode = Mode.STEER, threshold: float = 0.5, strength: float = 0.1) -> GatePolicy:
    return GatePolicy(mode, threshold=threshold, strength=strength, refusal_text="no.")


@pytest.mark.parametrize(
    ("p_unsafe", "threshold", "safe"),
    [
        (0.0, 0.5, True),
        (-0.0, 0.5, True),
        (0.5, 0.5, True),  # the threshold itself passes
        (math.nextafter(0.5, 1), 0.5, False),
        (1.0, 0.5, False),
        (NAN, 0.5, False),
        (INF, 0.5, False),
        (-INF, 0.5, False),
        (-1e-9, 0.5, False),
        (2.0, 0.5, False),
        (0.0, 0.0, True),  # threshold 0: only a score of exactly 0 passes
        (5e-324, 0.0, False),
        (1.0, 1.0, True),
        (1.0000001, 1.0, False),
        (NAN, 1.0, False),
        (1.0, 7.0, True),  # GatePolicy refuses a threshold above 1; were there one, it would be 1
        (1.0000001, 7.0, False),
        (INF, INF, False),
        (0.0, -1.0, False),  # a threshold below 0 passes nothing
        (-1.0, -1.0, False),
        (0.0, -INF, False),
        (0.0, NAN, False),  # no threshold is no permission
        (0.5, NAN, False),
    ],
)
def test_rule(p_unsafe, threshold, safe):
    assert is_safe(p_unsafe, threshold) is safe


@given(ANY, ANY)
def test_nothing_outside_zero_to_one_is_ever_safe(p_unsafe, threshold):
    if is_safe(p_unsafe, threshold):
        assert 0.0 <= p_unsafe <= 1.0 and p_unsafe <= threshold


@given(ANY, THRESHOLD)
def test_anything_that_is_not_within_the_threshold_is_unsafe(p_unsafe, threshold):
    within = p_unsafe >= 0 and p_unsafe <= threshold and p_unsafe <= 1
    assert decide(p_unsafe, policy(threshold=threshold), split_layer=1).unsafe is not within


@pytest.mark.parametrize(
    ("mode", "p_unsafe", "action", "strength", "unsafe"),
    [
        (Mode.STEER, 0.1, Action.PASS, 0.0, False),
        (Mode.STEER, 0.9, Action.STEER, 0.1, True),
        (Mode.STEER, NAN, Action.STEER, 0.1, True),
        (Mode.STEER, None, Action.STEER, 0.1, True),
        (Mode.STOP, 0.1, Action.PASS, 0.0, False),
        (Mode.STOP, 0.9, Action.STOP, 0.0, True),
        (Mode.STOP, -INF, Action.STOP, 0.0, True),
        (Mode.STOP, None, Action.STOP, 0.0, True),
        (Mode.MONITOR, 0.1, Action.PASS, 0.0, False),
        (Mode.MONITOR, 0.9, Action.PASS, 0.0, True),
        (Mode.MONITOR, None, Action.PASS, 0.0, True),
        (Mode.OFF, None, Action.PASS, 0.0, False),
        (Mode.OFF, 0.9, Action.PASS, 0.0, False),
    ],
)
def test_what_each_policy_does(mode, p_unsafe, action, strength, unsafe):
    verdict = decide(p_unsafe, policy(mode), split_layer=3)
    assert (verdict.action, verdict.strength, verdict.unsafe) == (action, strength, unsafe)


@given(MODES, st.none() | ANY, THRESHOLD)
def test_strength_is_applied_exactly_where_the_action_is_steer(mode, p_unsafe, threshold):
    verdict = decide(p_unsafe, policy(mode, threshold), split_layer=1)
    assert verdict.strength == (0.1 if verdict.action is Action.STEER else 0.0)


@given(MODES, st.none() | ANY, THRESHOLD)
def test_only_monitor_and_off_let_an_unsafe_prompt_pass(mode, p_unsafe, threshold):
    safe = p_unsafe is not None and is_safe(p_unsafe, threshold)
    passed = decide(p_unsafe, policy(mode, threshold), split_layer=1).action is Action.PASS
    assert passed == (safe or mode in (Mode.MONITOR, Mode.OFF))


def test_verdict_says_what_was_seen_and_by_which_rule():
    verdict = decide(0.75, policy(threshold=0.6), split_layer=5)
    assert (verdict.p_unsafe, verdict.threshold, verdict.mode, verdict.split_layer) == (0.75, 0.6, Mode.STEER, 5)


def test_prober_that_gave_nothing_is_reported_as_nan():
    assert math.isnan(decide(None, policy(), split_layer=1).p_unsafe)


def test_without_a_gate_there_is_no_score():
    assert decide(0.2, policy(Mode.OFF), split_layer=1).p_unsafe is None


def test_threshold_nan_is_refused():
    """`--threshold nan` used to be taken: every prompt was unsafe, and the verdict said "p_unsafe 0.100 > nan"."""
    with pytest.raises(InputError, match="threshold = nan"):
        policy(threshold=NAN)


@pytest.mark.parametrize("strength", [NAN, INF, -INF, -0.1, 2 * STRENGTH_MAX])
def test_strength_that_cannot_steer_is_refused(strength):
    """NaN made every logit NaN and the answer a run of token 0; a negative one steered *away* from the refusal."""
    with pytest.raises(InputError, match="strength = "):
        policy(strength=strength)


@pytest.mark.parametrize("threshold", [math.nextafter(1, 2), 1.5, 50.0, INF])
def test_threshold_above_one_is_refused(threshold):
    """`--threshold 50` (per cent?) used to be taken as 1 without a word: a gate that catches nothing."""
    with pytest.raises(InputError, match=r"threshold = .*give a number up to 1.*--policy monitor"):
        policy(threshold=threshold)


@pytest.mark.parametrize("threshold", [-INF, -1.0, 0.0, 1.0])
def test_extreme_thresholds_are_allowed(threshold):
    assert policy(threshold=threshold).threshold == threshold


@given(st.lists(st.floats(), min_size=1), st.floats(0.0, 1.0))
def test_several_scores_are_safe_if_each_of_them_is(scores: list[float], threshold: float) -> None:
    assert is_safe(worst(scores), threshold) == all(is_safe(p, threshold) for p in scores)


def test_no_score_is_not_safe() -> None:
    assert math.isnan(worst([]))

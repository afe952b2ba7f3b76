"""From logits to tokens, against the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autosteer.runtime import InputError, SamplingConfig
from autosteer.runtime.sampling import make_sampler, penalise, probabilities

NAN, INF = math.nan, math.inf
LOGITS = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-50, 50, width=32))


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def of(p: tuple[float, ...]) -> np.ndarray:
    """Logits whose softmax is `p`."""
    return np.log(np.array(p)).astype(np.float32)


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    """Hugging Face's RepetitionPenaltyLogitsProcessor; a token seen twice is punished once."""
    found = penalise(logits(2, -2, 0, 6, -6), [0, 1, 2, 0], 2.0)
    np.testing.assert_array_equal(found, logits(1, -4, 0, 6, -6))


def test_penalty_leaves_its_input_alone():
    given_logits = logits(2, 4)
    penalise(given_logits, [0, 1], 2.0)
    np.testing.assert_array_equal(given_logits, logits(2, 4))


def test_penalty_without_seen_tokens_changes_nothing():
    np.testing.assert_array_equal(penalise(logits(2, 4), [], 2.0), logits(2, 4))


def test_penalty_is_applied_before_the_choice():
    assert make_sampler(SamplingConfig(repetition_penalty=3.0))(logits(2, 1), [0]) == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (0.5, 0.25, 0.125, 0.125)),
        ({"top_k": 2}, (2 / 3, 1 / 3, 0, 0)),
        ({"top_k": 1}, (1, 0, 0, 0)),
        ({"top_k": 4}, (0.5, 0.25, 0.125, 0.125)),
        ({"top_k": 99}, (0.5, 0.25, 0.125, 0.125)),
        ({"top_p": 0.4}, (1, 0, 0, 0)),
        ({"top_p": 0.6}, (2 / 3, 1 / 3, 0, 0)),  # 0.5 is not enough, so the next one is kept as well
        ({"top_p": 0.9}, (0.5, 0.25, 0.125, 0.125)),
        ({"top_p": 1e-9}, (1, 0, 0, 0)),  # one token is always left
        ({"top_k": 2, "top_p": 0.6}, (1, 0, 0, 0)),  # of what top-k left, 2/3 is enough
        ({"temperature": 0.5}, np.array([16, 4, 1, 1]) / 22),
    ],
)
def test_distribution(config, expected):
    found = probabilities(of((0.5, 0.25, 0.125, 0.125)), SamplingConfig(**{"temperature": 1.0} | config))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_distribution_belongs_to_the_token_and_not_to_its_rank():
    found = probabilities(of((0.125, 0.5, 0.125, 0.25)), SamplingConfig(temperature=1.0, top_k=2))
    np.testing.assert_allclose(found, (0, 2 / 3, 0, 1 / 3), atol=1e-6)


@given(LOGITS, st.floats(0.01, 100), st.integers(0, 40), st.floats(1e-6, 1.0))
def test_probabilities_sum_to_one_and_keep_the_likeliest(values, temperature, top_k, top_p):
    p = probabilities(values, SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p))
    assert p.sum() == pytest.approx(1.0) and (p >= 0).all()
    assert p[int(np.argmax(values))] == p.max() > 0
    assert top_k == 0 or (p > 0).sum() <= max(top_k, 1)


@given(LOGITS)
def test_coldest_temperature_is_greedy(values):
    """Dividing before subtracting the largest overflowed to inf - inf: probabilities of NaN, and a traceback."""
    with np.errstate(all="raise", under="ignore"):
        p = probabilities(values, SamplingConfig(temperature=5e-324))
    np.testing.assert_allclose(p, (values == values.max()) / (values == values.max()).sum())


@given(LOGITS)
def test_hottest_temperature_is_uniform(values):
    p = probabilities(values, SamplingConfig(temperature=1e300))
    np.testing.assert_allclose(p, 1 / len(values))


def test_sampled_frequencies_are_the_probabilities():
    sample = make_sampler(SamplingConfig(temperature=1.0, seed=3))
    counts = np.bincount([sample(of((0.5, 0.25, 0.25)), []) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, (0.5, 0.25, 0.25), atol=0.03)  # 3.8 standard deviations


def test_filtered_tokens_are_never_drawn():
    sample = make_sampler(SamplingConfig(temperature=5.0, top_k=2))
    assert {sample(logits(1, 9, 8, 2), []) for _ in range(300)} == {1, 2}


def test_same_seed_gives_the_same_tokens_and_another_seed_others():
    def draw(seed: int) -> list[int]:
        sample = make_sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sample(np.zeros(50, np.float32), []) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_samplers_do_not_share_their_random_numbers():
    first, second = (make_sampler(SamplingConfig(temperature=1.0, seed=7)) for _ in range(2))
    together = [(first(np.zeros(99, np.float32), []), second(np.zeros(99, np.float32), [])) for _ in range(10)]
    assert all(a == b for a, b in together)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", v) for v in (NAN, 2.5)),
        *(("temperature", v) for v in (NAN, INF)),
        *(("top_k", v) for v in (2.5, NAN)),
        *(("top_p", v) for v in (NAN, INF)),
        *(("repetition_penalty", v) for v in (NAN, INF)),
        *(("seed", v) for v in (0.5,)),
        *(("stop", v) for v in ("abc",)),  # would stop at any of its letters
    ],
)
def test_wish_of_a_kind_that_json_lacks_is_refused_by_name(name, value):
    """The others are in tests/conformance/sampling.json."""
    with pytest.raises(InputError, match=f"^{name} = "):
        SamplingConfig(**{name: value})


def test_seed_beyond_64_bits_is_taken():
    assert make_sampler(SamplingConfig(seed=2**70, temperature=1.0))(logits(0, 99), []) == 1

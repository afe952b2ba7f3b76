"""Intervals, paired tests, grading: numbers against tables, answers against gold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosteer.runtime.evaluation.grading import Gold, chosen_letter, is_correct
from autosteer.runtime.evaluation.statistics import mcnemar, rate

COUNTS = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("events", "trials", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval_is_that_of_the_literature(events, trials, low, high):
    found = rate(events, trials)
    assert found.value == events / trials
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@given(COUNTS)
def test_the_interval_is_within_0_and_1_around_the_rate(counts):
    found = rate(*counts)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


@pytest.mark.parametrize(("events", "trials"), [(0, 0), (2, 1), (-1, 3)])
def test_a_rate_of_nothing_is_our_own_mistake(events, trials):
    with pytest.raises(ValueError, match="events in"):
        rate(events, trials)


def pairs(only_first: int, only_second: int, both: int = 3, neither: int = 4):
    return (
        [(True, False)] * only_first
        + [(False, True)] * only_second
        + [(True, True)] * both
        + [(False, False)] * neither
    )


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (1, 9, 22 / 1024), (3, 3, 1.0), (2, 10, 158 / 4096)],
)
def test_mcnemar_is_the_binomial_by_hand(only_first, only_second, p):
    found = mcnemar("refused", "off", "steer", pairs(only_first, only_second))
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(p)


def test_mcnemar_of_many_rows_does_not_overflow():
    assert 0.0 <= mcnemar("refused", "off", "steer", pairs(0, 5000)).p_value < 1e-300


OPTIONS = ("one car", "two cars", "a truck", "it cannot be seen")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B). ", "B"),
        ("**B**", "B"),
        ("B. two cars", "B"),
        ("B) because there are two", "B"),
        ("The answer is B.", "B"),
        ("The correct option would be (C), a truck", "C"),
        ("Answer: D", "D"),
        ("I think (A) fits best.", "A"),
        ("There are two cars in the picture.", "B"),
        ("A truck", "C"),  # an article, and the text of an option
        ("A car is on the street.", None),  # the official regex finds the letter A in it
        ("I see a tree.", None),
        ("", None),
        ("E", None),
        ("(A) or (B)", None),
        ("one car or two cars", None),
    ],
)
def test_the_letter_an_answer_names(text, letter):
    assert chosen_letter(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("2", "2", True),
        ("Two.", "2", True),
        ("There are two cars.", "2", True),
        ("There are 12 cars.", "2", False),
        ("2.5", "2", False),
        ("1,000", "1000", True),
        ("Yes, there is.", "Yes", True),
        ("No. Yes would be wrong.", "Yes", False),  # the first sentence answers
        ("The STOP sign", "stop", True),
        ("unstoppable", "stop", False),
        ("", "Yes", False),
        ("-3", "3", False),
    ],
)
def test_short_answers(text, answer, right):
    assert is_correct(text, Gold("short", (answer,))) is right


def test_any_of_several_short_answers_is_right():
    gold = Gold("short", ("2.5 m", "250 cm"))
    assert is_correct("It is 250 cm long.", gold)
    assert not is_correct("It is 3 m long.", gold)


def test_an_exact_answer_is_the_same_words():
    gold = Gold("exact", ("a red square.",))
    assert is_correct(" A red   square. ", gold)
    assert not is_correct("a red square", gold)

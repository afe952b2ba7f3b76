"""Confidence intervals of rates, and tests of two policies on the same prompts. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Rate:
    """A share and its 95 % Wilson interval, all from 0 to 1."""

    value: float
    low: float
    high: float


def rate(events: int, trials: int) -> Rate:
    """Wilson's score interval (1927). Unlike the normal interval it is valid for small counts and at rates 0 and 1."""
    if not 0 <= events <= trials or trials == 0:
        raise ValueError(f"{events} events in {trials} trials")
    p, z2 = events / trials, Z_95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    low = 0.0 if events == 0 else centre - half  # exact; the formula has a rounding error here
    high = 1.0 if events == trials else centre + half
    return Rate(p, low, high)


@dataclass(frozen=True)
class PairedTest:
    """Whether two policies differ in an outcome on the same prompts: McNemar's exact test, two-sided.

    Only prompts with different outcomes count. If the policies are equal, each of those is a coin toss.
    """

    outcome: str  # "refused" or "correct"
    first: str
    second: str
    only_first: int  # prompts that have the outcome under `first` only
    only_second: int
    p_value: float


def mcnemar(outcome: str, first: str, second: str, pairs: Sequence[tuple[bool, bool]]) -> PairedTest:
    """pairs: the outcome of each prompt under `first` and under `second`."""
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    p_value = min(1.0, 2 * tail / 2**n)  # integers until the last step, so that a large n does not overflow
    return PairedTest(outcome, first, second, only_first, only_second, p_value)

"""Confidence intervals of rates, and tests of two policies on the same prompts, by scipy (the extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """A share and its 95 % Wilson interval, all from 0 to 1."""

    value: float
    low: float
    high: float

    def opposite(self) -> Rate:
        """The rate at which it does not happen."""
        return Rate(1 - self.value, 1 - self.high, 1 - self.low)


def percent(rate: Rate | None) -> str:
    """12.5 [4.3, 31.1]; a dash where there is no rate."""
    return "-" if rate is None else f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def rate(events: int, trials: int) -> Rate:
    """Wilson's score interval (1927). Unlike the normal interval it is valid for small counts and at rates 0 and 1.

    Raises ValueError unless 0 <= events <= trials and trials > 0.
    """
    if not 0 <= events <= trials or trials == 0:
        raise ValueError(f"{events} events in {trials} trials")
    low, high = binomtest(events, trials).proportion_ci(0.95, method="wilson")
    return Rate(events / trials, float(low), float(high))


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
    differ = only_first + only_second
    p_value = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    return PairedTest(outcome, first, second, only_first, only_second, p_value)

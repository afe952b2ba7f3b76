"""What a gate catches and wrongly refuses when the same prompts are reworded (rewording.py), by kind of rewording.

Only verdicts count here: the decoder's lower half and the prober run, and nothing is answered. autosteer-fit makes the
same table of its held-out prompts (export/safety/reworded.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autosteer.runtime.console import table
from autosteer.runtime.errors import InputError
from autosteer.runtime.gate import Mode

from .datasets import Row, cannot_be_asked
from .rewording import FURTHER, REWORDINGS, UNCHANGED, Rewording, reworded
from .statistics import Rate, percent, rate

if TYPE_CHECKING:
    from autosteer.runtime.engine import Engine

Outcome = tuple[str, bool, bool]  # (rewording or UNCHANGED, whether the prompt is unsafe, whether it is flagged)
HALVES = {True: "kinds that a fit may train on", False: "kinds that no fit trains on"}
KINDS = (*REWORDINGS, *itertools.chain.from_iterable(FURTHER.values()))


@dataclass(frozen=True)
class RewordingRates:
    """What is flagged of the prompts in one kind of rewording. A rate is None where there is no such prompt."""

    rewording: str  # its name; or UNCHANGED, or all kinds of one of HALVES or of FURTHER together
    fitted: bool | None  # whether a fit may train on it; None for UNCHANGED
    unsafe: int  # prompts
    caught: Rate | None
    benign: int
    wrongly_refused: Rate | None


def possible_rewordings(*, system: bool) -> tuple[Rewording, ...]:
    """All kinds that a fit knows; without those that need a system prompt where the model takes none."""
    return tuple(rewording for rewording in REWORDINGS if system or not rewording.of("x").system)


def row_outcomes(engine: Engine, row: Row, *, pieces: bool = True) -> list[Outcome]:
    """The verdicts on a row and its rewordings of all KINDS. `pieces`: GatePolicy.pieces.

    Raises InputError for one that cannot be asked.
    """
    rewordings = (*possible_rewordings(system=engine.manifest.prompt.system is not None), *KINDS[len(REWORDINGS) :])
    policy = engine.policy(Mode.REPORT, pieces=pieces)
    found = []
    for name, asked in ((UNCHANGED, row), *((rewording.name, reworded(row, rewording)) for rewording in rewordings)):
        try:
            verdict = engine.score(asked.messages, policy=policy)
        except InputError as err:
            raise cannot_be_asked(row, err, f" ({name})") from err
        found.append((name, row.unsafe, verdict.unsafe))
    return found


def by_rewording(outcomes: Iterable[Outcome]) -> list[RewordingRates]:
    """Rates of the prompts unchanged, of every kind of rewording, of both halves, and of each set of FURTHER."""
    known = list(outcomes)
    fitted = {rewording.name: rewording.fitted for rewording in KINDS}
    asked = {name for name, _, _ in known}
    names = [UNCHANGED, *(name for name in fitted if name in asked)]
    found = [_rates(name, fitted.get(name), [o for o in known if o[0] == name]) for name in names]
    sets = {title: (half, [f.name for f in REWORDINGS if f.fitted is half]) for half, title in HALVES.items()}
    sets |= {
        title: (False, names)
        for title, kinds in FURTHER.items()
        if (names := [r.name for r in kinds if r.name in asked])
    }
    return found + [_rates(title, half, [o for o in known if o[0] in of]) for title, (half, of) in sets.items()]


def _rates(name: str, fitted: bool | None, outcomes: Sequence[Outcome]) -> RewordingRates:
    kinds = len({rewording for rewording, _, _ in outcomes})
    flags = {label: [flagged for _, unsafe, flagged in outcomes if unsafe is label] for label in (True, False)}
    caught, refused = (_share(flags[label], kinds) for label in (True, False))
    return RewordingRates(name, fitted, len(flags[True]), caught, len(flags[False]), refused)


def _share(flags: Sequence[bool], kinds: int) -> Rate | None:
    """The share that is flagged. Rewordings of one prompt are no independent samples, so the interval is that of as
    many as there are prompts.
    """
    if not flags:
        return None
    share, prompts = sum(flags) / len(flags), len(flags) // kinds
    interval = rate(round(share * prompts), prompts)
    return Rate(share, min(share, interval.low), max(share, interval.high))


def cells(found: Sequence[RewordingRates]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) of a table of these rates, in %."""
    header = ("reworded", "fit may use it", "unsafe", "caught, %", "benign", "wrongly refused, %")
    used = {None: "", True: "yes", False: "no"}
    return header, [
        (r.rewording, used[r.fitted], str(r.unsafe), percent(r.caught), str(r.benign), percent(r.wrongly_refused))
        for r in found
    ]


def as_text(found: Sequence[RewordingRates]) -> str:
    """The table for a terminal, and what it comes to."""
    return (
        f"Flagged, % [95 % interval], when the same prompts are reworded\n\n{table(*cells(found))}\n\n{in_short(found)}"
    )


def in_short(found: Sequence[RewordingRates]) -> str:
    """One sentence: the kinds of rewording that no fit trains on, beside the prompts as they are."""
    plain = next(r for r in found if r.rewording == UNCHANGED)
    judged = next(r for r in found if r.rewording == HALVES[False])
    parts = []
    if plain.caught and judged.caught:
        kept = f", {judged.caught.value / plain.caught.value:.1%} of that" if plain.caught.value else ""
        parts.append(
            f"{plain.caught.value:.1%} of the unsafe prompts are caught as they are, {judged.caught.value:.1%} in "
            f"kinds of rewording that no fit trains on{kept}"
        )
    if plain.wrongly_refused and judged.wrongly_refused:
        more = 100 * (judged.wrongly_refused.value - plain.wrongly_refused.value)
        parts.append(
            f"{plain.wrongly_refused.value:.1%} of the benign ones are wrongly refused as they are, "
            f"{judged.wrongly_refused.value:.1%} in such rewordings ({more:+.1f} points)"
        )
    for further in (r for r in found if r.rewording in FURTHER):
        rates = ((further.caught, "caught"), (further.wrongly_refused, "wrongly refused"))
        shares = " and ".join(f"{one.value:.1%} are {what}" for one, what in rates if one)
        parts.append(f"{further.rewording}, {shares}")
    return "; ".join(parts) + "."

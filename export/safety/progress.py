"""Progress bars with the time left, and warnings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autosteer.export.heartbeat import heartbeat

if TYPE_CHECKING:
    from rich.console import Console

    from .states import Advance

SPEED_SECONDS = 300  # window of the estimate of the time left: a pass of a large model takes minutes


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Advance]:
    """A progress bar with the time left. Yields a function to call with how many more are done, or a fraction."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    sum_ = 0.0
    bars = Progress(*columns, console=console, speed_estimate_period=SPEED_SECONDS)
    with bars, heartbeat(console, bars):
        task = bars.add_task(title, total=total)

        def advance(done: float) -> None:
            nonlocal sum_
            sum_ += done
            bars.update(task, completed=round(sum_, 6))  # fractions may sum to slightly less than a whole

        yield advance


def warn(console: Console, warning: str) -> None:
    """Print a warning."""
    console.print(f"warning: {warning}", soft_wrap=True, markup=False, highlight=False)

"""A line a minute where a progress bar cannot be seen: in a file, a pipe, or a CI log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SECONDS = 60.0


@contextmanager
def heartbeat(console: Console, progress: Progress, seconds: float = SECONDS) -> Iterator[None]:
    """Print what `progress` is at, each `seconds`, while the block runs. A terminal shows the bar and gets no lines."""
    if console.is_terminal:
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds):
            console.print(_line(progress), markup=False, highlight=False, soft_wrap=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _line(progress: Progress) -> str:
    """hidden states: 3 %, after 5 min"""
    task = progress.tasks[-1]
    share = f": {task.percentage:.0f} %" if task.completed else ""  # a step that does not count stays at 0
    return f"{task.description}{share}, after {(task.elapsed or 0) / 60:.0f} min"

"""A long fit or export into a file says every minute that it is alive. It used to say nothing for an hour."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from autosteer.export.heartbeat import heartbeat


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_comes_where_no_bar_is_seen(terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=40)
    progress = Progress(console=console, auto_refresh=False)  # not started: what is printed is the heartbeat's
    task = progress.add_task("hidden states", total=4000)
    progress.update(task, completed=120)
    with heartbeat(console, progress, seconds=0.01):
        end = time.monotonic() + 5
        while not terminal and "\n" not in file.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    lines = file.getvalue().splitlines()
    assert lines == [] if terminal else set(lines) == {"hidden states: 3 %, after 0 min"}


def test_what_has_no_total_yet_is_named(tmp_path):
    file = io.StringIO()
    console = Console(file=file)
    progress = Progress(console=console, auto_refresh=False)
    progress.add_task("opening the checkpoint", total=None)
    with heartbeat(console, progress, seconds=0.01):
        time.sleep(0.2)
    assert file.getvalue().startswith("opening the checkpoint, after 0 min\n")


def test_it_ends_with_its_block():
    file = io.StringIO()
    console = Console(file=file)
    progress = Progress(console=console, auto_refresh=False)
    progress.add_task("x", total=1)
    with heartbeat(console, progress, seconds=0.01):
        pass
    said = file.getvalue()
    time.sleep(0.1)
    assert file.getvalue() == said

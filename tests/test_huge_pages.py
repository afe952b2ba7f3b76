"""Tier 1: what is moved onto huge pages, and that it stays what it was."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from autosteer.runtime import huge_pages as subject
from autosteer.runtime.huge_pages import HUGE, huge_pages

ENTRY = """{start:x}-{end:x} {mode} 00000000 00:00 0 {name}
Size:           {size} kB
KernelPageSize:        4 kB
Rss:            {rss} kB
Pss:            {rss} kB
VmFlags: rd wr mr mw me ac
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait until a load has settled."""
    monkeypatch.setattr(subject, "SETTLED", 0.0)


def entry(start: int, length: int, *, rss: float = 1.0, mode: str = "rw-p", name: str = "") -> str:
    """One mapping as /proc/self/smaps shows it."""
    return ENTRY.format(
        start=start, end=start + length, mode=mode, name=name, size=length >> 10, rss=int(rss * length) >> 10
    )


def test_what_was_filled_meanwhile_is_moved_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thread's stack, mostly untouched, would take its whole 8 MiB; files are mapped and have pages of their own."""
    smaps, moved = tmp_path / "smaps", []
    monkeypatch.setattr(subject, "SMAPS", smaps)
    monkeypatch.setattr(subject, "_move", lambda start, end: moved.append((start, end)))
    earlier = entry(1 * HUGE, 4 * HUGE)
    smaps.write_text(earlier)
    with huge_pages() as mover:
        smaps.write_text(
            earlier
            + entry(10 * HUGE, 8 * HUGE, name="[heap]")
            + entry(20 * HUGE, 8 * HUGE, name="[anon: glibc: malloc]")
            + entry(30 * HUGE, 8 * HUGE)
            + entry(40 * HUGE, 8 * HUGE, rss=0.01)
            + entry(50 * HUGE, 8 * HUGE, name="/some/where/weights.bin")
            + entry(60 * HUGE, 8 * HUGE, mode="r--p")
            + entry(70 * HUGE, 8 * HUGE, name="[stack]")
        )
    mover.join()
    assert sorted(moved) == [(n * HUGE, (n + 8) * HUGE) for n in (10, 20, 30)]


def test_no_proc_no_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subject, "SMAPS", tmp_path / "missing")
    with huge_pages() as mover:
        pass
    mover.join()


@pytest.mark.skipif(not subject.SMAPS.exists(), reason="not Linux")
def test_memory_that_moves_keeps_what_it_holds() -> None:
    with huge_pages() as mover:
        memory = mmap.mmap(-1, 8 * HUGE)
        values = np.frombuffer(memory, np.uint64)
        values[:] = np.arange(values.size)
    mover.join()
    assert np.array_equal(values, np.arange(values.size))
    values[3] = 7
    assert memory[24] == 7

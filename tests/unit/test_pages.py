"""Tier 1: what is moved onto huge pages or given back, and that it stays what it was."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from autosteer.runtime import pages as subject
from autosteer.runtime.pages import HUGE, MADV_COLLAPSE, placing

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
    monkeypatch.setattr(
        subject,
        "_advise",
        lambda start, end, advice: moved.append((start, end)) if advice == MADV_COLLAPSE else None,
    )
    earlier = entry(1 * HUGE, 4 * HUGE)
    smaps.write_text(earlier)
    with placing() as mover:
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


def test_no_proc_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Elsewhere than on Linux: no advice is given, and none is asked for."""
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(subject, "SMAPS", tmp_path / "missing")
    monkeypatch.setattr(subject, "_advise", lambda *advice: advised.append(advice))
    with placing() as mover:
        memory = bytearray(4 * HUGE)
        memory[:] = b"x" * len(memory)
    mover.join()
    assert advised == []


@pytest.mark.skipif(not subject.SMAPS.exists(), reason="not Linux")
def test_memory_that_moves_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    advised: list[tuple[int, int, int]] = []
    advise = subject._advise
    monkeypatch.setattr(subject, "_advise", lambda *advice: advised.append(advice) or advise(*advice))
    with placing() as mover:
        memory = mmap.mmap(-1, 8 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTDUMP)  # or Linux may make one mapping of it and a neighbour that nobody fills
        values = np.frombuffer(memory, np.uint64)
        values[:] = np.arange(values.size)
    mover.join()
    middle = values.ctypes.data + 4 * HUGE
    assert any(start <= middle < end and advice == MADV_COLLAPSE for start, end, advice in advised)
    assert np.array_equal(values, np.arange(values.size))
    values[3] = 7
    assert memory[24] == 7


@pytest.mark.skipif(not subject.SMAPS.exists(), reason="not Linux")
def test_what_was_read_of_files_meanwhile_is_given_back_and_holds_what_it_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a private map has changed is in no file. A first version gave pages back with MADV_DONTNEED, which forgets
    them, and with them whatever another thread had mapped there meanwhile.
    """
    given_back: list[int] = []
    advise = subject._advise
    monkeypatch.setattr(
        subject,
        "_advise",
        lambda start, end, advice: given_back.append(start) or advise(start, end, advice),
    )
    size, maps, starts = 1 << 20, {}, {}
    for name in ("read before", "read further", "read", "changed"):
        (tmp_path / name).write_bytes(b"weights!" * (size // 8))
        with (tmp_path / name).open("r+b") as file:
            maps[name] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        starts[name] = np.frombuffer(maps[name], np.uint8).ctypes.data

    def read(name: str, until: int) -> None:
        assert maps[name][:until:4096] == b"w" * (until // 4096)

    read("read before", size)
    read("read further", size // 4)
    with placing() as mover:
        for name in ("read further", "read", "changed"):
            read(name, size)
        maps["changed"][:7] = b"another"
    assert [starts[name] in given_back for name in maps] == [False, True, True, True]
    mover.join()
    for name in maps:
        assert maps[name][:8] + maps[name][-8:] == (b"another!" if name == "changed" else b"weights!") + b"weights!"

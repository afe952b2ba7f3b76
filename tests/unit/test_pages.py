"""What is moved onto huge pages or given back, and that it stays what it was."""

import mmap
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import load

from autosteer.runtime import pages as subject
from autosteer.runtime.pages import HUGE, MADV_COLLAPSE, MADV_PAGEOUT, placing

ENTRY = """{start:x}-{end:x} {mode} 00000000 00:00 0 {name}
Size:           {size} kB
KernelPageSize:        4 kB
Rss:            {rss} kB
Pss:            {rss} kB
VmFlags: rd wr mr mw me ac
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait until a load has settled; but those of other files must have: their advice would count here."""
    for thread in threading.enumerate():
        if thread.name == "huge pages":
            thread.join()
    monkeypatch.setattr(subject, "SETTLED", 0.0)


def entry(start: int, length: int, *, rss: float = 1.0, mode: str = "rw-p", name: str = "") -> str:
    """One mapping as /proc/self/smaps shows it."""
    return ENTRY.format(
        start=start, end=start + length, mode=mode, name=name, size=length >> 10, rss=int(rss * length) >> 10
    )


def test_what_was_filled_meanwhile_is_moved_and_what_was_read_of_files_is_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A thread's stack, mostly untouched, would take its whole 8 MiB; files are mapped and have pages of their own."""
    smaps, advised = tmp_path / "smaps", list[tuple[int, int, int]]()
    monkeypatch.setattr(subject, "SMAPS", smaps)
    monkeypatch.setattr(subject, "_advise", lambda *advice: advised.append(advice))
    read_before = entry(80 * HUGE, 8 * HUGE, name="/some/where/tokenizer.json")
    read_further = entry(90 * HUGE, 8 * HUGE, rss=0.2, name="/some/where/library.so")
    earlier = entry(1 * HUGE, 4 * HUGE) + read_before + read_further
    smaps.write_text(earlier)
    with placing() as mover:
        smaps.write_text(
            earlier.replace(read_further, entry(90 * HUGE, 8 * HUGE, rss=0.5, name="/some/where/library.so"))
            + entry(10 * HUGE, 8 * HUGE, name="[heap]")
            + entry(20 * HUGE, 8 * HUGE, name="[anon: glibc: malloc]")
            + entry(30 * HUGE, 8 * HUGE)
            + entry(40 * HUGE, 8 * HUGE, rss=0.01)
            + entry(50 * HUGE, 8 * HUGE, name="/some/where/weights.bin")
            + entry(60 * HUGE, 8 * HUGE, mode="r--p")
            + entry(70 * HUGE, 8 * HUGE, name="[stack]")
        )
        smaps.write_text(
            smaps.read_text().replace(read_further, read_further.replace(f"{int(1.6 * HUGE) >> 10}", "9000"))
        )
    mover.join()
    assert sorted(advised) == [
        *((n * HUGE, (n + 8) * HUGE, MADV_COLLAPSE) for n in (10, 20, 30)),
        *((n * HUGE, (n + 8) * HUGE, MADV_PAGEOUT) for n in (50, 90)),
    ]


def test_what_a_load_fills_is_placed(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    """Other tests in this directory load without it: see tests/conftest.py."""
    looks: list[int] = []
    monkeypatch.setattr(subject, "_mappings", lambda: looks.append(1) or [])
    monkeypatch.setattr("autosteer.runtime.engine.placing", placing)
    load(package)
    assert len(looks) == 2  # before, and afterwards


def test_without_another_thread_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load failed with a traceback where a system's limit of threads was reached."""

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with placing() as mover:
        pass
    assert not mover.is_alive()


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
def test_pages_given_back_hold_what_they_held(tmp_path: Path) -> None:
    """What a private map has changed is in no file. A first version gave pages back with MADV_DONTNEED, which forgets
    them, and with them whatever another thread had mapped there meanwhile.
    """
    size = 1 << 20
    for changed in (b"", b"another"):
        (tmp_path / "weights").write_bytes(b"weights!" * (size // 8))
        with (tmp_path / "weights").open("r+b") as file:
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        pages[: len(changed)] = changed
        start = np.frombuffer(pages, np.uint8).ctypes.data
        assert subject._advise(start, start + size, MADV_PAGEOUT) == 0
        assert pages[:8] == (changed + b"weights!"[len(changed) :])
        assert pages[8:] == b"weights!" * (size // 8 - 1)

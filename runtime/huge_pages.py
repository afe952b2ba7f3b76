"""Weights on huge pages. Each token reads all of them, and on pages of 4 KiB a tenth of that goes into finding pages.

Linux gives memory huge pages where it is asked to (`/sys/kernel/mm/transparent_hugepage/enabled` says "madvise" on most
systems), and onnxruntime does not ask. So we ask, a little after the graphs are loaded: MADV_COLLAPSE (Linux 6.1) moves
what is there at once, MADV_HUGEPAGE leaves it to the kernel's spare time. Nothing depends on it: where there are none,
and on other systems, everything runs as it would.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
HUGE = 2 << 20  # bytes
SETTLED = 2.0  # seconds after a load: the first answer, which moving would hold up, has begun
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux/mman.h
_ANONYMOUS = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 *(?:\[(?:heap|anon.*)\])?\n(?:[A-Z].*\n)*?Rss: +(\d+) kB$", re.MULTILINE
)


@contextlib.contextmanager
def huge_pages() -> Iterator[threading.Thread]:
    """Move onto huge pages what memory the block fills, in pieces of 2 MiB and more.

    A thread does it, SETTLED seconds behind the block: it takes from a tenth of a second to more than one (for 400 MB,
    in a virtual machine), and who touches that memory meanwhile waits.
    """
    mover = threading.Timer(SETTLED, _move_all_but, args=(set(_filled()),))
    mover.name, mover.daemon = "huge pages", True
    yield mover
    mover.start()


def _move_all_but(before: set[tuple[int, int]]) -> None:
    for start, end in set(_filled()) - before:
        _move(start, end)


def _filled() -> Iterator[tuple[int, int]]:
    """This process's anonymous mappings (start, end), but for those in good part untouched: huge pages fill them."""
    try:
        text = SMAPS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    for match in _ANONYMOUS.finditer(text):
        start, end, resident = int(match[1], 16), int(match[2], 16), int(match[3]) << 10
        if resident >= 0.9 * (end - start):
            yield start, end


def _move(start: int, end: int) -> None:
    first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
    if first < last:
        madvise = ctypes.CDLL(None).madvise
        arguments = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
        if madvise(*arguments, MADV_COLLAPSE):
            madvise(*arguments, MADV_HUGEPAGE)

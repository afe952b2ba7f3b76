"""Huge pages for the loaded weights, and mapped pages given back. Linux only; everything works without it.

Huge pages: each token reads all weights, and with pages of 4 KiB a tenth of that time goes into address translation.
On most systems Linux uses huge pages only where a program asks (`/sys/kernel/mm/transparent_hugepage/enabled` is
"madvise"), and onnxruntime does not. So we ask, shortly after loading: MADV_COLLAPSE (Linux 6.1) moves memory onto huge
pages at once; MADV_HUGEPAGE leaves it to a kernel thread.

Mapped pages: loading reads pages that answers do not need. onnxruntime copies scales out of the mapped weights.bin (18
MiB for a 0.5B model at int4), and 10 MiB of its code runs only while it loads. MADV_PAGEOUT (Linux 5.4) drops such
pages; if one is needed again, it is read from its file.

Addresses come from /proc and may be stale when advice on them is given. No advice used here changes memory's content.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

SMAPS = Path("/proc/self/smaps")
HUGE = 2 << 20  # bytes
SETTLED = 2.0  # seconds after a load; moving memory earlier would delay the first answer
MADV_HUGEPAGE, MADV_PAGEOUT, MADV_COLLAPSE = 14, 21, 25  # linux/mman.h
Range: TypeAlias = "tuple[int, int]"  # addresses: first, one past the last


@contextlib.contextmanager
def placing() -> Iterator[threading.Thread]:
    """Move the memory that the block fills onto huge pages, and drop the mapped pages that it has read.

    A thread moves it SETTLED seconds after the block. That takes from 0.1 s to more than 1 s (400 MB, in a virtual
    machine), and any access to that memory waits meanwhile.
    """
    before = {mapping.range: mapping.resident for mapping in _mappings()}
    filled: list[Range] = []
    mover = threading.Timer(SETTLED, _move, args=(filled,))
    mover.name, mover.daemon = "huge pages", True
    yield mover
    for mapping in _mappings():
        if mapping.resident <= before.get(mapping.range, 0):
            continue
        if mapping.is_filled:
            filled.append(mapping.range)
        elif mapping.name.startswith("/"):
            _advise(*mapping.range, MADV_PAGEOUT)
    with contextlib.suppress(RuntimeError):  # the system gives no more threads: everything works without this one
        mover.start()


class Mapping(NamedTuple):
    """An entry of /proc/self/smaps."""

    range: Range
    mode: str
    name: str  # a file's path; "", "[heap]" or "[anon...]" for anonymous memory
    resident: int  # bytes

    @property
    def is_filled(self) -> bool:
        """Whether it is anonymous memory of which at least 90 % is resident. Huge pages would fill the rest."""
        anonymous = self.name in ("", "[heap]") or self.name.startswith("[anon")
        return anonymous and self.mode == "rw-p" and self.resident >= 0.9 * (self.range[1] - self.range[0])


_ENTRY = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)\n(?:[A-Z].*\n)*?Rss: +(\d+) kB$", re.MULTILINE)


def _mappings() -> Iterator[Mapping]:
    try:
        text = SMAPS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    for start, end, mode, name, resident in _ENTRY.findall(text):
        yield Mapping((int(start, 16), int(end, 16)), mode, name, int(resident) << 10)


def _move(filled: Iterable[Range]) -> None:
    for start, end in filled:
        first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        if first < last and _advise(first, last, MADV_COLLAPSE):
            _advise(first, last, MADV_HUGEPAGE)


def _advise(start: int, end: int, advice: int) -> int:
    """Linux's madvise; 0 if it took the advice."""
    status: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return status

"""Which pages of memory the weights lie on, once they are loaded. Linux only, and nothing depends on it.

Huge ones: each token reads all weights, and on pages of 4 KiB a tenth of that goes into finding pages. Linux gives
memory huge pages where it is asked to (`/sys/kernel/mm/transparent_hugepage/enabled` says "madvise" on most systems),
and onnxruntime does not ask. So we ask, a little after the graphs are loaded: MADV_COLLAPSE (Linux 6.1) moves what is
there at once, MADV_HUGEPAGE leaves it to the kernel's spare time.

And once: loading reads more of files than answers do. onnxruntime maps weights.bin and packs weights anew for its
kernels, scales among them, but keeps the map of scales (18 MiB of a 0.5B model at int4); and much of its own code (10
MiB) only loads. MADV_PAGEOUT (Linux 5.4) gives them back; whoever reads them after all finds them in the file.

Addresses come out of /proc and may have become another thread's when advice on them is given. None of this advice
changes what memory holds.
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
SETTLED = 2.0  # seconds after a load: the first answer, which moving would hold up, has begun
MADV_HUGEPAGE, MADV_PAGEOUT, MADV_COLLAPSE = 14, 21, 25  # linux/mman.h
Range: TypeAlias = "tuple[int, int]"  # addresses: the first, and the first behind


@contextlib.contextmanager
def placing() -> Iterator[threading.Thread]:
    """Move onto huge pages what memory the block fills, in pieces of 2 MiB and more, and give back what it has read of
    mapped files.

    A thread moves, SETTLED seconds behind the block: it takes from a tenth of a second to more than one (for 400 MB,
    in a virtual machine), and who touches that memory meanwhile waits.
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
    mover.start()


class Mapping(NamedTuple):
    """An entry of /proc/self/smaps."""

    range: Range
    mode: str
    name: str  # a file's path; "", "[heap]" or "[anon...]" for memory of no file
    resident: int  # bytes

    @property
    def is_filled(self) -> bool:
        """Whether it is memory of no file that is in good part touched. Huge pages fill the rest."""
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
    """Linux's madvise: 0 where it has taken the advice."""
    status: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return status

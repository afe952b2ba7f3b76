"""Which pages of memory the weights lie on, once they are loaded. Linux only, and nothing depends on it.

Huge ones: each token reads all weights, and on pages of 4 KiB a tenth of that goes into finding pages. Linux gives
memory huge pages where it is asked to (`/sys/kernel/mm/transparent_hugepage/enabled` says "madvise" on most systems),
and onnxruntime does not ask. So we ask, a little after the graphs are loaded: MADV_COLLAPSE (Linux 6.1) moves what is
there at once, MADV_HUGEPAGE leaves it to the kernel's spare time.

And once: onnxruntime maps weights.bin and packs weights anew for its kernels, scales among them, but keeps the map of
scales (18 MiB of a 0.5B model at int4). Their pages go back; whoever reads them after all finds them in the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
HUGE = 2 << 20  # bytes
SETTLED = 2.0  # seconds after a load: the first answer, which moving would hold up, has begun
MADV_DONTNEED, MADV_HUGEPAGE, MADV_COLLAPSE = 4, 14, 25  # linux/mman.h


@contextlib.contextmanager
def placing(folder: Path) -> Iterator[threading.Thread]:
    """Move onto huge pages what memory the block fills, in pieces of 2 MiB and more, and give back what it has mapped
    of the files in `folder`.

    A thread moves, SETTLED seconds behind the block: it takes from a tenth of a second to more than one (for 400 MB,
    in a virtual machine), and who touches that memory meanwhile waits.
    """
    before = {(m.start, m.end) for m in _mappings() if m.is_filled}
    mover = threading.Timer(SETTLED, _move_all_but, args=(before,))
    mover.name, mover.daemon = "huge pages", True
    yield mover
    for mapping in _mappings():
        if mapping.name.startswith(f"{folder.resolve()}/") and not mapping.changed:
            _advise(mapping.start, mapping.end, MADV_DONTNEED)
    mover.start()


@dataclass(frozen=True)
class Mapping:
    """An entry of /proc/self/smaps; sizes in bytes."""

    start: int
    end: int
    mode: str
    name: str  # a file's path; "", "[heap]" or "[anon...]" for memory of no file
    resident: int
    changed: int  # of a file's: no longer what the file says

    @property
    def is_filled(self) -> bool:
        """Whether it is memory of no file that is in good part touched. Huge pages fill the rest."""
        anonymous = self.name in ("", "[heap]") or self.name.startswith("[anon")
        return anonymous and self.mode == "rw-p" and self.resident >= 0.9 * (self.end - self.start)


_ENTRY = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)\n((?:[A-Z].*\n)*)", re.MULTILINE)
_SIZE = re.compile(r"^(\w+): +(\d+) kB$", re.MULTILINE)


def _mappings() -> Iterator[Mapping]:
    try:
        text = SMAPS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    for start, end, mode, name, sizes in _ENTRY.findall(text):
        size = {key: int(kilobytes) << 10 for key, kilobytes in _SIZE.findall(sizes)}
        changed = size.get("Anonymous", 0) + size.get("Swap", 0)
        yield Mapping(int(start, 16), int(end, 16), mode, name, size.get("Rss", 0), changed)


def _move_all_but(before: set[tuple[int, int]]) -> None:
    for mapping in _mappings():
        if mapping.is_filled and (mapping.start, mapping.end) not in before:
            _move(mapping.start, mapping.end)


def _move(start: int, end: int) -> None:
    first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
    if first < last and _advise(first, last, MADV_COLLAPSE):
        _advise(first, last, MADV_HUGEPAGE)


def _advise(start: int, end: int, advice: int) -> int:
    """Linux's madvise: 0 where it has taken the advice."""
    status: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return status

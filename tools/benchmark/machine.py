"""The machine that numbers come from: processor, features, and how fast its memory can be read."""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

from autosteer.runtime.bench import read_bandwidth
from autosteer.runtime.usable_cores import usable_cores

FEATURES = ("avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")  # what kernels use


@dataclass(frozen=True)
class Machine:
    """What a reader needs to place a number."""

    cpu: str
    cores: int  # that this process may use
    features: tuple[str, ...]
    memory_gib: float
    system: str
    python: str
    read_gb_s: float  # fastest of several sweeps over 512 MiB


def describe_machine(threads: int) -> Machine:
    """Look around, and read half a gigabyte a few times with `threads` threads."""
    info: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    flags = (info.get("flags") or info.get("Features") or "").split()
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cores=usable_cores(),
        features=tuple(name for name in FEATURES if name in flags),
        memory_gib=round(pages / 2**30, 1),
        system=platform.platform(),
        python=platform.python_version(),
        read_gb_s=round(read_bandwidth(threads) / 1e9, 1),
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def others_cpu_seconds() -> float | None:
    """Processor seconds that were spent or stolen so far by anything but this process and its ended children."""
    first = _lines("/proc/stat")[:1]
    if not first:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = (int(n) for n in first[0].split()[1:])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in own)

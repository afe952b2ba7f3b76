"""How many processors this process may use: its affinity, and the CPU limit of its container.

Linux keeps the limit in the cgroup of the process: cpu.max (version 2), cpu.cfs_quota_us and cpu.cfs_period_us
(version 1). Inside a container the root of /sys/fs/cgroup is the container's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores() -> int:
    """Processors that this process may use; a limit of 1.5 CPUs (docker run --cpus) counts as two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *map(math.ceil, cpu_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))])


def cpu_limits(membership: Path, root: Path) -> Iterator[float]:
    """CPUs' worth of time, above 0, that each cgroup of this process may take; nothing for those without a limit.

    membership: /proc/self/cgroup, root: where cgroups are mounted
    """
    for line in _text(membership).splitlines():
        _, controllers, own = (line + "::").split(":")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = root / "cpu" if controllers else root
        for name in ("", *Path(own).parts[1:]):  # a limit of a group holds for the groups in it
            place /= name
            if controllers:
                numbers = _text(place / "cpu.cfs_quota_us"), _text(place / "cpu.cfs_period_us")
            else:
                quota, _, period = _text(place / "cpu.max").strip().partition(" ")
                numbers = quota, period
            try:
                limit = int(numbers[0]) / int(numbers[1])
            except (ValueError, ZeroDivisionError):  # "max", or no such file
                continue
            if limit > 0:  # -1: no limit
                yield limit


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""

"""CPU limits of containers, as Linux writes them: for both runtimes."""

from __future__ import annotations

from pathlib import Path

SECOND = {"cpu.max": "max 100000\n", "pod/cpu.max": "150000 100000\n", "pod/box/cpu.max": "400000 100000\n"}
FIRST = {
    "cpu/cpu.cfs_quota_us": "-1\n",
    "cpu/cpu.cfs_period_us": "100000\n",
    "cpu/docker/cpu.cfs_quota_us": "50000\n",
    "cpu/docker/cpu.cfs_period_us": "100000\n",
}
# name: (/proc/self/cgroup, the files under /sys/fs/cgroup, the limits)
CASES: dict[str, tuple[str, dict[str, str], list[float]]] = {
    "no cgroups": ("", {}, []),
    "no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, []),
    "the container's own": ("0::/\n", {"cpu.max": "200000 100000\n"}, [2.0]),
    "of a group in a group": ("0::/pod/box\n", SECOND, [1.5, 4.0]),
    "version 1": ("4:memory:/docker\n2:cpu,cpuacct:/docker\n1:cpuset:/\n0::/\n", FIRST, [0.5]),
    "version 1, seen from the container": (
        "2:cpu:/docker/box\n",
        FIRST | {"cpu/cpu.cfs_quota_us": "300000\n"},
        [3.0, 0.5],
    ),
    "damaged": ("0::/\nodd\n\n", {"cpu.max": "many\n"}, []),
    "a period of 0": ("0::/\n", {"cpu.max": "100000 0\n"}, []),
}


def written(folder: Path, name: str) -> tuple[Path, Path, list[float]]:
    """(the file of a case, the folder, the limits)."""
    membership, files, limits = CASES[name]
    (folder / "membership").write_text(membership, encoding="ascii")
    for file, text in files.items():
        (folder / "root" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / file).write_text(text, encoding="ascii")
    return folder / "membership", folder / "root", limits

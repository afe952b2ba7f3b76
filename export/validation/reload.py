"""Load a package that was just written as its users will, before it takes its place: files, hashes, manifest, graphs.

Where the machine has memory to spare that is Engine.load, as it stands. Where it has not, the same files are checked
and the graphs loaded one after the other: what fits an export fits that, and a package may be larger than the machine
that makes it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from autosteer.runtime.engine import Engine
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.subgraph import Subgraph, find_device
from autosteer.runtime.text import load_tokenizer

SPARE = 0.5  # of the free memory: the export's own is still held, and others may want some


def load_again(folder: Path, needed: int) -> str:
    """Load the package in `folder`, which takes `needed` bytes as a whole, on the CPU; how that was done, in words.

    Raises PackageError where it does not load.
    """
    free = free_bytes()
    engine_log = logging.getLogger("autosteer.runtime.engine")
    level = engine_log.level
    engine_log.setLevel(logging.ERROR)  # that a package for CUDA is slow here is no news
    try:
        if free is not None and needed <= SPARE * free:
            Engine.load(folder, device="cpu")
            return "loaded again as a whole"
        manifest = Manifest.load(folder)
        device, _ = find_device("cpu", None)
        with manifest.verifying(folder):
            load_tokenizer(folder / manifest.prompt.tokenizer)
            for spec in manifest.graphs.values():
                Subgraph(folder / spec.file, spec, device)
        return (
            f"loaded again graph by graph, for it takes {needed / 2**30:.1f} GiB as a whole and {_said(free)} free here"
        )
    finally:
        engine_log.setLevel(level)


def free_bytes() -> int | None:
    """Memory that this process may still take, by /proc/meminfo and its container's limit; None where neither says."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no Linux, no cgroup, or no limit ("max")
        pass
    return min(found, default=None)


def _said(free: int | None) -> str:
    return "nobody says what is" if free is None else f"{free / 2**30:.1f} GiB are"

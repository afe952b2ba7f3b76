"""Load a package that was just written, as its users will: files, hashes, manifest, graphs.

If memory suffices, this is Engine.load. If not, the same files are checked and the graphs are loaded one after the
other: an export needs no more memory than that, and may write a package that is larger than its machine's memory.
"""

from __future__ import annotations

import logging
from pathlib import Path

from autosteer.runtime.engine import Engine
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.subgraph import Subgraph, find_device
from autosteer.runtime.text import load_tokenizer

SPARE = 0.5  # share of free memory to use: the export still holds its own, and other programs need some


def load_again(folder: Path, needed: int) -> str:
    """Load the package in `folder` on the CPU, and say how. As a whole it takes `needed` bytes.

    Raises PackageError if it does not load.
    """
    free = free_bytes()
    engine_log = logging.getLogger("autosteer.runtime.engine")
    level = engine_log.level
    engine_log.setLevel(logging.ERROR)  # it would warn that a package for CUDA is slow here
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
        return f"loaded again graph by graph: as a whole it takes {needed / 2**30:.1f} GiB, and {_in_words(free)} free"
    finally:
        engine_log.setLevel(level)


def free_bytes() -> int | None:
    """Memory that this process may still allocate, by /proc/meminfo and its container's limit; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # not Linux, no cgroup, or no limit ("max")
        pass
    return min(found, default=None)


def _in_words(free: int | None) -> str:
    return "an unknown amount is" if free is None else f"{free / 2**30:.1f} GiB are"

"""Load a package that was just written, as its users will: files, hashes, manifest, graphs, and the gate's proof.

A package of ordinary size is loaded by Engine.load. Of a larger one the same files are checked, and its graphs are
loaded one after the other, so that an export never needs as much memory as the whole package does.
"""

from __future__ import annotations

import logging
from pathlib import Path

from autosteer.runtime.engine import Engine
from autosteer.runtime.manifest import GATE_GRAPHS, Manifest
from autosteer.runtime.manifest_format import MONITOR_GRAPH
from autosteer.runtime.self_test import check_gate, check_packs
from autosteer.runtime.subgraph import Subgraph, find_device
from autosteer.runtime.text import load_tokenizer

WHOLE = 2 << 30  # bytes: larger packages are loaded graph by graph; 7B at int4 takes five
PACK_GRAPHS = ("embed_tokens", "decoder_lower")  # what check_packs runs


def load_again(folder: Path, needed: int) -> str:
    """Load the package in `folder` on the CPU, and say how. As a whole it takes `needed` bytes.

    Raises PackageError if it does not load.
    """
    engine_log = logging.getLogger("autosteer.runtime.engine")
    level = engine_log.level
    engine_log.setLevel(logging.ERROR)  # it would warn that a package for CUDA is slow here
    try:
        if needed <= WHOLE:
            Engine.load(folder, device="cpu")
            return "loaded again as a whole"
        manifest = Manifest.load(folder)
        device, _ = find_device("cpu", None)
        with manifest.verifying(folder):
            load_tokenizer(folder / manifest.prompt.tokenizer)
            loaded = {}
            for name, spec in manifest.graphs.items():
                graph = Subgraph(folder / spec.file, spec, device)
                if name in (*GATE_GRAPHS, MONITOR_GRAPH, "lm_head", *PACK_GRAPHS):
                    loaded[name] = graph
                if {*PACK_GRAPHS} <= loaded.keys():
                    check_packs(manifest, loaded, device)
                    for done in PACK_GRAPHS:
                        del loaded[done]
            check_gate(folder, manifest, loaded, device)
        return f"loaded again graph by graph: as a whole it takes {needed / 2**30:.1f} GiB"
    finally:
        engine_log.setLevel(level)

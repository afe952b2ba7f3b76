"""A package's size: an estimate before it is written, its weights by graph, and its memory when it runs."""

from __future__ import annotations

import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import onnx

from autosteer.runtime.errors import InputError
from autosteer.runtime.manifest import Manifest, Precision

from .checkpoint.decoder_config import kv_bytes_per_token
from .checkpoint.open import Checkpoint

BYTES_PER_WEIGHT: dict[Precision, float] = {"fp32": 4.0, "fp16": 2.0, "int8": 1.1, "int4": 0.8}  # upper estimates
IN_MEMORY = 1.25  # of a graph's weights: onnxruntime repacks them (7B int4, half of the decoder: 1.16, and 0.2 mapped)
BASE_BYTES = 250 << 20  # Python, onnxruntime, activations
CONTEXT = 4096  # tokens in the KV caches of the estimate
JETSONS = (8, 16, 32, 64)  # GB of memory that CPU and GPU share
USABLE = 0.75  # share of it; the system needs the rest


@dataclass(frozen=True)
class Footprint:
    """Memory needs of a package, in bytes."""

    weights: dict[str, int]  # by graph; a tied embedding counts in both of its graphs
    kv_per_1000_tokens: int
    running: int  # everything loaded, and a context of CONTEXT tokens

    def fits(self) -> dict[str, bool]:
        """Whether a package runs on each size of Jetson."""
        return {f"{size} GB": self.running <= USABLE * size * 1e9 for size in JETSONS}


def check_space(output: Path, checkpoint: Checkpoint, *precisions: Precision) -> None:
    """Raise InputError if the disk under `output` has no room for the package, whose weights are stored once in each of
    `precisions`.
    """
    parent = next(p for p in output.resolve().parents if p.exists())
    needed = checkpoint.weights * sum(BYTES_PER_WEIGHT[precision] for precision in precisions)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{output}: at {' and '.join(precisions)} the package takes about {needed / 2**30:.1f} GiB, and {parent} "
            f"has {free / 2**30:.1f} GiB left; make room, or choose another --output or --precision"
        )


def package_kv_bytes_per_token(manifest: Manifest) -> int:
    """Bytes of one token's keys and values in a package's KV caches."""
    dims = manifest.dims
    return kv_bytes_per_token(dims.num_hidden_layers, dims.num_key_value_heads, dims.head_dim, manifest.kv_cache.dtype)


def footprint(folder: Path, manifest: Manifest) -> Footprint:
    """The footprint of a written package, from its graphs."""
    dims = manifest.dims
    weights = {name: _weight_bytes(folder / spec.file) for name, spec in manifest.graphs.items()}
    per_token = package_kv_bytes_per_token(manifest)
    mapped = weights["embed_tokens"]  # rows are read from the file as they are needed
    loaded = IN_MEMORY * (sum(weights.values()) - mapped)
    context = min(CONTEXT, dims.context_length)
    return Footprint(weights, 1000 * per_token, int(BASE_BYTES + loaded + context * per_token))


def peak_rss_bytes() -> int:
    """Peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _weight_bytes(path: Path) -> int:
    graph = onnx.load(path, load_external_data=False).graph
    sizes = [
        next((int(e.value) for e in tensor.external_data if e.key == "length"), tensor.ByteSize())
        for tensor in graph.initializer
    ]
    return sum(sizes)

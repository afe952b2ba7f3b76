"""Dequantise the matrices of a written package, from its graphs and weights.bin, as onnxruntime does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.export.graphs.int8_matmul import smoothing_of
from autosteer.export.graphs.kv_scales import KVScales
from autosteer.export.graphs.quantize import Blocks, Packed, dequantise, padded_nibbles
from autosteer.runtime.manifest import Manifest

BLOCK_BYTES = 32 << 20  # of float32
Rows = slice | npt.NDArray[np.int64]


class Dequantised(NamedTuple):
    """Dequantised rows of a matrix (N, K)."""

    weights: torch.Tensor  # (N, K) float32
    steps: torch.Tensor  # (N, K) float32, at least 0: the distance between neighbouring values of each weight


class PackedWeights:
    """A package's weights under their checkpoint names: its quantised matrices, and the checkpoint's for all others.

    A WeightSource of on_demand.py. Opening it reads the graphs, and no weights.
    """

    def __init__(self, folder: Path, manifest: Manifest, checkpoint: Checkpoint):
        """`checkpoint` tells how many rows each matrix has, because the package stacks some of them."""
        self._checkpoint = checkpoint
        self._nodes: dict[str, ir.Node] = {}  # checkpoint name -> the node with its (stacked) matrix
        self._rows: dict[str, slice] = {}
        for spec in manifest.graphs.values():
            for node in ir.load(folder / spec.file).graph:
                for name, rows in stacked(node, checkpoint).items():
                    self._nodes[name], self._rows[name] = node, rows

    @property
    def names(self) -> list[str]:
        """Checkpoint names of the quantised matrices."""
        return list(self._nodes)

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def expect(self, name: str, shape: Sequence[int]) -> None:
        """As the checkpoint's."""
        self._checkpoint.expect(name, shape)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, float32. Dequantised block by block, because that takes many times a block's memory."""
        if name not in self._nodes:
            return self._checkpoint.tensor(name)
        out, first = torch.empty(self._checkpoint.shape(name)), 0
        for block in self.rows(name, BLOCK_BYTES):
            out[first : first + len(block)] = block
            first += len(block)
        return out

    def rows(self, name: str, block_bytes: int) -> Iterator[torch.Tensor]:
        """A tensor in blocks of rows of about `block_bytes`."""
        if name not in self._nodes:
            yield from self._checkpoint.rows(name, block_bytes)
            return
        all_rows, width = self._rows[name], math.prod(self._checkpoint.shape(name)[1:])
        step = max(1, block_bytes // (4 * width))
        for first in range(all_rows.start, all_rows.stop, step):
            yield read(self._nodes[name], slice(first, min(first + step, all_rows.stop))).weights

    def gather(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, in the order given."""
        if name not in self._nodes:
            return self._checkpoint.gather(name, rows)
        return read(self._nodes[name], np.array(rows, np.int64) + self._rows[name].start).weights


def packed_kv_scales(folder: Path, manifest: Manifest) -> tuple[KVScales, ...]:
    """The scales of a package's int8 caches, layer by layer, as its graphs hold them; none of others."""
    if manifest.kv_cache.dtype != "int8":
        return ()
    halves = (ir.load(folder / manifest.graphs[half].file).graph for half in ("decoder_lower", "decoder_upper"))
    nodes = [node for half in halves for node in half if node.op_type == "GroupQueryAttention"]
    found = [(_tensor(node, 12), _tensor(node, 13)) for node in nodes]
    return tuple(
        KVScales(keys.numpy(), values.numpy()) for keys, values in found if keys is not None and values is not None
    )


def stacked(node: ir.Node, checkpoint: Checkpoint) -> dict[str, slice]:
    """Checkpoint names of the matrices in a quantised node, and which rows each takes; empty for other nodes."""
    if node.op_type not in _READERS:
        return {}
    value = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
    assert value is not None and value.name is not None
    names = value.name.removesuffix(".codes").split("+")
    ends = list(itertools.accumulate(checkpoint.shape(name)[0] for name in names))
    return {name: slice(end - checkpoint.shape(name)[0], end) for name, end in zip(names, ends, strict=True)}


def read(node: ir.Node, rows: Rows) -> Dequantised:
    """Some rows of a quantised node's matrix, dequantised."""
    return _READERS[node.op_type](node, rows)


def bits_of(node: ir.Node) -> int:
    """Bits of each weight of a quantised node's matrix."""
    return node.attributes["bits"].as_int() if "bits" in node.attributes else 8


def values_of(value: ir.Value | None, rows: Rows | None = None) -> torch.Tensor | None:
    """A copy of an initialiser, or of some of its rows; None if there is none."""
    if value is None or value.const_value is None:
        return None
    stored = value.const_value
    copy = torch.from_numpy(np.array(stored.numpy() if rows is None else stored.numpy()[rows]))
    if isinstance(stored, ir.ExternalTensor):
        stored.release()  # else the map of weights.bin adds up to memory, matrix by matrix
    return copy


def _tensor(node: ir.Node, index: int, rows: Rows | None = None) -> torch.Tensor | None:
    return values_of(node.inputs[index] if index < len(node.inputs) else None, rows)


def _blocks(node: ir.Node, zero_points: torch.Tensor | None) -> Blocks:
    bits, size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    return Blocks(bits, size, symmetric=zero_points is None)


def _dequantised(packed: Packed, blocks: Blocks, k: int) -> Dequantised:
    steps = packed.scales.abs().repeat_interleave(blocks.size, dim=1)[:, :k]
    return Dequantised(dequantise(packed, blocks, k), steps)


def _mat_mul_n_bits(node: ir.Node, rows: Rows) -> Dequantised:
    codes, scales, zero_points = (_tensor(node, i, rows) for i in (1, 2, 3))
    assert codes is not None and scales is not None
    packed = Packed(codes, scales.float(), zero_points)
    return _dequantised(packed, _blocks(node, zero_points), node.attributes["K"].as_int())


def _gather_block_quantized(node: ir.Node, rows: Rows) -> Dequantised:
    scales = _tensor(node, 2, rows)
    assert scales is not None
    count = scales.shape[1]
    size = node.attributes["block_size"].as_int()
    packed, zero_points = _stored_bytes(node.inputs[0]), None
    if len(node.inputs) > 3:  # uint4 without padding: see writer.py
        flat = _stored_bytes(node.inputs[3])
        zero_points = torch.from_numpy(padded_nibbles(flat, count)[rows])
    blocks = _blocks(node, zero_points)
    codes = torch.from_numpy(np.array(packed.reshape(-1, count, size * blocks.bits // 8)[rows]))
    return _dequantised(Packed(codes, scales.float(), zero_points), blocks, count * size)


def _stored_bytes(value: ir.Value | None) -> npt.NDArray[np.uint8]:
    """A weight's bytes in weights.bin, flat."""
    assert value is not None and isinstance(value.const_value, ir.ExternalTensor)
    stored = value.const_value
    return np.memmap(stored.path, np.uint8, "r", stored.offset or 0, stored.length)


def _mat_mul_integer(node: ir.Node, rows: Rows) -> Dequantised:
    codes, scales, smoothing = _tensor(node, 1), _tensor(node, 3), values_of(smoothing_of(node))
    assert codes is not None and scales is not None
    steps = scales[rows, None].abs().expand(-1, codes.shape[0])
    codes, scales = codes.T[rows].float(), scales[rows, None]
    if smoothing is None:
        return Dequantised(codes * scales, steps)
    return Dequantised(codes * scales * smoothing, steps * smoothing.abs())


_READERS = {
    "MatMulNBits": _mat_mul_n_bits,
    "GatherBlockQuantized": _gather_block_quantized,
    "MatMulIntegerToFloat": _mat_mul_integer,
}

"""The matrices of a written package, as onnxruntime computes with them: read back from its graphs and weights.bin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from autosteer.runtime.manifest import Manifest

from .checkpoint import Checkpoint
from .kv_scales import KVScales
from .quantize import Blocks, Packed, dequantise, padded_nibbles
from .w8a8 import smoothing_of

BLOCK_BYTES = 32 << 20  # of float32
Rows = slice | npt.NDArray[np.int64]


class PackedWeights:
    """Every matrix of a package that is quantised under its checkpoint name, and the checkpoint's own for all others.

    Opening it reads the graphs, and no weights. It stands in for the checkpoint (on_demand.WeightSource).
    """

    def __init__(self, folder: Path, manifest: Manifest, checkpoint: Checkpoint):
        """`checkpoint` says how many rows each matrix has: some stand stacked in the package."""
        self.errors: dict[str, float] = {}  # of the matrices read so far: relative to the checkpoint's, Frobenius norm
        self._checkpoint = checkpoint
        self._nodes: dict[str, ir.Node] = {}  # of the stacked matrix, by each name in it
        self._rows: dict[str, slice] = {}
        for spec in manifest.graphs.values():
            for node in ir.load(folder / spec.file).graph:
                if node.op_type in _READERS:
                    first = 0
                    for name in _names(node):
                        rows = checkpoint.shape(name)[0]
                        self._nodes[name], self._rows[name] = node, slice(first, first + rows)
                        first += rows

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
        """A whole tensor, float32. Its blocks are unpacked one by one: what that takes is many times their size."""
        if name not in self._nodes:
            return self._checkpoint.tensor(name)
        out, first = torch.empty(self._checkpoint.shape(name)), 0
        for block in self.rows(name, BLOCK_BYTES):
            out[first : first + len(block)] = block
            first += len(block)
        return out

    def rows(self, name: str, block_bytes: int) -> Iterator[torch.Tensor]:
        """A tensor in blocks of rows of about `block_bytes`."""
        first = self._rows[name].start if name in self._nodes else 0
        for block in self._checkpoint.rows(name, block_bytes):
            here = slice(first, first + len(block))
            yield self._read(name, here, block) if name in self._nodes else block
            first = here.stop

    def gather(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, in the order given."""
        original = self._checkpoint.gather(name, rows)
        if name not in self._nodes:
            return original
        return self._read(name, np.array(rows, np.int64) + self._rows[name].start, original)

    def _read(self, name: str, rows: Rows, original: torch.Tensor) -> torch.Tensor:
        node = self._nodes[name]
        packed = _READERS[node.op_type](node, rows)
        error = float((packed - original).norm() / original.norm().clamp_min(1e-30))
        self.errors[name] = worse(self.errors.get(name, 0.0), error)
        return packed


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


def worse(one: float, other: float) -> float:
    """The larger of two errors. NaN is the largest: `max` forgets it, and a graph of NaNs would pass for exact."""
    return math.inf if math.isnan(one) or math.isnan(other) else max(one, other)


def _names(node: ir.Node) -> list[str]:
    value = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
    assert value is not None and value.name is not None
    return value.name.removesuffix(".codes").split("+")


def _tensor(node: ir.Node, index: int, rows: Rows | None = None) -> torch.Tensor | None:
    return _values(node.inputs[index] if index < len(node.inputs) else None, rows)


def _values(value: ir.Value | None, rows: Rows | None = None) -> torch.Tensor | None:
    if value is None or value.const_value is None:
        return None
    stored = value.const_value
    copy = torch.from_numpy(np.array(stored.numpy() if rows is None else stored.numpy()[rows]))
    if isinstance(stored, ir.ExternalTensor):
        stored.release()  # its map of weights.bin would count as memory, matrix by matrix
    return copy


def _blocks(node: ir.Node, zero_points: torch.Tensor | None) -> Blocks:
    bits, size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    return Blocks(bits, size, symmetric=zero_points is None)


def _mat_mul_n_bits(node: ir.Node, rows: Rows) -> torch.Tensor:
    codes, scales, zero_points = (_tensor(node, i, rows) for i in (1, 2, 3))
    assert codes is not None and scales is not None
    return dequantise(Packed(codes, scales, zero_points), _blocks(node, zero_points), node.attributes["K"].as_int())


def _gather_block_quantized(node: ir.Node, rows: Rows) -> torch.Tensor:
    scales = _tensor(node, 2, rows)
    assert scales is not None
    count = scales.shape[1]
    size = node.attributes["block_size"].as_int()
    packed, zero_points = _stored_bytes(node.inputs[0]), None
    if len(node.inputs) > 3:  # uint4, and without padding: graph.py says why
        flat = _stored_bytes(node.inputs[3])
        zero_points = torch.from_numpy(padded_nibbles(flat, count)[rows])
    blocks = _blocks(node, zero_points)
    codes = torch.from_numpy(np.array(packed.reshape(-1, count, size * blocks.bits // 8)[rows]))
    return dequantise(Packed(codes, scales, zero_points), blocks, count * size)


def _stored_bytes(value: ir.Value | None) -> npt.NDArray[np.uint8]:
    """A weight's bytes as they lie in weights.bin, in one row."""
    assert value is not None and isinstance(value.const_value, ir.ExternalTensor)
    stored = value.const_value
    return np.memmap(stored.path, np.uint8, "r", stored.offset or 0, stored.length)


def _mat_mul_integer(node: ir.Node, rows: Rows) -> torch.Tensor:
    codes, scales, smoothing = _tensor(node, 1), _tensor(node, 3), _values(smoothing_of(node))
    assert codes is not None and scales is not None
    weights = codes.T[rows].float() * scales[rows, None]
    return weights if smoothing is None else weights * smoothing


_READERS = {
    "MatMulNBits": _mat_mul_n_bits,
    "GatherBlockQuantized": _gather_block_quantized,
    "MatMulIntegerToFloat": _mat_mul_integer,
}

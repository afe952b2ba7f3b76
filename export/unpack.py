"""The matrices of a written package, as onnxruntime computes with them: read back from its graphs and weights.bin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from autosteer.runtime.manifest import Manifest

from .checkpoint import Checkpoint
from .quantize import Blocks, Packed, dequantise


class PackedWeights:
    """Every quantised matrix of a package under its checkpoint name. Opening it reads the graphs, and no weights."""

    def __init__(self, folder: Path, manifest: Manifest, checkpoint: Checkpoint):
        """`checkpoint` says how many rows each matrix has: some stand stacked in the package."""
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

    def matrix(self, name: str) -> torch.Tensor:
        """(N, K) float32"""
        node = self._nodes[name]
        return _READERS[node.op_type](node, self._rows[name])


def _names(node: ir.Node) -> list[str]:
    value = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
    assert value is not None and value.name is not None
    return value.name.removesuffix(".codes").split("+")


def _tensor(node: ir.Node, index: int, rows: slice | None = None) -> torch.Tensor | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    array = value.const_value.numpy()
    return torch.from_numpy(np.array(array if rows is None else array[rows]))


def _blocks(node: ir.Node, zero_points: torch.Tensor | None) -> Blocks:
    bits, size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    return Blocks(bits, size, symmetric=zero_points is None)


def _mat_mul_n_bits(node: ir.Node, rows: slice) -> torch.Tensor:
    codes, scales, zero_points = (_tensor(node, i, rows) for i in (1, 2, 3))
    assert codes is not None and scales is not None
    return dequantise(Packed(codes, scales, zero_points), _blocks(node, zero_points), node.attributes["K"].as_int())


def _gather_block_quantized(node: ir.Node, rows: slice) -> torch.Tensor:
    flat, scales = _tensor(node, 0, rows), _tensor(node, 2, rows)
    assert flat is not None and scales is not None
    blocks, (n, count) = _blocks(node, None), scales.shape
    return dequantise(Packed(flat.reshape(n, count, -1), scales, None), blocks, flat.shape[1] * 8 // blocks.bits)


def _mat_mul_integer(node: ir.Node, rows: slice) -> torch.Tensor:
    codes, scales = _tensor(node, 1), _tensor(node, 3)
    assert codes is not None and scales is not None
    return codes.T[rows].float() * scales[rows, None]


_READERS = {
    "MatMulNBits": _mat_mul_n_bits,
    "GatherBlockQuantized": _gather_block_quantized,
    "MatMulIntegerToFloat": _mat_mul_integer,
}

"""Bits and block sizes, read back from the files that are run, and the bytes that one decode step reads of them.

Nothing here believes an option or a file name: exporters ignore options without a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from autosteer.runtime.manifest import PREFILL_GRAPHS

MATMULS = ("MatMul", "FusedMatMul", "Gemm")


@dataclass(frozen=True)
class Matrix:
    """One weight matrix that every decode step reads whole."""

    bits: int  # as stored
    block_size: int | None  # weights that share a scale; None: not block-quantised
    symmetric: bool  # no zero points
    bytes: int  # in memory while it runs, scales included


@dataclass(frozen=True)
class Weights:
    """The matrices of a model, in the order they are read."""

    matrices: tuple[Matrix, ...]
    reading: str = ""  # what others read prompts, described; empty: these do

    @property
    def bytes_per_token(self) -> int:
        """What one decode step reads of them."""
        return sum(matrix.bytes for matrix in self.matrices)

    @property
    def body(self) -> Matrix:
        """The kind most of them are of."""
        kinds = Counter((m.bits, m.block_size, m.symmetric) for m in self.matrices)
        return Matrix(*kinds.most_common(1)[0][0], bytes=0)

    def describe(self) -> str:
        """E.g. "120 x 4 bits in blocks of 32, 1 x 8 bits in blocks of 128"."""
        kinds = Counter((m.bits, m.block_size, m.symmetric) for m in self.matrices)
        step = ", ".join(f"{count} x {_kind(*kind)}" for kind, count in kinds.most_common())
        return f"{step}; prompts: {self.reading}" if self.reading else step


def _kind(bits: int, block_size: int | None, symmetric: bool) -> str:
    blocks = f" in blocks of {block_size}" if block_size else ""
    return f"{bits} bits{blocks}{'' if symmetric else ' with zero points'}"


def onnx_weights(*graphs: Path) -> Weights:
    """Of the graphs that make one decode step. Tables of which a step gathers one row do not count."""
    return Weights(tuple(matrix for path in graphs for matrix in _onnx_matrices(path)))


def _onnx_matrices(path: Path) -> Iterator[Matrix]:
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    cast = {
        node.output[0]: stored[node.input[0]]
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in stored  # folded at load: float32 from then on
    }
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            facts = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
            points = node.input[3] if len(node.input) > 3 else ""
            parts = [stored[name] for name in (*node.input[1:3], points) if name]
            yield Matrix(facts["bits"], facts["block_size"], not points, sum(map(_bytes, parts)))
        elif node.op_type == "MatMulIntegerToFloat":
            yield Matrix(8, None, True, _bytes(stored[node.input[1]]) + _bytes(stored[node.input[3]]))
        elif node.op_type in MATMULS:
            weight = stored.get(node.input[1]) or cast.get(node.input[1])
            if weight is not None:
                count = math.prod(weight.dims)
                itemsize = _bytes(weight) // count
                yield Matrix(8 * itemsize, None, True, count * (4 if node.input[1] in cast else itemsize))


def _bytes(tensor: onnx.TensorProto) -> int:
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * itemsize


def package_weights(folder: Path, graphs: dict[str, str]) -> Weights:
    """Of one of our packages; `graphs` maps graph names to files, as the manifest does."""
    step = onnx_weights(*(folder / graphs[name] for name in (*PREFILL_GRAPHS, "lm_head")))
    readers = [folder / graphs[name] for name in PREFILL_GRAPHS.values() if name in graphs]
    return replace(step, reading=onnx_weights(*readers).describe() if readers else "")

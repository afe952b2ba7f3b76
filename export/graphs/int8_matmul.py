"""int8 matmul: int8 weights, and activations that are quantised on the fly.

    x (.., K) [* smoothing] -> a row's scale = max|row| / 127 -> codes uint8, 128 for zero
              -> MatMulInteger with (K, N) int8 -> * the row's scale * the column's scale + bias

Every row (a token, a patch of a tile) has its own scale. Some rows have activations tens of times larger than others.
With one scale for all rows, as in onnxruntime's own DynamicQuantizeMatMul, such a row ruins all others: in an image
tower, one such patch among 729 causes an error of 22 %, against 1.1 % here. Scales per row take 1.1 to 1.3 times the
time.

Some columns of x have larger activations than others, in every row. Smoothing divides a column by a factor and
multiplies its weights by it (SmoothQuant, arXiv 2211.10438): x_j / s_j meets W_j * s_j. The factor is
s = channel_energy ^ SMOOTHING (calibration.py).

On x86 processors without VNNI, onnxruntime adds pairs of products in 16 bits. About one pair in 10,000 is clipped,
which adds an error of 1 to 2 %.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

MICROSOFT = "com.microsoft"
SMOOTHING = 0.2  # SmolLM2-135M: 0.1 to 0.3 are as good
SUFFIX = ".smoothing"  # end of the name of 1 / s in a graph


class Writer(Protocol):
    """Adds nodes to a graph: writer.GraphWriter, and dynamic_int8's for traced graphs."""

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One operator with one output."""

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """A small array inside the graph file, stored once per name."""


class Rows(NamedTuple):
    """Quantised activations: x = (codes - 128) * scales."""

    codes: ir.Value  # (.., K) uint8
    scales: ir.Value  # (.., 1) float32


def quantise_activations(g: Writer, x: ir.Value, smoothing: ir.Value | None = None) -> Rows:
    """Quantise x (.., K) float32, multiplied by `smoothing` (K,)."""
    if smoothing is not None:
        x = g.op("Mul", x, smoothing)
    axis, tiny = g.constant("int8.axis", np.array([-1], np.int64)), g.constant("int8.tiny", np.array(1e-30, np.float32))
    largest = g.op("ReduceMax", g.op("Abs", x), axis, keepdims=1)  # 0 for a row of zeros
    scales = g.op("Div", g.op("Max", largest, tiny), g.constant("int8.top", np.array(127, np.float32)))
    return Rows(g.op("QuantizeLinear", g.op("Div", x, scales), *_unit(g)), scales)


def product(g: Writer, rows: Rows, codes: ir.Value, scales: ir.Value) -> ir.Value:
    """Rows (.., K) through a matrix of `codes` (K, N) int8 and `scales` (N,): (.., N) float32."""
    one, zero = _unit(g)
    y = g.op("MatMulIntegerToFloat", rows.codes, codes, one, scales, zero, domain=MICROSOFT)
    return g.op("Mul", y, rows.scales)


def _unit(g: Writer) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of rows that were divided by their own scale."""
    return g.constant("int8.one", np.array(1, np.float32)), g.constant("int8.zero", np.array(128, np.uint8))


def smoothing_of(node: ir.Node) -> ir.Value | None:
    """The smoothing (K,) that a MatMulIntegerToFloat's activations are multiplied by; None without smoothing."""
    quantize = node.inputs[0] and node.inputs[0].producer()
    divide = quantize and quantize.inputs[0] and quantize.inputs[0].producer()
    multiply = divide and divide.inputs[0] and divide.inputs[0].producer()
    factor = multiply.inputs[1] if multiply and multiply.op_type == "Mul" else None
    return factor if factor is not None and factor.name and factor.name.endswith(SUFFIX) else None

"""Products in 8 bits on both sides: int8 weights, and activations that are quantised as they come.

    x (.., K) [* smoothing] -> a row's scale = max|row| / 127 -> codes uint8, 128 for zero
              -> MatMulInteger with (K, N) int8 -> * the row's scale * the column's scale + bias

Every row (a token, a patch of a tile) has its own scale: some have activations tens of times larger than the others',
and with one scale for all, as onnxruntime's own DynamicQuantizeMatMul has it, those others drown (measured in an image
tower: an error of 22 % with one such patch among 729, against 1.1 %; 1.1 to 1.3 times the time).

Some columns of x have larger activations than others, in every row. Smoothing divides them by a factor and multiplies
the weights by it (SmoothQuant, arXiv 2211.10438): x_j / s_j meets W_j * s_j, with s = channel_energy ^ SMOOTHING
(calibration.py).

On x86 processors without VNNI onnxruntime adds pairs of products in 16 bits, which clips about one pair in 10,000:
another 1 to 2 % of error there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

MICROSOFT = "com.microsoft"
SMOOTHING = 0.2  # SmolLM2-135M: any from .1 to .3 is as good
SUFFIX = ".smoothing"  # of the name of 1 / s in a graph


class Writer(Protocol):
    """What nodes are written with: graph.GraphWriter, and dynamic_int8's for graphs that were traced."""

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One operator with one output."""

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """A small array kept inside the graph file, once for each name."""


class Rows(NamedTuple):
    """Quantised activations: x = (codes - 128) * scales."""

    codes: ir.Value  # (.., K) uint8
    scales: ir.Value  # (.., 1) float32


def quantise_activations(g: Writer, x: ir.Value, smoothing: ir.Value | None = None) -> Rows:
    """x (.., K) float32, times `smoothing` (K,), in 8 bits."""
    if smoothing is not None:
        x = g.op("Mul", x, smoothing)
    axis, tiny = g.constant("int8.axis", np.array([-1], np.int64)), g.constant("int8.tiny", np.array(1e-30, np.float32))
    largest = g.op("ReduceMax", g.op("Abs", x), axis, keepdims=1)  # of a row of zeros: tiny
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
    """What the activations of a MatMulIntegerToFloat are multiplied with before they are quantised, (K,); None: as they
    are.
    """
    quantize = node.inputs[0] and node.inputs[0].producer()
    divide = quantize and quantize.inputs[0] and quantize.inputs[0].producer()
    multiply = divide and divide.inputs[0] and divide.inputs[0].producer()
    factor = multiply.inputs[1] if multiply and multiply.op_type == "Mul" else None
    return factor if factor is not None and factor.name and factor.name.endswith(SUFFIX) else None

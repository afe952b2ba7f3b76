"""Linear layers of a traced image graph in 8 bits: int8 weights, activations quantised as they come.

    x (.., K) -> a row's scale = max|row| / 127 -> codes uint8, 128 for zero -> MatMulInteger with (K, N) int8
              -> * the row's scale * the column's scale + bias

Every row (a patch of a tile) has its own scale: towers have patches with activations tens of times larger than the
others', and with one scale for all, as onnxruntime's own DynamicQuantizeMatMul has it, those others drown (measured: an
error of 22 % with one such patch among 729, against 1.1 %; 1.1 to 1.3 times the time).

On x86 processors without VNNI onnxruntime adds pairs of products in 16 bits, which clips about one pair in 10,000:
another 1 to 2 % of error there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import MICROSOFT
from .weights import WeightStore


def quantise_linears(graph: ir.Graph, store: WeightStore) -> None:
    """Rewrite every `x @ transpose(weight)` of `graph`; weights stream from the checkpoint into `store`, and leave the
    graph's initialisers. Convolutions, norms, biases and attention stay as they are.
    """
    constants = {
        name: _constant(graph, name, array)
        for name, array in {
            "int8.axis": np.array([-1], np.int64),
            "int8.tiny": np.array(1e-30, np.float32),  # a row of zeros has a scale, too
            "int8.top": np.array(127, np.float32),
            "int8.one": np.array(1, np.float32),
            "int8.zero": np.array(128, np.uint8),
        }.items()
    }
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # query, key and value read the same x: quantised once
    for node in list(graph):
        transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight, x = transpose.inputs[0], node.inputs[0]
        if weight is None or x is None or weight.name not in graph.initializers:
            continue
        if x not in rows:
            rows[x] = _quantise_rows(graph, node, x, constants)
        _replace(graph, node, weight, rows[x], constants, store)
        graph.remove(node, safe=True)
        if not transpose.outputs[0].uses():
            graph.remove(transpose, safe=True)
            del graph.initializers[weight.name]


def _quantise_rows(graph: ir.Graph, before: ir.Node, x: ir.Value, c: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Codes (.., K) uint8 and scales (.., 1) of x, computed ahead of node `before`."""

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return _insert(graph, before, kind, inputs, "", attributes)

    largest = op("ReduceMax", op("Abs", x), c["int8.axis"], keepdims=1)
    scale = op("Div", op("Max", largest, c["int8.tiny"]), c["int8.top"])
    return op("QuantizeLinear", op("Div", x, scale), c["int8.one"], c["int8.zero"]), scale


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    weight: ir.Value,
    quantised_rows: tuple[ir.Value, ir.Value],
    c: dict[str, ir.Value],
    store: WeightStore,
) -> None:
    assert weight.name is not None and weight.shape is not None
    codes, row_scale = quantised_rows
    n, k = (int(d) for d in weight.shape)
    parts = {
        part: _initializer(graph, f"{weight.name}.{part}", tensor)
        for part, tensor in store.columns(weight.name, (n, k)).items()
    }
    inputs = (codes, parts["codes"], c["int8.one"], parts["scales"], c["int8.zero"])
    product = _insert(graph, node, "MatMulIntegerToFloat", inputs, MICROSOFT, {})
    old, new = node.outputs[0], _insert(graph, node, "Mul", (product, row_scale), "", {})
    if old.is_graph_output():
        (new.name, old.name), new.shape, new.type = (old.name, None), old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _insert(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: tuple[ir.Value, ...], domain: str, attributes: dict[str, int]
) -> ir.Value:
    node = ir.Node(domain, kind, inputs, [ir.AttrInt64(name, value) for name, value in attributes.items()])
    graph.insert_before(before, node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    return _initializer(graph, name, ir.tensor(array, name=name))


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape([int(d) for d in tensor.shape]), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.initializers[name] = value
    return value

"""Rewrite the linear layers of a traced image graph as int8 matmul (int8_matmul.py)."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from .int8_matmul import Rows, product, quantise_activations
from .weights import WeightStore


def quantise_linears(graph: ir.Graph, store: WeightStore) -> None:
    """Rewrite every `x @ transpose(weight)` of `graph`, and every `x @ transpose(weight) + bias`. Its weights leave the
    graph's initialisers, and `store` streams them from the checkpoint. Convolutions, norms, biases and attention are
    unchanged.
    """
    rows: dict[ir.Value, Rows] = {}  # query, key and value have the same input: quantise it once
    for node in list(graph):
        weight, x = linear_weight(node), node.inputs[0] if node.inputs else None
        if weight is None or x is None or weight.name not in graph.initializers:
            continue
        g = _Inserting(graph, node)
        if x not in rows:
            rows[x] = quantise_activations(g, x)
        transpose = node.inputs[1] and node.inputs[1].producer()
        _replace(g, weight, rows[x], store)
        graph.remove(node, safe=True)
        if transpose and not transpose.outputs[0].uses():
            graph.remove(transpose, safe=True)
        if not weight.uses():
            assert weight.name is not None
            del graph.initializers[weight.name]


def linear_weight(node: ir.Node) -> ir.Value | None:
    """The weight (N, K) of a linear layer as PyTorch's exporter writes it: MatMul with a Transpose for rows (.., S, K),
    Gemm for rows (S, K); None for other nodes.
    """
    if node.op_type == "Gemm":
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
        return node.inputs[1] if {**plain, "transB": 0, **given} == plain else None
    transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
    return transpose.inputs[0] if transpose and transpose.op_type == "Transpose" else None


class _Inserting:
    """A Writer that inserts nodes into a graph before a given node."""

    def __init__(self, graph: ir.Graph, before: ir.Node):
        self.graph, self.before = graph, before

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Insert an operator; its first output."""
        node = ir.Node(domain, kind, inputs, [ir.AttrInt64(name, value) for name, value in attributes.items()])
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """An array as an initialiser."""
        return self.initialiser(name, ir.tensor(array, name=name))

    def initialiser(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The graph's initialiser of this name, added if it is not there."""
        if name not in self.graph.initializers:
            value = ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.initializers[name] = value
        return self.graph.initializers[name]


def _replace(g: _Inserting, weight: ir.Value, rows: Rows, store: WeightStore) -> None:
    """Replace the node that `g` inserts before by the product of `rows` and `weight`."""
    assert weight.name is not None and weight.shape is not None
    shape = weight.shape.numpy()
    parts = store.columns([weight.name], (shape[0], shape[1]))
    codes, scales = (g.initialiser(f"{weight.name}.{part}", parts[part]) for part in ("codes", "scales"))
    old, new = g.before.outputs[0], product(g, rows, codes, scales)
    if len(g.before.inputs) > 2:
        new = g.op("Add", new, g.before.inputs[2])
    if old.is_graph_output():
        (new.name, old.name), new.shape, new.type = (old.name, None), old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)

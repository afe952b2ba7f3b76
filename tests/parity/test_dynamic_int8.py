"""The image graph in 8 bits computes what it did, patches with outliers beside the others included."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from exported import demo_checkpoint, demo_package
from tiny_weights import Weights, random_weights

from autosteer.export.graphs.dynamic_int8 import quantise_linears
from autosteer.export.graphs.weights import WeightStore
from autosteer.export.graphs.writer import MICROSOFT, OPSET
from autosteer.runtime.manifest import Manifest

K, N = 96, 40


def quantised(folder: Path) -> tuple[ort.InferenceSession, Weights, ir.Graph]:
    """x (B, S, K) -> x a^T, x b^T, as traced and then quantised."""
    x = ir.Value(name="x", shape=ir.Shape(["B", "S", K]), type=ir.TensorType(ir.DataType.FLOAT))
    initialisers, nodes, outputs = [], [], []
    for name in "ab":
        weight = ir.Value(name=f"{name}.weight", shape=ir.Shape([N, K]), type=ir.TensorType(ir.DataType.FLOAT))
        transpose = ir.Node("", "Transpose", [weight], [ir.AttrInt64s("perm", [1, 0])])
        product = ir.Node("", "MatMul", [x, transpose.outputs[0]])
        out = ir.Node("", "Identity", [product.outputs[0]])
        out.outputs[0].name, out.outputs[0].type = f"y{name}", x.type
        out.outputs[0].shape = ir.Shape(["B", "S", N])
        initialisers.append(weight)
        nodes += [transpose, product, out]
        outputs.append(out.outputs[0])
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=initialisers, opset_imports={"": OPSET, MICROSOFT: 1})
    weights = random_weights("a.weight", "b.weight", shape=(N, K))
    store = WeightStore(folder, weights)  # type: ignore[arg-type]
    quantise_linears(graph, store)
    store.close()
    ir.save(ir.Model(graph, ir_version=10), folder / "g.onnx")
    return ort.InferenceSession(folder / "g.onnx", providers=["CPUExecutionProvider"]), weights, graph


def test_a_linear_layer_of_rows_without_a_batch_is_int8_with_its_bias(tmp_path: Path) -> None:
    """PyTorch's exporter writes it as Gemm: Qwen-VL's towers stayed in float32, and were said to be int8."""
    x = ir.Value(name="x", shape=ir.Shape(["S", K]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="a.weight", shape=ir.Shape([N, K]), type=x.type)
    added = np.arange(N, dtype=np.float32)
    bias = ir.Value(name="a.bias", shape=ir.Shape([N]), type=x.type, const_value=ir.tensor(added))
    gemm = ir.Node("", "Gemm", [x, weight, bias], [ir.AttrInt64("transB", 1)])
    gemm.outputs[0].name, gemm.outputs[0].type, gemm.outputs[0].shape = "y", x.type, ir.Shape(["S", N])
    imports = {"": OPSET, MICROSOFT: 1}
    graph = ir.Graph([x], gemm.outputs, nodes=[gemm], initializers=[weight, bias], opset_imports=imports)
    weights = random_weights("a.weight", shape=(N, K))
    store = WeightStore(tmp_path, weights)  # type: ignore[arg-type]
    quantise_linears(graph, store)
    store.close()
    assert [node.op_type for node in graph].count("MatMulIntegerToFloat") == 1
    assert not any(node.op_type == "Gemm" for node in graph) and "a.weight" not in graph.initializers
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
    session = ort.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(0).standard_normal((9, K), dtype=np.float32)
    expected = rows @ weights.tensors["a.weight"].numpy().T
    assert relative(session.run(None, {"x": rows})[0] - added, expected) < 0.015


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_products_are_those_of_the_weights_within_a_percent_and_a_half(tmp_path: Path) -> None:
    session, weights, _ = quantised(tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 9, K), dtype=np.float32)
    for ours, weight in zip(session.run(None, {"x": x}), weights.tensors.values(), strict=True):
        assert relative(ours, x @ weight.numpy().T) < 0.015


def test_a_patch_with_huge_activations_does_not_drown_the_others(tmp_path: Path) -> None:
    session, weights, _ = quantised(tmp_path)
    x = np.random.default_rng(0).standard_normal((1, 9, K), dtype=np.float32)
    x[0, 4] *= 1000
    ours, theirs = session.run(None, {"x": x})[0], x @ weights.tensors["a.weight"].numpy().T
    assert relative(np.delete(ours, 4, 1), np.delete(theirs, 4, 1)) < 0.015


def test_rows_of_zeros_stay_zero(tmp_path: Path) -> None:
    session, _, _ = quantised(tmp_path)
    assert (session.run(None, {"x": np.zeros((1, 3, K), np.float32)})[0] == 0).all()


def test_two_matrices_that_read_the_same_rows_quantise_them_once(tmp_path: Path) -> None:
    _, _, graph = quantised(tmp_path)
    kinds = [node.op_type for node in graph]
    assert (kinds.count("QuantizeLinear"), kinds.count("MatMulIntegerToFloat"), kinds.count("MatMul")) == (1, 2, 0)


def test_the_towers_matrices_are_int8_in_int8_and_int4_packages_and_its_features_agree() -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32)
    features = {}
    for precision in ("fp32", "int8", "int4"):
        folder = demo_package(precision)
        assert Manifest.load(folder).graphs["vision_encoder"].precision == ("fp32" if precision == "fp32" else "int8")
        session = ort.InferenceSession(folder / "vision_encoder.onnx", providers=["CPUExecutionProvider"])
        features[precision] = session.run(None, {"pixel_values": pixels})[0]
    np.testing.assert_array_equal(features["int8"], features["int4"])
    assert 1e-6 < relative(features["int8"], features["fp32"]) < 0.05
    names = {
        t.name
        for t in onnx.load(demo_package("int8") / "vision_encoder.onnx", load_external_data=False).graph.initializer
    }
    linears = [
        n for n in demo_checkpoint().tensor_files if "vision_tower" in n and n.endswith(("proj.weight", "fc1.weight"))
    ]
    assert linears and not names & set(linears)
    assert all(f"{n}.{part}" in names for n, part in itertools.product(linears, ("codes", "scales")))

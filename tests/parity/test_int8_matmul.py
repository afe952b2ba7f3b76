"""The decoder's products in 8 bits on both sides are those of the checkpoint, and of what is unpacked."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from exported import demo_package
from tiny_weights import Weights, random_weights

from autosteer.export.graphs.quantize import Blocks, PerChannel, recipe
from autosteer.export.graphs.weights import WeightStore
from autosteer.export.graphs.writer import GraphWriter
from autosteer.export.validation.dequantize import _mat_mul_integer

K, N = 96, 40
X = np.random.default_rng(0).standard_normal((1, 9, K), dtype=np.float32)


def three_projections() -> Weights:
    """One of them has a bias."""
    weights = random_weights("a.weight", "b.weight", "c.weight", shape=(N, K))
    weights.tensors["a.bias"] = torch.randn(N, generator=torch.Generator().manual_seed(2))
    return weights


def written(folder: Path, channel_energy: torch.Tensor | None = None) -> tuple[ort.InferenceSession, Weights, ir.Graph]:
    """x -> a (with its bias); b and c stacked."""
    weights = three_projections()
    store = WeightStore(folder, weights)  # type: ignore[arg-type]
    if channel_energy is not None:
        store.channel_energy = {f"{name}.weight": channel_energy for name in "abc"}
    g = GraphWriter("g", store, "float32")
    x = g.input("x", "float32", (1, "S", K))
    g.output("a", g.linear(x, "a", shape=(N, K), bias=True, scheme=PerChannel()), "float32", (1, "S", N))
    g.output("bc", g.linear(x, "b", "c", shape=(2 * N, K), scheme=PerChannel()), "float32", (1, "S", 2 * N))
    g.save(folder, "int8")
    store.close()
    path = folder / "g.onnx"
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]), weights, ir.load(path).graph


def true(weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c = (weights.tensors[f"{name}.weight"].numpy() for name in "abc")
    return x @ a.T + weights.tensors["a.bias"].numpy(), x @ np.concatenate([b, c]).T


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_products_stacks_and_biases_are_the_checkpoints_within_a_percent_and_a_half(tmp_path: Path) -> None:
    session, weights, _ = written(tmp_path)
    for ours, theirs in zip(session.run(None, {"x": X}), true(weights, X), strict=True):
        assert 1e-3 < error(ours, theirs) < 0.015


def test_a_row_comes_out_the_same_alone_and_among_others(tmp_path: Path) -> None:
    """So chunks and drafts change nothing: sums of integers are exact, and each row has its own scale."""
    session, _, _ = written(tmp_path)
    x = X.copy()
    x[0, 4] *= 1000
    together = session.run(None, {"x": x})
    for row in range(9):
        for whole, single in zip(together, session.run(None, {"x": x[:, row : row + 1]}), strict=True):
            np.testing.assert_array_equal(whole[:, row], single[:, 0])


def test_lively_columns_drown_the_others_and_less_so_when_smoothed(tmp_path: Path) -> None:
    """As in a real decoder: a few channels of x are tens of times larger, in every row."""
    liveliness = np.ones(K, np.float32)
    liveliness[::24] = 60.0
    x = X * liveliness
    channel_energy = torch.from_numpy(np.square(x).mean((0, 1)))
    folders = {kind: tmp_path / kind for kind in ("plain", "smooth")}
    errors = {}
    for kind, folder in folders.items():
        folder.mkdir()
        session, weights, _ = written(folder, channel_energy / channel_energy.mean() if kind == "smooth" else None)
        quiet = torch.from_numpy(liveliness == 1)
        for name in "abc":  # what matters is that the quiet columns are heard
            weights.tensors[f"{name}.weight"][:, ~quiet] = 0
        ours, theirs = session.run(None, {"x": x})[1], true(weights, x * (liveliness == 1))[1]
        loud = true(three_projections(), x * (liveliness != 1))[1]
        errors[kind] = error(ours - loud, theirs)
    assert errors["smooth"] < 0.6 * errors["plain"]


def test_what_is_dequantised_is_what_the_kernel_multiplies_with(tmp_path: Path) -> None:
    """Rows of one number each are exact in 8 bits; what comes out is the matrix. With smoothing, taken off again."""
    session, weights, graph = written(tmp_path, torch.linspace(0.01, 4, K))
    bias = weights.tensors["a.bias"].numpy()
    a, bc = session.run(None, {"x": np.eye(K, dtype=np.float32)[None]})
    first, second = (node for node in graph if node.op_type == "MatMulIntegerToFloat")
    for node, kernel in ((first, a[0] - bias), (second, bc[0])):
        np.testing.assert_allclose(_mat_mul_integer(node, slice(None)).weights.numpy(), kernel.T, rtol=1e-5, atol=1e-6)


def test_what_multiplies_the_same_rows_quantises_them_once(tmp_path: Path) -> None:
    kinds = [node.op_type for node in written(tmp_path)[2]]
    assert (kinds.count("QuantizeLinear"), kinds.count("MatMulIntegerToFloat")) == (1, 2)
    graphs = [ir.load(demo_package("int8") / f"{half}.onnx").graph for half in ("decoder_lower", "decoder_upper")]
    kinds = [node.op_type for graph in graphs for node in graph]
    layers = kinds.count("GroupQueryAttention")
    assert layers == 8
    assert kinds.count("QuantizeLinear") == 4 * layers  # before qkv, o, gate and up, down
    assert kinds.count("MatMulIntegerToFloat") == 5 * layers and "MatMulNBits" not in kinds


def test_int8_is_per_channel_on_a_cpu_and_in_blocks_on_request_and_on_cuda() -> None:
    assert recipe("int8").body == PerChannel()
    assert recipe("int8", block_size=64).body == Blocks(8, 64)
    assert recipe("int8", target="cuda").body == Blocks(8, 128)
    assert recipe("int8", head_bits=8) == recipe("int8")

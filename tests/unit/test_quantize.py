"""Our blocks are onnxruntime's blocks, and what rounding costs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from tiny_weights import Weights

from autosteer.export.graphs import quantize
from autosteer.export.graphs.quantize import Blocks, Packed, dequantise, flat_nibbles, quantise, recipe
from autosteer.export.graphs.weights import WeightStore
from autosteer.runtime.errors import InputError

OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def weights(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * k)
    return torch.randn(n, k, generator=generator)


def initialiser(name: str, kind: int, tensor: torch.Tensor) -> Any:
    return helper.make_tensor(name, kind, tensor.shape, tensor.numpy().tobytes(), raw=True)


def kernels_weights(packed: Packed, blocks: Blocks, n: int, k: int) -> np.ndarray:
    """(N, K) that MatMulNBits multiplies with: its product with the identity, activations in float32."""
    names = ["x", "codes", "scales"]
    tensors = [
        initialiser("codes", TensorProto.UINT8, packed.codes),
        initialiser("scales", TensorProto.FLOAT, packed.scales),
    ]
    if packed.zero_points is not None:
        names.append("zero_points")
        tensors.append(initialiser("zero_points", TensorProto.UINT8, packed.zero_points))
    attributes = {"K": k, "N": n, "bits": blocks.bits, "block_size": blocks.size}
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [k, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [k, n])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    product: np.ndarray = session.run(None, {"x": np.eye(k, dtype=np.float32)})[0]
    return product.T


@pytest.mark.parametrize("size", [32, 64, 128])
def test_four_bit_codes_and_scales_are_those_of_onnxruntimes_own_quantiser(size: int) -> None:
    n, k = 24, 256
    w = weights(n, k)
    packed = quantise(w, Blocks(4, size))
    count = k // size
    expected_codes = np.zeros((n, count, size // 2), np.uint8)
    expected_scales = np.zeros(n * count, np.float32)
    zero_points = np.zeros(n * ((count + 1) // 2), np.uint8)
    transposed = np.ascontiguousarray(w.numpy().T)
    quantize_matmul_4bits(expected_codes, transposed, expected_scales, zero_points, size, n, k, True)
    np.testing.assert_array_equal(packed.codes.numpy(), expected_codes)
    np.testing.assert_allclose(packed.scales.numpy().ravel(), expected_scales, rtol=1e-6)


@pytest.mark.parametrize("k", [32, 96, 128, 200, 576])  # one block; an odd number of blocks; a row that is padded
@pytest.mark.parametrize("blocks", [Blocks(4, 32), Blocks(4, 32, False), Blocks(4, 128, False), Blocks(8, 64)], ids=str)
def test_we_unpack_what_onnxruntime_multiplies_with(blocks: Blocks, k: int) -> None:
    """Nibbles, zero points and padding stand where the kernel looks for them."""
    packed = quantise(weights(8, k) + 0.3, blocks)
    ours = dequantise(packed, blocks, k).numpy()
    np.testing.assert_allclose(kernels_weights(packed, blocks, 8, k), ours, atol=1e-5)


@pytest.mark.parametrize(("bits", "bound"), [(4, 1 / 8), (8, 1 / 128)])
def test_no_weight_moves_by_more_than_one_step_of_its_block(bits: int, bound: float) -> None:
    w = weights(16, 96)
    blocks = Blocks(bits, 32)
    back = dequantise(quantise(w, blocks), blocks, 96)
    largest = w.reshape(16, 3, 32).abs().amax(2, keepdim=True)
    assert ((back - w).reshape(16, 3, 32).abs() <= largest * bound * 1.001).all()


def test_a_row_that_is_no_multiple_of_the_block_is_padded_and_comes_back_whole() -> None:
    w = weights(4, 40)
    packed = quantise(w, Blocks(8, 32))
    assert packed.codes.shape == (4, 2, 32)
    assert (dequantise(packed, Blocks(8, 32), 40) - w).abs().max() < 0.03


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_zeros_stays_zero(symmetric: bool) -> None:
    blocks = Blocks(4, 32, symmetric)
    assert (dequantise(quantise(torch.zeros(2, 32), blocks), blocks, 32) == 0).all()


def nearest_asymmetric(w: torch.Tensor) -> torch.Tensor:
    """One block a row, rounded to nearest on the 16 steps between its smallest and its largest weight (and zero)."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).clamp(min=1e-30)
    zero = torch.round(-low / step)
    return (torch.round(w / step + zero).clamp(0, 15) - zero) * step


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), tail=st.sampled_from([1.0, 2.0, 4.0]), shift=st.floats(-3, 3), on_grid=st.booleans())
@example(seed=143, tail=1.0, shift=-2.0, on_grid=True)  # an error below float32's share of the weights' squares
def test_searched_blocks_are_never_worse_than_rounding_to_nearest(
    seed: int, tail: float, shift: float, on_grid: bool
) -> None:
    """Weighted error against both kinds of nearest, for tails of any weight, one-sided blocks, and weights that stand
    on a symmetric grid (a checkpoint that was quantised before).
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 32, generator=generator)
    w = w.sign() * w.abs() ** tail + shift
    channel_energy = torch.rand(32, generator=generator) ** 4
    if on_grid:
        w = dequantise(quantise(w, Blocks(4, 32)), Blocks(4, 32), 32)

    def error(rounded: torch.Tensor) -> torch.Tensor:
        return ((rounded - w).double() ** 2 * channel_energy).sum(1)

    searched = Blocks(4, 32, symmetric=False)
    ours = error(dequantise(quantise(w, searched, channel_energy), searched, 32))
    nearest = error(nearest_asymmetric(w)), error(dequantise(quantise(w, Blocks(4, 32)), Blocks(4, 32), 32))
    allowed = torch.minimum(*nearest) * (1 + 1e-4) + 1e-9 * (w.double() ** 2).sum(1)
    assert (ours <= allowed).all()


def test_important_columns_are_rounded_more_closely() -> None:
    w, blocks = weights(64, 256), Blocks(4, 128, symmetric=False)
    channel_energy = torch.ones(256)
    channel_energy[::16] = 300.0
    plain, weighted = (dequantise(quantise(w, blocks, i), blocks, 256) - w for i in (None, channel_energy))
    assert weighted[:, ::16].square().sum() < 0.8 * plain[:, ::16].square().sum()


def test_rounding_does_not_depend_on_how_many_rows_come_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    """weights.bin, written in blocks of 5 rows and in chunks of 3, holds what the whole matrix gives."""
    blocks = Blocks(4, 32, symmetric=False)
    channel_energy = torch.arange(1.0, 97.0)
    whole = quantise(weights(24, 96), blocks, channel_energy)
    monkeypatch.setattr(quantize, "CHUNK", 3 * 96)
    store = WeightStore(tmp_path, Weights({"w": weights(24, 96)}, at_a_time=5))  # type: ignore[arg-type]
    store.channel_energy = {"w": channel_energy}
    parts = store.quantised(["w"], blocks, (24, 96))
    store.close()
    assert whole.zero_points is not None
    for part, tensor in (("codes", whole.codes), ("scales", whole.scales), ("zero_points", whole.zero_points)):
        np.testing.assert_array_equal(parts[part].numpy(), tensor.numpy())


def test_block_size_and_image_precision_override_the_recipe_and_nothing_else() -> None:
    chosen, usual = recipe("int4", block_size=32, image="fp32"), recipe("int4")
    assert usual.body is not None
    assert chosen == replace(usual, body=replace(usual.body, size=32), image="fp32")


def test_a_block_size_for_a_precision_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="--block-size 32: fp16 has no blocks"):
        recipe("fp16", block_size=32)


def test_a_four_bit_head_has_the_bodys_blocks() -> None:
    chosen = recipe("int4", block_size=32, head_bits=4)
    assert chosen.head == chosen.body == Blocks(4, 32, symmetric=False)
    assert recipe("int4", head_bits=8) == recipe("int4")
    with pytest.raises(InputError, match="--head-bits 4: int8 has no such head"):
        recipe("int8", head_bits=4)


@pytest.mark.parametrize("d", [64, 96])  # an odd number of blocks leaves half of the last byte of zero points empty
@pytest.mark.parametrize("blocks", [Blocks(4, 32), Blocks(8, 32), Blocks(4, 32, symmetric=False)], ids=str)
def test_tied_embedding_and_head_read_the_same_bytes_alike(blocks: Blocks, d: int) -> None:
    """GatherBlockQuantized and MatMulNBits on one blob: rows of the table are the columns of the head."""
    v = 48
    packed = quantise(weights(v, d) + 0.3, blocks)
    names = ["table", "ids", "scales"]
    scales = initialiser("scales", TensorProto.FLOAT, packed.scales)
    tensors = [initialiser("table", TensorProto.UINT8, packed.codes.reshape(v, -1)), scales]
    if packed.zero_points is not None:
        names.append("zero_points")
        flat = flat_nibbles(packed.zero_points.numpy(), d // blocks.size)
        table, zero_points = packed.codes.numpy().tobytes(), flat.tobytes()
        tensors = [
            helper.make_tensor("table", TensorProto.UINT4, (v, d), table, raw=True),
            helper.make_tensor("zero_points", TensorProto.UINT4, (v, d // blocks.size), zero_points, raw=True),
            scales,
        ]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": blocks.bits, "block_size": blocks.size}
    graph = helper.make_graph(
        [helper.make_node("GatherBlockQuantized", names, ["rows"], domain="com.microsoft", **attributes)],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [v])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [v, d])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"ids": np.arange(v)})
    np.testing.assert_allclose(rows, dequantise(packed, blocks, d).numpy(), rtol=1e-6, atol=1e-6)

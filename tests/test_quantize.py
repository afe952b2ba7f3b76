"""Tier 4: our blocks are onnxruntime's blocks."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits

from autosteer.export.quantize import Blocks, dequantise, quantise


def weights(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * k)
    return torch.randn(n, k, generator=generator)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_four_bit_codes_and_scales_are_those_of_onnxruntimes_own_quantiser(size: int) -> None:
    n, k = 24, 256
    w = weights(n, k)
    codes, scales = quantise(w, Blocks(4, size))
    count = k // size
    expected_codes = np.zeros((n, count, size // 2), np.uint8)
    expected_scales = np.zeros(n * count, np.float32)
    zero_points = np.zeros(n * ((count + 1) // 2), np.uint8)
    transposed = np.ascontiguousarray(w.numpy().T)
    quantize_matmul_4bits(expected_codes, transposed, expected_scales, zero_points, size, n, k, True)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_allclose(scales.numpy().ravel(), expected_scales, rtol=1e-6)


@pytest.mark.parametrize(("bits", "bound"), [(4, 1 / 8), (8, 1 / 128)])
def test_no_weight_moves_by_more_than_one_step_of_its_block(bits: int, bound: float) -> None:
    w = weights(16, 96)
    blocks = Blocks(bits, 32)
    back = dequantise(*quantise(w, blocks), blocks, 96)
    largest = w.reshape(16, 3, 32).abs().amax(2, keepdim=True)
    assert ((back - w).reshape(16, 3, 32).abs() <= largest * bound * 1.001).all()


def test_a_row_that_is_no_multiple_of_the_block_is_padded_and_comes_back_whole() -> None:
    w = weights(4, 40)
    codes, scales = quantise(w, Blocks(8, 32))
    assert codes.shape == (4, 2, 32)
    assert (dequantise(codes, scales, Blocks(8, 32), 40) - w).abs().max() < 0.03


def test_a_block_of_zeros_stays_zero() -> None:
    w = torch.zeros(2, 32)
    assert (dequantise(*quantise(w, Blocks(4, 32)), Blocks(4, 32), 32) == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_embedding_and_head_read_the_same_bytes_alike(bits: int) -> None:
    """GatherBlockQuantized and MatMulNBits on one blob: rows of the table are the columns of the head."""
    v, d, blocks = 48, 64, Blocks(bits, 32)
    codes, scales = quantise(weights(v, d), blocks)
    table = codes.numpy().reshape(v, -1)
    graph = helper.make_graph(
        [
            helper.make_node(
                "GatherBlockQuantized",
                ["table", "ids", "scales"],
                ["rows"],
                domain="com.microsoft",
                gather_axis=0,
                quantize_axis=1,
                bits=bits,
                block_size=32,
            )
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [v])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [v, d])],
        [
            helper.make_tensor("table", TensorProto.UINT8, table.shape, table.tobytes(), raw=True),
            helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.numpy().tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"ids": np.arange(v)})
    np.testing.assert_allclose(rows, dequantise(codes, scales, blocks, d).numpy(), rtol=1e-6)

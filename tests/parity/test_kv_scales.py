"""int8 KV caches: what onnxruntime's operator does, by numpy; scales; packages that have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from exported import INT8_CACHES, demo_checkpoint, demo_engine, demo_package
from onnx import TensorProto, helper, numpy_helper

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.cli import export
from autosteer.export.footprint import footprint
from autosteer.export.graphs import kv_scales
from autosteer.export.graphs.kv_scales import HEADROOM, KVScales, RangeObserver, RoundedCaches
from autosteer.export.graphs.quantize import recipe
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.validation import validate
from autosteer.export.validation.dequantize import packed_kv_scales
from autosteer.export.validation.limits import LIMITS
from autosteer.runtime import Conversation, Engine, Message, SamplingConfig
from autosteer.runtime.errors import CheckError, InputError
from autosteer.runtime.manifest import Manifest, RotarySpec
from autosteer.runtime.stats import Stats

HEADS, KV_HEADS, WIDTH, CONTEXT = 4, 2, 16, 64
ROTARY = RotarySpec(tuple(10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)), 1.0, ())
CPU = "CPUExecutionProvider"
SHORT = SamplingConfig(max_tokens=12)
Float = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]


# --- the operator ----------------------------------------------------------------------------------------------------


def tables() -> tuple[Float, Float]:
    """cos and sin (CONTEXT, WIDTH / 2)."""
    angle = np.arange(CONTEXT)[:, None] * np.array(ROTARY.frequencies)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def some_scales() -> KVScales:
    """So small that some codes are clamped."""
    n = KV_HEADS * WIDTH
    return KVScales(np.linspace(0.01, 0.03, n, dtype=np.float32), np.linspace(0.015, 0.035, n, dtype=np.float32))


def attention_session() -> ort.InferenceSession:
    """GroupQueryAttention as export/graphs/decoder.py writes it, alone."""
    scales, (cos, sin) = some_scales(), tables()
    arrays = {"cos": cos, "sin": sin, "key_scales": scales.keys, "value_scales": scales.values}
    node = helper.make_node(
        "GroupQueryAttention",
        [
            *("qkv", "", "", "past_key", "past_value", "seqlens_k", "total", "cos", "sin"),
            *("", "", "", "key_scales", "value_scales"),
        ],
        ["attended", "key", "value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=WIDTH**-0.5,
        do_rotary=1,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
    )
    f32, int8, int32 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT32
    inputs = [
        helper.make_tensor_value_info("qkv", f32, [1, "S", (HEADS + 2 * KV_HEADS) * WIDTH]),
        *(helper.make_tensor_value_info(f"past_{k}", int8, [1, KV_HEADS, "P", WIDTH]) for k in ("key", "value")),
        helper.make_tensor_value_info("seqlens_k", int32, [1]),
        helper.make_tensor_value_info("total", int32, []),
    ]
    outputs = [
        helper.make_tensor_value_info("attended", f32, [1, "S", HEADS * WIDTH]),
        *(helper.make_tensor_value_info(k, int8, [1, KV_HEADS, "T", WIDTH]) for k in ("key", "value")),
    ]
    graph = helper.make_graph(
        [node], "attention", inputs, outputs, [numpy_helper.from_array(a, name) for name, a in arrays.items()]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def attend(qkv: Float, passes: list[int]) -> tuple[Float, Codes, Codes]:
    """qkv (1, S, ..) in passes of so many rows, past and present in one buffer: attended (S, H * d), keys, values."""
    session = attention_session()
    keys, values = (np.zeros((1, KV_HEADS, CONTEXT, WIDTH), np.int8) for _ in range(2))
    attended, done = np.zeros((qkv.shape[1], HEADS * WIDTH), np.float32), 0
    for count in passes:
        rows, out = slice(done, done + count), np.zeros((1, count, HEADS * WIDTH), np.float32)
        done += count
        binding = session.io_binding()
        inputs = {  # a binding does not keep them alive
            "qkv": np.ascontiguousarray(qkv[:, rows]),
            "seqlens_k": np.array([done - 1], np.int32),
            "total": np.array(done, np.int32),
        }
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, cache in (("key", keys), ("value", values)):
            both = ort.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(f"past_{name}", both)
            binding.bind_ortvalue_output(name, both)
        binding.bind_ortvalue_output("attended", ort.OrtValue.ortvalue_from_numpy(out))
        session.run_with_iobinding(binding)
        attended[rows] = out[0]
    return attended, keys[0, :, :done], values[0, :, :done]


def expected(qkv: Float) -> tuple[Float, Codes, Codes]:
    """The same by numpy."""
    count, scales, (cos, sin) = qkv.shape[1], some_scales(), tables()
    query, key, value = np.split(qkv[0], [HEADS * WIDTH, (HEADS + KV_HEADS) * WIDTH], axis=-1)

    def turned(x: Float) -> Float:
        """(S, h * d) -> (h, S, d), rotary applied."""
        first, second = np.split(x.reshape(count, -1, WIDTH).transpose(1, 0, 2), 2, axis=-1)
        c, s = cos[:count], sin[:count]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    def rounded(x: Float, scale: Float) -> tuple[Codes, Float]:
        by_head = scale.reshape(KV_HEADS, 1, WIDTH)
        codes = np.clip(np.round(x / by_head), -128, 127)
        return codes.astype(np.int8), np.repeat(codes * by_head, HEADS // KV_HEADS, axis=0)

    keys, k = rounded(turned(key), scales.keys)
    values, v = rounded(value.reshape(count, KV_HEADS, WIDTH).transpose(1, 0, 2), scales.values)
    scores = turned(query) @ k.transpose(0, 2, 1) * WIDTH**-0.5
    scores[:, ~np.tri(count, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = (weights / weights.sum(-1, keepdims=True)) @ v
    return attended.transpose(1, 0, 2).reshape(count, -1), keys, values


@pytest.mark.parametrize("passes", [[20], [7, 13], [10, 3, 4, 1, 2], [1] * 20], ids=str)
def test_the_operator_attends_to_rounded_keys_and_values_however_rows_come(passes: list[int]) -> None:
    """Prompts in chunks, drafts of several rows, single tokens: codes and attention are those of one pass by numpy."""
    shape = (1, 20, (HEADS + 2 * KV_HEADS) * WIDTH)
    qkv = np.random.default_rng(0).normal(scale=1.2, size=shape).astype(np.float32)
    attended, keys, values = attend(qkv, passes)
    rows, key_codes, value_codes = expected(qkv)
    assert key_codes.min() == -128 and key_codes.max() == 127, "nothing was clamped"
    np.testing.assert_array_equal(keys, key_codes)
    np.testing.assert_array_equal(values, value_codes)
    np.testing.assert_allclose(attended, rows, rtol=0, atol=2e-6)


# --- scales ----------------------------------------------------------------------------------------------------------


def test_scales_reach_as_far_as_a_key_does_anywhere_in_the_context() -> None:
    """Keys of one place, turned to every other one; values as they are."""
    rng = np.random.default_rng(2)
    keys, values = (torch.from_numpy(rng.normal(size=(1, KV_HEADS, 40, WIDTH)).astype(np.float32)) for _ in range(2))
    cos, sin = tables()
    layer = RangeObserver(ROTARY, CONTEXT)
    kept = layer.update(keys, values)
    assert kept[0] is keys and kept[1] is values and layer.get_seq_length() == 0
    assert layer.scales is not None
    reach = np.zeros((KV_HEADS, WIDTH))
    first, second = np.split(keys[0].numpy(), 2, axis=-1)
    for c, s in zip(cos, sin, strict=True):
        turned = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
        reach = np.maximum(reach, np.abs(turned).max(axis=1))
    np.testing.assert_allclose(layer.scales.keys * 127 / HEADROOM, reach.ravel(), rtol=1e-5)
    expected = values[0].abs().amax(1).numpy().ravel()
    np.testing.assert_allclose(layer.scales.values * 127 / HEADROOM, expected, rtol=1e-5)


def test_a_channel_that_was_silent_has_a_scale_above_zero() -> None:
    keys = torch.zeros(1, KV_HEADS, 3, WIDTH)
    keys[..., 1] = 1.0
    layer = RangeObserver(ROTARY, CONTEXT)
    layer.update(keys, torch.zeros_like(keys))
    assert layer.scales is not None
    assert layer.scales.keys.min() > 0.0 and layer.scales.values.min() > 0.0


def test_rounding_in_pytorch_is_the_operators() -> None:
    rng = np.random.default_rng(3)
    qkv = rng.normal(scale=1.2, size=(1, 20, (HEADS + 2 * KV_HEADS) * WIDTH)).astype(np.float32)
    _, _, codes = attend(qkv, [20])
    values = torch.from_numpy(qkv[0, :, (HEADS + KV_HEADS) * WIDTH :].reshape(20, KV_HEADS, WIDTH)).transpose(0, 1)
    caches = RoundedCaches([some_scales()])
    (cache,) = (value for value in caches(torch.nn.Identity()).values() if not isinstance(value, bool))
    _, rounded = cache.layers[0].update(torch.ones_like(values)[None], values[None])
    scale = some_scales().values.reshape(KV_HEADS, 1, WIDTH)
    np.testing.assert_allclose(rounded[0].numpy(), codes * scale, rtol=1e-6)
    assert len(caches.errors) == 2 and 0.0 < caches.errors[1] < 0.1


# --- packages --------------------------------------------------------------------------------------------------------


def test_a_package_says_what_its_caches_hold_and_takes_a_quarter_of_the_memory() -> None:
    small, large = demo_package("fp32", INT8_CACHES), demo_package("fp32")
    manifest = Manifest.load(small)
    assert (manifest.kv_cache.dtype, Manifest.load(large).kv_cache.dtype) == ("int8", "float32")
    needs, more = footprint(small, manifest), footprint(large, Manifest.load(large))
    assert 4 * needs.kv_per_1000_tokens == more.kv_per_1000_tokens
    answers = [demo_engine("fp32", *kind).generate("what can you do?", sampling=SHORT) for kind in ((INT8_CACHES,), ())]
    assert answers[0].token_ids == answers[1].token_ids
    assert 4 * answers[0].stats.kv_bytes == answers[1].stats.kv_bytes


def test_the_graphs_hold_the_scales_of_every_layer() -> None:
    """So whoever runs them allocates int8 buffers and needs to know no more."""
    folder = demo_package("fp32", INT8_CACHES)
    manifest, config = Manifest.load(folder), decoder_config(demo_checkpoint())
    scales = packed_kv_scales(folder, manifest)
    assert len(scales) == config.num_hidden_layers
    for layer in scales:
        assert layer.keys.shape == layer.values.shape == (config.num_key_value_heads * config.head_dim,)
        assert layer.keys.min() > 0.0 and layer.values.min() > 0.0
    assert len({layer.keys.tobytes() for layer in scales}) == config.num_hidden_layers
    assert packed_kv_scales(demo_package("fp32"), Manifest.load(demo_package("fp32"))) == ()


def test_what_the_prober_reads_is_pytorchs_with_the_same_rounding() -> None:
    """Up to codes that fall the other way at a tie; and rounding alone accounts for how far the original is."""
    checks = {check.name: check for check in Manifest.load(demo_package("fp32", INT8_CACHES)).validation[CPU]}
    assert checks["hidden state, error to rounded"].value < 2e-3  # a few prompts 1.3e-3, others 2e-6
    assert checks["attention, each by itself"].value < 5e-4  # codes that fall the other way
    assert 1e-3 < checks["hidden state at the split"].value < 0.1
    assert checks["int8 caches, relative error"].limit == LIMITS["int8 caches, relative error"]
    assert "quantised weights, relative error" not in checks
    assert checks["verdicts that differ outside the band"].limit == 0.0


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_int8_caches_go_with_every_precision(precision: str, tmp_path: Path) -> None:
    options = ExportOptions(precision, kv_cache="int8")
    write_package(tmp_path, demo_checkpoint(), None, options, lambda _: None)
    engine = Engine.load(tmp_path, device="cpu", threads=1)
    plain = demo_engine(precision)
    answers = [e.generate("what can you do?", sampling=SHORT, policy=e.policy("off")) for e in (engine, plain)]
    assert answers[0].token_ids == answers[1].token_ids


def test_a_later_turn_and_drafts_go_on_from_int8_caches() -> None:
    """A conversation whose caches grow, and one that computes every turn anew; with drafts and without."""
    engine = demo_engine("fp32", INT8_CACHES)
    conversation = Conversation(engine)
    turns: list[Message] = []
    for text in ("what can you do?", "describe a red circle.", "how many?"):
        turns.append(Message.user(text))
        kept = engine.generate(turns, sampling=SHORT, conversation=conversation)
        fresh = engine.generate(turns, sampling=SamplingConfig(max_tokens=12, speculate=False))
        assert kept.token_ids == fresh.token_ids
        assert kept.verdict.p_unsafe == pytest.approx(fresh.verdict.p_unsafe, abs=1e-3)
        turns.append(Message.assistant(kept.text))
    assert kept.stats.reused_tokens > 0


@pytest.mark.parametrize("row", range(13))
def test_nan_in_any_row_is_unsafe_though_int8_caches_make_a_number_of_it(row: int) -> None:
    """A row before the prober's: float32 caches carry NaN to what the prober reads, int8 caches carried 127."""
    engine = demo_engine("fp32", INT8_CACHES)
    prompt = engine.encoder.prepare([Message.user("what can you do?")], Stats())
    embeds = prompt.inputs_embeds.copy()
    assert embeds.shape[1] == 13
    embeds[0, row, 5] = np.nan
    request = engine.request(replace(prompt, inputs_embeds=embeds), 2, Stats())
    verdict = request.prefill_lower(engine.policy("steer"))
    assert verdict.unsafe and np.isnan(verdict.p_unsafe)
    assert request.cached_prefix().keys == [], "the next turn must not start from such rows"


@pytest.mark.parametrize("headroom", [0.2, 40.0])
def test_validation_catches_scales_that_reach_too_near_or_too_far(
    headroom: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_scales, "HEADROOM", headroom)
    arguments = ["--model", "demo", "--kv-cache", "int8", "--output", str(tmp_path / "package")]
    with pytest.raises(CheckError, match="int8 caches, relative error"):
        export.main(arguments, standalone_mode=False)


def test_validation_catches_graphs_that_compute_something_else(tmp_path: Path) -> None:
    """PyTorch rounds with the graphs' own scales, so what differs then is no rounding: here, rows attend to four."""
    options = ExportOptions(kv_cache="int8")
    manifest = write_package(tmp_path, demo_checkpoint(), None, options, lambda _: None)
    path = tmp_path / "decoder_lower.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    for node in nodes:
        node.attribute.append(helper.make_attribute("local_window_size", 4))
    onnx.save(model, path)
    checks = validate.behaviour_checks(tmp_path, manifest, demo_checkpoint(), None, lambda _: None).checks
    failed = {check.name for check in checks if not check.passed}
    rounded = {"hidden state, error to rounded", "logits, KL to rounded"}
    assert failed == rounded | {"attention, each by itself", "attention, share lost"}


def test_packages_for_cuda_keep_float16_caches_and_no_others() -> None:
    with pytest.raises(
        InputError, match=r"--kv-cache int8: packages for cuda cannot have such a cache; .* goes with float16"
    ):
        recipe("int8", target="cuda", caches="int8")
    assert recipe("int8", target="cuda").caches == recipe("int8", target="cuda", caches="float16").caches == "float16"
    assert [recipe("int4", caches=kind).caches for kind in (None, "float32", "int8")] == ["float32", "float32", "int8"]

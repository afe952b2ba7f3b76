"""The decoder as ONNX graphs: one decoder layer for every family, driven by a DecoderConfig.

    embed_tokens    input_ids (1, S)                -> inputs_embeds (1, S, D)
    decoder_lower   inputs_embeds (B, S, D), caches -> hidden_states (B, S, D)      layers 0..k-1; HF's hidden_states[k]
    decoder_upper   hidden_states (B, S, D), caches -> last_hidden_state (B, R, D)  layers k..N-1, last R rows, norm
    lm_head         last_hidden_state (1, R, D)     -> logits (1, R, V)

R is the input `num_logits` (HF: logits_to_keep): 1 for a decode step, more to verify a draft. B is 1, or, where S is 1,
as many answers as are decoded together: on the CPU GroupQueryAttention takes rows of different lengths only then. What
has no caches takes B rows as R of one. The rotary tables are inputs, too: the runtime knows where a picture's rows
stand (runtime/rotary.py). So are the rows that pictures add to the output of the first layers, for models with
deepstack (runtime/deepstack.py).

The layer has RMS norms before attention and MLP, after them, or both; packed query/key/value with rotary inside
GroupQueryAttention, for a window by tables of its own, where the checkpoint has them; norms of queries and keys
(HEAD_NORMS), where it has them; a gated MLP (MLP_ACTIVATIONS). HF: Qwen2DecoderLayer, Qwen3DecoderLayer,
LlamaDecoderLayer, Olmo2DecoderLayer, Phi3DecoderLayer, Gemma3DecoderLayer, ChameleonDecoderLayer,
ChameleonSwinDecoderLayer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from autosteer.export.checkpoint.decoder_config import DecoderConfig, HeadNorm
from autosteer.runtime.manifest import ATTENTION_BIAS, ROTARY_TABLES

from .int8_matmul import MICROSOFT
from .kv_scales import KVScales
from .quantize import Blocks, Scheme
from .writer import FLOAT32, GraphWriter

HEAD_NORM_EPS = 1e-5  # HF: ChameleonLayerNorm, not in its config
BRANCHES = ("self_attn", "mlp")  # of a layer: HF's modules, and the names of their outputs in our graphs


def embed_tokens(g: GraphWriter, config: DecoderConfig, blocks: Blocks | None) -> None:
    """The embedding: rows are gathered from the mapped file, so it takes no memory."""
    ids = g.input("input_ids", "int64", (1, "sequence_length"))
    rows = g.embedding(
        ids, f"{config.module}.embed_tokens.weight", shape=(config.vocab_size, config.hidden_size), blocks=blocks
    )
    if config.embedding_scale != 1.0:
        rows = g.op("Mul", rows, g.constant("embedding_scale", np.array(config.embedding_scale, g.dtype)))
    g.output("inputs_embeds", rows, g.dtype, (1, "sequence_length", config.hidden_size))


def decoder_half(
    g: GraphWriter,
    config: DecoderConfig,
    layers: range,
    scheme: Scheme | None,
    kv_scales: Sequence[KVScales] = (),
    *,
    masked: bool = False,
) -> None:
    """Write `layers` of the decoder. After the last layer's attention, only the last `num_logits` rows are computed.

    `kv_scales`, one per layer of the whole decoder, make int8 KV caches; without them caches have the activations'
    type. `masked`: with an input that is added to the scores of the attention, so that one pass can run over several
    texts, none of which sees another (runtime/packed.py).
    """
    source = "hidden_states" if layers.start else "inputs_embeds"
    residual = g.input(source, g.dtype, ("batch", "sequence_length", config.hidden_size))
    lengths = g.input("seqlens_k", "int32", ("batch",)), g.input("total_sequence_length", "int32", ())
    table = ("rotary_length", len(config.rotary.frequencies))
    rotary = {
        kind: tuple(g.input(f"{kind}{name}", g.dtype, table) for name in ROTARY_TABLES)
        for kind in config.rotary.by_table()
    }
    mask = (1, 1, "sequence_length", "total_sequence_length")
    bias = g.input(ATTENTION_BIAS, g.dtype, mask) if masked else None
    presents: list[tuple[str, ir.Value]] = []
    cache_type = "int8" if kv_scales else g.dtype
    cache_in = ("batch", config.num_key_value_heads, "past_sequence_length", config.head_dim)
    cache_out = ("batch", config.num_key_value_heads, "total_sequence_length", config.head_dim)
    before_attention, after_attention, before_mlp, after_mlp = config.layer_norms
    branch: ir.Value | None = None  # what the previous layer adds to the residual stream
    for i in layers:
        past = tuple(g.input(f"past_key_values.{i}.{kind}", cache_type, cache_in) for kind in ("key", "value"))
        module = f"{config.module}.layers.{i}"
        x, residual = _enter(g, config, module, before_attention, residual, branch)
        attended, *present = _attention(
            *(g, config, i, x, past, lengths),
            rotary[config.rotary_table(i)],
            *(bias, scheme, kv_scales[i] if kv_scales else None),
        )
        presents += [(f"present.{i}.{kind}", value) for kind, value in zip(("key", "value"), present, strict=True)]
        if i == config.num_hidden_layers - 1:  # no later layer needs the other rows
            attended, residual = _last_rows(g, attended, residual)
        attended = _project(
            g,
            config,
            module,
            "self_attn.o_proj",
            attended,
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            scheme,
        )
        branch = _leave(g, config, module, after_attention, attended)
        x, residual = _enter(g, config, module, before_mlp, residual, branch)
        gathered = _mlp(g, config, module, x, scheme)
        branch = _leave(g, config, module, after_mlp, gathered)
        attended.name, gathered.name = (f"{module}.{name}" for name in BRANCHES)  # validation records these
        if i < config.deepstack:
            rows = g.input(f"deepstack.{i}", g.dtype, (1, "deepstack_length", config.hidden_size))
            branch = g.op("Add", branch, rows)
    assert branch is not None
    if layers.stop == config.num_hidden_layers:
        normed, _ = _norm(g, config, f"{config.module}.norm", residual, branch)
        g.output("last_hidden_state", normed, g.dtype, ("batch", "num_logits", config.hidden_size))
    else:
        g.output(
            "hidden_states", g.op("Add", residual, branch), g.dtype, ("batch", "sequence_length", config.hidden_size)
        )
    for name, value in presents:
        g.output(name, value, cache_type, cache_out)


def lm_head(g: GraphWriter, config: DecoderConfig, blocks: Blocks | None) -> None:
    """The LM head. Tokens that are never generated get the lowest float32 as their logit."""
    hidden = g.input("last_hidden_state", g.dtype, (1, "num_logits", config.hidden_size))
    logits = g.linear(
        hidden, config.lm_head.removesuffix(".weight"), shape=(config.vocab_size, config.hidden_size), scheme=blocks
    )
    logits = g.cast(logits, g.dtype, FLOAT32)
    if config.never_generated:
        mask = np.zeros(config.vocab_size, np.float32)
        mask[list(config.never_generated)] = np.finfo(np.float32).min
        logits = g.op("Add", logits, g.shared("never_generated", mask))
    g.output("logits", logits, FLOAT32, (1, "num_logits", config.vocab_size))


def _last_rows(g: GraphWriter, *values: ir.Value) -> tuple[ir.Value, ...]:
    """The last `num_logits` rows of each (1, S, ...).

    The start is counted from the first row, because it is then computed on the CPU, where Slice needs it. A negative
    start would need `Neg`, which runs on CUDA, and every pass would wait for it.
    """
    first = g.op("Sub", g.op("Shape", values[0], start=1, end=2), g.input("num_logits", "int64", (1,)))
    end, axis = (g.constant(name, np.array([at], np.int64)) for name, at in (("end", 2**63 - 1), ("axis", 1)))
    return tuple(g.op("Slice", value, first, end, axis) for value in values)


def _enter(
    g: GraphWriter, config: DecoderConfig, module: str, norm: str | None, residual: ir.Value, branch: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """(the input of attention or MLP, the residual stream so far: residual + branch)."""
    if norm:
        return _norm(g, config, f"{module}.{norm}", residual, branch)
    total = residual if branch is None else g.op("Add", residual, branch)
    return total, total


def _leave(g: GraphWriter, config: DecoderConfig, module: str, norm: str | None, branch: ir.Value) -> ir.Value:
    """The output of attention or MLP that is added to the residual stream."""
    return _norm(g, config, f"{module}.{norm}", branch, None)[0] if norm else branch


def _norm(
    g: GraphWriter, config: DecoderConfig, module: str, residual: ir.Value, branch: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """RMS norm of residual + branch; returns (normed, the sum). ORT: (Skip)SimplifiedLayerNormalization."""
    if branch is None:
        return _rms_norm(g, config, module, residual, config.hidden_size), residual
    normed, total = g.ops(
        "SkipSimplifiedLayerNormalization",
        *(branch, residual, _norm_weight(g, config, module, config.hidden_size)),
        outputs=4,
        used=(0, 3),
        domain=MICROSOFT,
        epsilon=config.rms_norm_eps,
    )
    return normed, total


def _rms_norm(g: GraphWriter, config: DecoderConfig, module: str, x: ir.Value, width: int) -> ir.Value:
    """RMS norm over the last axis of x, which has `width` numbers."""
    weight = _norm_weight(g, config, module, width)
    return g.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=config.rms_norm_eps, stash_type=1)


def _norm_weight(g: GraphWriter, config: DecoderConfig, module: str, width: int) -> ir.Value:
    """What an RMS norm multiplies by, (width,); the sum is folded when the session is created."""
    weight = g.vector(f"{module}.weight", shape=(width,))
    if not config.norm_offset:
        return weight
    return g.op("Add", weight, g.constant("norm_offset", np.array(config.norm_offset, g.dtype)))


def _attention(
    g: GraphWriter,
    config: DecoderConfig,
    layer: int,
    x: ir.Value,
    past: tuple[ir.Value, ...],
    lengths: tuple[ir.Value, ir.Value],
    rotary: tuple[ir.Value, ...],
    attention_bias: ir.Value | None,
    scheme: Scheme | None,
    kv_scales: KVScales | None,
) -> tuple[ir.Value, ...]:
    """(the heads' output (1, S, H * d), present key, present value). ORT: com.microsoft GroupQueryAttention."""
    module = f"{config.module}.layers.{layer}.self_attn"
    projections = tuple(f"{module}.{part}_proj" for part in (("qkv",) if config.stacked else "qkv"))
    widths = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    qkv = g.linear(
        x,
        *projections,
        shape=(sum(widths), config.hidden_size),
        bias="self_attn.q_proj" in config.biased,
        scheme=scheme,
    )
    inputs: tuple[ir.Value | None, ...] = (qkv, None, None)  # packed
    if config.head_norm:
        query, key, value = g.ops(
            "Split",
            *(qkv, g.constant("qkv_widths", np.array(widths, np.int64))),
            outputs=3,
            used=(0, 1, 2),
            axis=-1,
        )
        norm = HEAD_NORMS[config.head_norm]
        query = norm(g, config, f"{module}.q_norm", query, config.num_attention_heads)
        inputs = (query, norm(g, config, f"{module}.k_norm", key, config.num_key_value_heads), value)
    scales, rounding = _rounding(g, kv_scales, layer)
    more = (None, attention_bias, None, *scales)  # neither position ids nor an attention sink
    return g.ops(
        "GroupQueryAttention",
        *(*inputs, *past, *lengths, *rotary, *(more if attention_bias or scales else ())),
        outputs=3,
        used=(0, 1, 2),
        domain=MICROSOFT,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=config.attention_scale,
        do_rotary=1,
        **({"local_window_size": window} if (window := config.windows[layer]) else {}),
        **rounding,
    )


def _rounding(
    g: GraphWriter, kv_scales: KVScales | None, layer: int
) -> tuple[tuple[ir.Value | None, ...], dict[str, Any]]:
    """GroupQueryAttention's inputs and attributes for int8 caches; empty for others."""
    if kv_scales is None:
        return (), {}
    keys = g.constant(f"key_scales.{layer}", kv_scales.keys)
    values = g.constant(f"value_scales.{layer}", kv_scales.values)
    how = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    return (keys, values), how


def _layer_norm_per_head(g: GraphWriter, config: DecoderConfig, module: str, x: ir.Value, heads: int) -> ir.Value:
    """Each head has its own scale and bias, (H, d) each. HF: ChameleonLayerNorm."""
    ones = g.constant("head_ones", np.ones(config.head_dim, g.dtype))
    normed = g.op("LayerNormalization", _by_head(g, config, x, heads), ones, axis=-1, epsilon=HEAD_NORM_EPS)
    scale, bias = (g.vector(f"{module}.{name}", shape=(heads, config.head_dim)) for name in ("weight", "bias"))
    return _flat(g, config, g.op("Add", g.op("Mul", normed, scale), bias), heads)


def _rms_norm_per_head(g: GraphWriter, config: DecoderConfig, module: str, x: ir.Value, heads: int) -> ir.Value:
    """Each head is normed by itself; all share one scale (d,). HF: Qwen3RMSNorm."""
    return _flat(g, config, _rms_norm(g, config, module, _by_head(g, config, x, heads), config.head_dim), heads)


def _rms_norm_across_heads(g: GraphWriter, config: DecoderConfig, module: str, x: ir.Value, heads: int) -> ir.Value:
    """All heads are normed together, with a scale (H * d,). HF: Olmo2RMSNorm."""
    return _rms_norm(g, config, module, x, heads * config.head_dim)


# Norms of queries or keys: (graph, config, the norm's module, x (1, S, H * d), H) -> x normed, in the same shape.
HEAD_NORMS: dict[HeadNorm, Callable[[GraphWriter, DecoderConfig, str, ir.Value, int], ir.Value]] = {
    "layer": _layer_norm_per_head,
    "rms": _rms_norm_per_head,
    "rms_across_heads": _rms_norm_across_heads,
}


def _by_head(g: GraphWriter, config: DecoderConfig, x: ir.Value, heads: int) -> ir.Value:
    """(1, S, H * d) -> (1, S, H, d)"""
    return g.op("Reshape", x, g.constant(f"by_head_{heads}", np.array([0, 0, heads, config.head_dim], np.int64)))


def _flat(g: GraphWriter, config: DecoderConfig, x: ir.Value, heads: int) -> ir.Value:
    """(1, S, H, d) -> (1, S, H * d)"""
    return g.op("Reshape", x, g.constant(f"flat_{heads}", np.array([0, 0, heads * config.head_dim], np.int64)))


MLP_ACTIVATIONS: dict[str, Callable[[GraphWriter, ir.Value], ir.Value]] = {
    "silu": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
    "gelu_pytorch_tanh": lambda g, x: g.op("Gelu", x, approximate="tanh"),
}


def _mlp(g: GraphWriter, config: DecoderConfig, module: str, x: ir.Value, scheme: Scheme | None) -> ir.Value:
    """down(activation(gate(x)) * up(x))"""
    n, k = config.intermediate_size, config.hidden_size
    if config.stacked:
        both = _project(g, config, module, "mlp.gate_up_proj", x, 2 * n, k, scheme)
        widths = g.constant("gate_up_widths", np.array([n, n], np.int64))
        gate, up = g.ops("Split", both, widths, outputs=2, used=(0, 1), axis=-1)
    else:
        gate, up = (_project(g, config, module, f"mlp.{name}_proj", x, n, k, scheme) for name in ("gate", "up"))
    activated = g.op("Mul", MLP_ACTIVATIONS[config.activation](g, gate), up)
    return _project(g, config, module, "mlp.down_proj", activated, config.hidden_size, config.intermediate_size, scheme)


def _project(
    g: GraphWriter, config: DecoderConfig, module: str, name: str, x: ir.Value, n: int, k: int, scheme: Scheme | None
) -> ir.Value:
    """x (1, S, k) -> (1, S, n) through one of PROJECTIONS of a layer."""
    return g.linear(x, f"{module}.{name}", shape=(n, k), bias=name in config.biased, scheme=scheme)

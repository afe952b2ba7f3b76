"""The decoder as ONNX graphs: one decoder layer for every family, driven by the checkpoint's facts.

    embed_tokens    input_ids (1, S)                -> inputs_embeds (1, S, D)
    decoder_lower   inputs_embeds (1, S, D), caches -> hidden_states (1, S, D)      layers 0..k-1; HF's hidden_states[k]
    decoder_upper   hidden_states (1, S, D), caches -> last_hidden_state (1, R, D)  layers k..N-1, last R rows, norm
    lm_head         last_hidden_state (1, R, D)     -> logits (1, R, V)

R is the input `num_logits` (HF: logits_to_keep). 1 is what decoding needs; a few drafted tokens are verified at once.

The layer has RMS norms before attention and MLP, or after them; packed query/key/value with rotary inside
GroupQueryAttention; a LayerNorm per query and key head, where the checkpoint has one; gated SiLU. HF:
Qwen2DecoderLayer, LlamaDecoderLayer, ChameleonDecoderLayer, ChameleonSwinDecoderLayer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.runtime.errors import UnsupportedModelError

from .kv_scales import KVScales
from .quantize import Blocks, Scheme
from .writer import FLOAT32, MICROSOFT, GraphWriter

HEAD_NORM_EPS = 1e-5  # HF: ChameleonLayerNorm, not in its config
DECODERS = ("llama", "qwen2", "chameleon")  # model types whose layer is the one below
BRANCHES = ("self_attn", "mlp")  # of a layer: HF's modules, and our names of what they give
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class DecoderFacts:
    """Everything the graphs below need to know of a checkpoint."""

    module: str  # HF module path of the decoder
    lm_head: str  # tensor that projects to the vocabulary (the embedding's, where they are tied)
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    norm_eps: float
    rope_theta: float
    biased: frozenset[str]  # those of PROJECTIONS that have a bias; k_proj and v_proj go with q_proj
    head_norm: bool  # queries and keys go through a LayerNorm per head
    norm_after: bool  # RMS norms follow attention and MLP (Swin v2), instead of preceding them
    never_generated: tuple[int, ...]  # token ids whose logits are masked
    kv_scales: tuple[KVScales, ...] = ()  # by layer, of int8 caches; none: caches are as the activations


def decoder_facts(checkpoint: Checkpoint, context_length: int | None = None) -> DecoderFacts:
    """Collect the facts; raises UnsupportedModelError for a feature that the layer below does not have."""
    facts, family = checkpoint.facts, checkpoint.family
    rope = facts.rope_parameters
    layer = f"{family.decoder}.layers.0"
    head_norm = f"{layer}.self_attn.q_norm.weight"
    text = checkpoint.config.get_text_config()
    tied = any(getattr(part, "tie_word_embeddings", True) for part in (checkpoint.config, text))
    per_head = (facts.num_attention_heads, checkpoint.head_dim)
    unsupported = {
        f"hidden_act {facts.hidden_act!r}": facts.hidden_act != "silu",
        f"rope_type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "sliding-window attention": getattr(text, "use_sliding_window", False)
        or any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()),
        "rotation of a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"a decoder of type {text.model_type!r}": text.model_type not in DECODERS,
        "tie_word_embeddings false without an lm_head among the weights": not tied and family.lm_head not in checkpoint,
        "this kind of q_norm": head_norm in checkpoint and checkpoint.shape(head_norm) != per_head,
    }
    for what, found in unsupported.items():
        if found:
            raise UnsupportedModelError(f"{checkpoint.folder / 'config.json'}: {what} is not supported yet")
    embedding = f"{family.decoder}.embed_tokens.weight"
    return DecoderFacts(
        module=family.decoder,
        lm_head=family.lm_head if family.lm_head in checkpoint else embedding,
        hidden=facts.hidden_size,
        layers=facts.num_layers,
        heads=facts.num_attention_heads,
        kv_heads=facts.num_key_value_heads,
        head_dim=checkpoint.head_dim,
        intermediate=facts.intermediate_size,
        vocab=checkpoint.shape(embedding)[0],
        context=min(facts.context_length, context_length or facts.context_length),
        norm_eps=facts.norm_eps,
        rope_theta=rope["rope_theta"],
        biased=frozenset(name for name in PROJECTIONS if f"{layer}.{name}.bias" in checkpoint),
        head_norm=head_norm in checkpoint,
        norm_after=family.norm_after(checkpoint.config),
        never_generated=family.never_generated(checkpoint.config),
    )


def embed_tokens(g: GraphWriter, f: DecoderFacts, blocks: Blocks | None) -> None:
    """The embedding table: rows are gathered from the mapped file, so its size costs no memory."""
    ids = g.input("input_ids", "int64", (1, "sequence_length"))
    rows = g.embedding(ids, f"{f.module}.embed_tokens.weight", shape=(f.vocab, f.hidden), blocks=blocks)
    g.output("inputs_embeds", rows, g.dtype, (1, "sequence_length", f.hidden))


def decoder_half(g: GraphWriter, f: DecoderFacts, layers: range, scheme: Scheme | None) -> None:
    """`layers` of the decoder. Where all rows have attended in the last layer, it goes on with the last ones."""
    source = "hidden_states" if layers.start else "inputs_embeds"
    residual = g.input(source, g.dtype, (1, "sequence_length", f.hidden))
    lengths = g.input("seqlens_k", "int32", (1,)), g.input("total_sequence_length", "int32", ())
    rotary = _rotary(g, f)
    presents: list[tuple[str, ir.Value]] = []
    cache_type = "int8" if f.kv_scales else g.dtype
    cache_in = (1, f.kv_heads, "past_sequence_length", f.head_dim)
    cache_out = (1, f.kv_heads, "total_sequence_length", f.head_dim)
    branch: ir.Value | None = None  # what the previous layer adds to the residual stream
    for i in layers:
        past = tuple(g.input(f"past_key_values.{i}.{kind}", cache_type, cache_in) for kind in ("key", "value"))
        module = f"{f.module}.layers.{i}"
        x, residual = _enter(g, f, f"{module}.input_layernorm", residual, branch)
        attended, *present = _attention(g, f, i, x, past, lengths, rotary, scheme)
        presents += [(f"present.{i}.{kind}", value) for kind, value in zip(("key", "value"), present, strict=True)]
        if i == f.layers - 1:  # no later layer looks at the other rows
            attended, residual = _last_rows(g, attended, residual)
        attended = _project(g, f, module, "self_attn.o_proj", attended, f.hidden, f.heads * f.head_dim, scheme)
        branch = _leave(g, f, f"{module}.input_layernorm", attended)
        x, residual = _enter(g, f, f"{module}.post_attention_layernorm", residual, branch)
        gathered = _mlp(g, f, module, x, scheme)
        branch = _leave(g, f, f"{module}.post_attention_layernorm", gathered)
        attended.name, gathered.name = (f"{module}.{name}" for name in BRANCHES)  # by which validation finds them
    assert branch is not None
    if layers.stop == f.layers:
        normed, _ = _norm(g, f, f"{f.module}.norm", residual, branch)
        g.output("last_hidden_state", normed, g.dtype, (1, "num_logits", f.hidden))
    else:
        g.output("hidden_states", g.op("Add", residual, branch), g.dtype, (1, "sequence_length", f.hidden))
    for name, value in presents:
        g.output(name, value, cache_type, cache_out)


def lm_head(g: GraphWriter, f: DecoderFacts, blocks: Blocks | None) -> None:
    """The projection to the vocabulary; tokens that are never generated get the lowest logit there is."""
    hidden = g.input("last_hidden_state", g.dtype, (1, "num_logits", f.hidden))
    logits = g.linear(hidden, f.lm_head.removesuffix(".weight"), shape=(f.vocab, f.hidden), scheme=blocks)
    logits = g.cast(logits, g.dtype, FLOAT32)
    if f.never_generated:
        mask = np.zeros(f.vocab, np.float32)
        mask[list(f.never_generated)] = np.finfo(np.float32).min
        logits = g.op("Add", logits, g.shared("never_generated", mask))
    g.output("logits", logits, FLOAT32, (1, "num_logits", f.vocab))


def _last_rows(g: GraphWriter, *values: ir.Value) -> tuple[ir.Value, ...]:
    """The last `num_logits` rows of each (1, S, ...).

    Counted from the first row: where they begin is then computed on the CPU, which is where a Slice wants it. `Neg` is
    computed on CUDA, where there is one, and every pass waits for it.
    """
    first = g.op("Sub", g.op("Shape", values[0], start=1, end=2), g.input("num_logits", "int64", (1,)))
    end, axis = (g.constant(name, np.array([at], np.int64)) for name, at in (("end", 2**63 - 1), ("axis", 1)))
    return tuple(g.op("Slice", value, first, end, axis) for value in values)


def _enter(
    g: GraphWriter, f: DecoderFacts, norm: str, residual: ir.Value, branch: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """What attention or MLP sees, and the residual stream so far (residual + branch)."""
    if not f.norm_after:
        return _norm(g, f, norm, residual, branch)
    total = residual if branch is None else g.op("Add", residual, branch)
    return total, total


def _leave(g: GraphWriter, f: DecoderFacts, norm: str, branch: ir.Value) -> ir.Value:
    """What attention or MLP adds to the residual stream."""
    return _norm(g, f, norm, branch, None)[0] if f.norm_after else branch


def _norm(
    g: GraphWriter, f: DecoderFacts, module: str, residual: ir.Value, branch: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """RMS norm of residual + branch; returns (normed, the sum). ORT: (Skip)SimplifiedLayerNormalization."""
    weight = g.vector(f"{module}.weight", shape=(f.hidden,))
    if branch is None:
        return g.op(
            "SimplifiedLayerNormalization", residual, weight, axis=-1, epsilon=f.norm_eps, stash_type=1
        ), residual
    normed, total = g.ops(
        "SkipSimplifiedLayerNormalization",
        *(branch, residual, weight),
        outputs=4,
        used=(0, 3),
        domain=MICROSOFT,
        epsilon=f.norm_eps,
    )
    return normed, total


def _attention(
    g: GraphWriter,
    f: DecoderFacts,
    layer: int,
    x: ir.Value,
    past: tuple[ir.Value, ...],
    lengths: tuple[ir.Value, ir.Value],
    rotary: tuple[ir.Value, ir.Value],
    scheme: Scheme | None,
) -> tuple[ir.Value, ...]:
    """What the heads gather (1, S, H * d), present key, present value. ORT: com.microsoft GroupQueryAttention."""
    module = f"{f.module}.layers.{layer}.self_attn"
    projections = tuple(f"{module}.{p}_proj" for p in "qkv")
    widths = (f.heads * f.head_dim, f.kv_heads * f.head_dim, f.kv_heads * f.head_dim)
    qkv = g.linear(x, *projections, shape=(sum(widths), f.hidden), bias="self_attn.q_proj" in f.biased, scheme=scheme)
    inputs: tuple[ir.Value | None, ...] = (qkv, None, None)  # packed
    if f.head_norm:
        query, key, value = g.ops(
            "Split",
            *(qkv, g.constant("qkv_widths", np.array(widths, np.int64))),
            outputs=3,
            used=(0, 1, 2),
            axis=-1,
        )
        query = _head_norm(g, f, f"{module}.q_norm", query, f.heads)
        inputs = (query, _head_norm(g, f, f"{module}.k_norm", key, f.kv_heads), value)
    scales, rounding = _rounding(g, f, layer)
    return g.ops(
        "GroupQueryAttention",
        *(*inputs, *past, *lengths, *rotary, *scales),
        outputs=3,
        used=(0, 1, 2),
        domain=MICROSOFT,
        num_heads=f.heads,
        kv_num_heads=f.kv_heads,
        scale=f.head_dim**-0.5,
        do_rotary=1,
        **rounding,
    )


def _rounding(g: GraphWriter, f: DecoderFacts, layer: int) -> tuple[tuple[ir.Value | None, ...], dict[str, Any]]:
    """The last inputs of GroupQueryAttention where it rounds its caches, and what tells it how; nothing elsewhere."""
    if not f.kv_scales:
        return (), {}
    scales = f.kv_scales[layer]
    keys = g.constant(f"key_scales.{layer}", scales.keys)
    values = g.constant(f"value_scales.{layer}", scales.values)
    how = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    return (None, None, None, keys, values), how  # no position ids, attention bias, attention sink


def _head_norm(g: GraphWriter, f: DecoderFacts, module: str, x: ir.Value, heads: int) -> ir.Value:
    """LayerNorm of each head of x (1, S, H * d) on its own, with its own scale and bias (H, d)."""
    ones = g.constant("head_ones", np.ones(f.head_dim, g.dtype))
    normed = g.op(
        "LayerNormalization",
        *(g.op("Reshape", x, g.constant(f"by_head_{heads}", np.array([0, 0, heads, f.head_dim], np.int64))), ones),
        axis=-1,
        epsilon=HEAD_NORM_EPS,
    )
    scale, bias = (g.vector(f"{module}.{name}", shape=(heads, f.head_dim)) for name in ("weight", "bias"))
    moved = g.op("Add", g.op("Mul", normed, scale), bias)
    return g.op("Reshape", moved, g.constant(f"flat_{heads}", np.array([0, 0, heads * f.head_dim], np.int64)))


def _mlp(g: GraphWriter, f: DecoderFacts, module: str, x: ir.Value, scheme: Scheme | None) -> ir.Value:
    """down(silu(gate(x)) * up(x))"""
    names = "mlp.gate_proj", "mlp.up_proj"
    gate, up = (_project(g, f, module, name, x, f.intermediate, f.hidden, scheme) for name in names)
    activated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return _project(g, f, module, "mlp.down_proj", activated, f.hidden, f.intermediate, scheme)


def _project(
    g: GraphWriter, f: DecoderFacts, module: str, name: str, x: ir.Value, n: int, k: int, scheme: Scheme | None
) -> ir.Value:
    """x (1, S, k) -> (1, S, n) through one of PROJECTIONS of a layer."""
    return g.linear(x, f"{module}.{name}", shape=(n, k), bias=name in f.biased, scheme=scheme)


def _rotary(g: GraphWriter, f: DecoderFacts) -> tuple[ir.Value, ir.Value]:
    cos, sin = (table.astype(g.dtype) for table in rotary_tables(f))
    return g.shared("cos_cache", cos), g.shared("sin_cache", sin)


def rotary_tables(f: DecoderFacts) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """cos and sin (context, head_dim / 2), in float32 as HF computes them (Qwen2RotaryEmbedding)."""
    exponent = np.arange(0, f.head_dim, 2, dtype=np.float32) / np.float32(f.head_dim)
    frequency = (1.0 / np.float32(f.rope_theta) ** exponent).astype(np.float32)
    angle = np.arange(f.context, dtype=np.float32)[:, None] * frequency
    return np.cos(angle), np.sin(angle)

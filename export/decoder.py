"""The decoder as ONNX graphs: one decoder layer for every family, driven by the checkpoint's facts.

    embed_tokens    input_ids (1, S)                -> inputs_embeds (1, S, D) decoder_lower   inputs_embeds (1, S,
    D), caches -> hidden_states (1, S, D)       layers 0..k-1; HF's hidden_states[k] decoder_upper   hidden_states (1,
    S, D), caches -> last_hidden_state (1, 1, D)   layers k..N-1, last row, final norm lm_head
    last_hidden_state (1, 1, D)     -> logits (1, 1, V)

Pre-norm layer, RMS norms, packed query/key/value, rotary inside GroupQueryAttention, gated SiLU. HF:
Qwen2DecoderLayer, LlamaDecoderLayer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from autosteer.runtime.errors import UnsupportedModelError

from .checkpoint import Checkpoint
from .graph import FLOAT32, MICROSOFT, GraphWriter
from .quantize import Blocks


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
    qkv_bias: bool


def decoder_facts(checkpoint: Checkpoint, context_length: int | None = None) -> DecoderFacts:
    """Collect the facts; raises UnsupportedModelError for a feature that the layer below does not have."""
    facts, family = checkpoint.facts, checkpoint.family
    rope = facts.rope_parameters
    unsupported = {
        f"hidden_act {facts.hidden_act!r}": facts.hidden_act != "silu",
        f"rope_type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "sliding-window attention": getattr(checkpoint.config.get_text_config(), "use_sliding_window", False),
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
        qkv_bias=family.qkv_bias,
    )


def embed_tokens(g: GraphWriter, f: DecoderFacts, blocks: Blocks | None) -> None:
    """The embedding table: rows are gathered from the mapped file, so its size costs no memory."""
    ids = g.input("input_ids", "int64", (1, "sequence_length"))
    rows = g.embedding(ids, f"{f.module}.embed_tokens.weight", shape=(f.vocab, f.hidden), blocks=blocks)
    g.output("inputs_embeds", rows, FLOAT32, (1, "sequence_length", f.hidden))


def decoder_half(g: GraphWriter, f: DecoderFacts, layers: range, blocks: Blocks | None) -> None:
    """`layers` of the decoder. The half that holds the last layer also slices the last row and applies the final
    norm.
    """
    source = "hidden_states" if layers.start else "inputs_embeds"
    residual = g.input(source, FLOAT32, (1, "sequence_length", f.hidden))
    lengths = g.input("seqlens_k", "int32", (1,)), g.input("total_sequence_length", "int32", ())
    rotary = _rotary(g, f)
    presents: list[tuple[str, ir.Value]] = []
    cache_in = (1, f.kv_heads, "past_sequence_length", f.head_dim)
    cache_out = (1, f.kv_heads, "total_sequence_length", f.head_dim)
    branch: ir.Value | None = None  # what the previous layer adds to the residual stream
    for i in layers:
        past = tuple(g.input(f"past_key_values.{i}.{kind}", FLOAT32, cache_in) for kind in ("key", "value"))
        module = f"{f.module}.layers.{i}"
        normed, residual = _norm(g, f, f"{module}.input_layernorm", residual, branch)
        attended, *present = _attention(g, f, f"{module}.self_attn", normed, past, lengths, rotary, blocks)
        presents += [(f"present.{i}.{kind}", value) for kind, value in zip(("key", "value"), present, strict=True)]
        normed, residual = _norm(g, f, f"{module}.post_attention_layernorm", residual, attended)
        branch = _mlp(g, f, f"{module}.mlp", normed, blocks)
    assert branch is not None
    if layers.stop == f.layers:
        last = g.constant("last_row", np.array([-1], np.int64))
        residual, branch = (g.op("Gather", value, last, axis=1) for value in (residual, branch))
        normed, _ = _norm(g, f, f"{f.module}.norm", residual, branch)
        g.output("last_hidden_state", normed, FLOAT32, (1, 1, f.hidden))
    else:
        g.output("hidden_states", g.op("Add", residual, branch), FLOAT32, (1, "sequence_length", f.hidden))
    for name, value in presents:
        g.output(name, value, FLOAT32, cache_out)


def lm_head(g: GraphWriter, f: DecoderFacts, blocks: Blocks | None) -> None:
    """The projection to the vocabulary."""
    hidden = g.input("last_hidden_state", FLOAT32, (1, 1, f.hidden))
    logits = g.linear(hidden, f.lm_head.removesuffix(".weight"), shape=(f.vocab, f.hidden), blocks=blocks)
    g.output("logits", logits, FLOAT32, (1, 1, f.vocab))


def _norm(
    g: GraphWriter, f: DecoderFacts, module: str, residual: ir.Value, branch: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """RMS norm of residual + branch; returns (normed, the sum). ORT: (Skip)SimplifiedLayerNormalization."""
    weight = g.vector(f"{module}.weight", size=f.hidden)
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
    module: str,
    x: ir.Value,
    past: tuple[ir.Value, ...],
    lengths: tuple[ir.Value, ir.Value],
    rotary: tuple[ir.Value, ir.Value],
    blocks: Blocks | None,
) -> tuple[ir.Value, ...]:
    """Attention output (1, S, D), present key, present value. ORT: com.microsoft GroupQueryAttention on packed QKV."""
    projections = tuple(f"{module}.{p}_proj" for p in "qkv")
    width = (f.heads + 2 * f.kv_heads) * f.head_dim
    qkv = g.linear(x, *projections, shape=(width, f.hidden), bias=f.qkv_bias, blocks=blocks)
    attended, key, value = g.ops(
        "GroupQueryAttention",
        *(qkv, None, None, *past, *lengths, *rotary),
        outputs=3,
        used=(0, 1, 2),
        domain=MICROSOFT,
        num_heads=f.heads,
        kv_num_heads=f.kv_heads,
        scale=f.head_dim**-0.5,
        do_rotary=1,
    )
    return g.linear(attended, f"{module}.o_proj", shape=(f.hidden, f.heads * f.head_dim), blocks=blocks), key, value


def _mlp(g: GraphWriter, f: DecoderFacts, module: str, x: ir.Value, blocks: Blocks | None) -> ir.Value:
    """down(silu(gate(x)) * up(x))"""
    gate, up = (
        g.linear(x, f"{module}.{p}_proj", shape=(f.intermediate, f.hidden), blocks=blocks) for p in ("gate", "up")
    )
    activated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return g.linear(activated, f"{module}.down_proj", shape=(f.hidden, f.intermediate), blocks=blocks)


def _rotary(g: GraphWriter, f: DecoderFacts) -> tuple[ir.Value, ir.Value]:
    """cos and sin tables (context, head_dim / 2), in float32 as HF computes them (Qwen2RotaryEmbedding)."""
    exponent = np.arange(0, f.head_dim, 2, dtype=np.float32) / np.float32(f.head_dim)
    frequency = (1.0 / np.float32(f.rope_theta) ** exponent).astype(np.float32)
    angle = np.arange(f.context, dtype=np.float32)[:, None] * frequency
    return g.shared("cos_cache", np.cos(angle)), g.shared("sin_cache", np.sin(angle))

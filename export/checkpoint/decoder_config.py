"""A decoder's configuration: config.json under Hugging Face's names, and what only the checkpoint's tensors show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import CacheType

from .open import Checkpoint

DECODERS = ("llama", "qwen2", "chameleon")  # model types whose decoder layer export/graphs/decoder.py writes
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that the decoder's graphs depend on. Names are Hugging Face's where it has one."""

    module: str  # HF module path of the decoder
    lm_head: str  # tensor name of the LM head: the embedding's if the two are tied
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # rows of the embedding, which may be more than config.json says
    context_length: int  # positions in a dialogue, at most max_position_embeddings
    rms_norm_eps: float
    rope_theta: float
    biased: frozenset[str]  # those of PROJECTIONS that have a bias; k_proj and v_proj have one if q_proj has
    head_norm: bool  # queries and keys go through a LayerNorm per head
    norm_after: bool  # RMS norms follow attention and MLP (Swin v2), instead of preceding them
    never_generated: tuple[int, ...]  # token ids whose logits are masked


def decoder_config(checkpoint: Checkpoint, context_length: int | None = None) -> DecoderConfig:
    """Read the decoder's configuration; `context_length` lowers the checkpoint's.

    Raises UnsupportedModelError for a feature that the layer in export/graphs/decoder.py does not have.
    """
    text, family = checkpoint.config.get_text_config(), checkpoint.family
    rope = text.rope_parameters
    layer = f"{family.decoder}.layers.0"
    head_norm = f"{layer}.self_attn.q_norm.weight"
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    tied = any(getattr(part, "tie_word_embeddings", True) for part in (checkpoint.config, text))
    per_head = (text.num_attention_heads, head_dim)
    unsupported = {
        f"hidden_act {text.hidden_act!r}": text.hidden_act != "silu",
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
    return DecoderConfig(
        module=family.decoder,
        lm_head=family.lm_head if family.lm_head in checkpoint else embedding,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=text.intermediate_size,
        vocab_size=checkpoint.shape(embedding)[0],
        context_length=min(text.max_position_embeddings, context_length or text.max_position_embeddings),
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        biased=frozenset(name for name in PROJECTIONS if f"{layer}.{name}.bias" in checkpoint),
        head_norm=head_norm in checkpoint,
        norm_after=family.norm_after(checkpoint.config),
        never_generated=family.never_generated(checkpoint.config),
    )


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: CacheType = "float32") -> int:
    """Bytes of one token's keys and values in the KV caches of `layers` layers."""
    return 2 * layers * kv_heads * head_dim * np.dtype(dtype).itemsize

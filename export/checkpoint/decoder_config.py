"""A decoder's configuration: config.json under Hugging Face's names, and what only the checkpoint's tensors show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from autosteer.models.family import LayerNorms
from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import CacheType, LongRotary, RotarySpec

from .open import Checkpoint

# Model types whose decoder layer export/graphs/decoder.py writes.
DECODERS = (
    *("chameleon", "gemma3_text", "llama", "ministral", "mistral", "olmo2", "phi3"),
    *("qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_vl_text"),
)
ROPE_TYPES = ("default", "linear", "llama3", "longrope", "yarn")  # longrope's depend on the length of a prompt
SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
FULL, SLIDING = "full_attention", "sliding_attention"  # HF's names for kinds of attention
ATTENTION_FIELDS = ("sliding_window", "layer_types")  # what says which layer has which
MLP_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# Norms of queries and keys: a LayerNorm per head, each with its own weights; an RMS norm per head, all with the same
# weights; an RMS norm across all heads. The shape of q_norm.weight tells which.
HeadNorm = Literal["layer", "rms", "rms_across_heads"]


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
    activation: str  # of the MLP's gate, one of MLP_ACTIVATIONS
    attention_scale: float  # of query times key
    embedding_scale: float  # of the rows of text
    rms_norm_eps: float
    norm_offset: float  # what is added to the weights of RMS norms
    rotary: RotarySpec
    windows: tuple[int | None, ...]  # by layer: how many positions a query sees, itself among them; None: all
    biased: frozenset[str]  # those of PROJECTIONS that have a bias; k_proj and v_proj have one if q_proj has
    head_norm: HeadNorm | None  # the norm of queries and keys
    layer_norms: LayerNorms
    never_generated: tuple[int, ...]  # token ids whose logits are masked
    deepstack: int  # first layers to whose output pictures add rows
    stacked: bool  # query, key and value are one matrix, gate and up another (Phi-3)

    @property
    def windowed(self) -> bool:
        """Whether a dialogue can be longer than a layer's window."""
        return any(window and window < self.context_length for window in self.windows)

    def rotary_table(self, layer: int) -> str:
        """The key in `rotary.by_table` of what turns this layer's queries and keys."""
        return "windowed_" if self.windows[layer] and self.rotary.windowed else ""


def decoder_config(checkpoint: Checkpoint, context_length: int | None = None) -> DecoderConfig:
    """Read the decoder's configuration; `context_length` lowers the checkpoint's.

    Raises UnsupportedModelError for a feature that the layer in export/graphs/decoder.py does not have.
    """
    text, family = checkpoint.config.get_text_config(), checkpoint.family
    layer = f"{family.decoder}.layers.0"
    head_norm = f"{layer}.self_attn.q_norm.weight"
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    tied = any(getattr(part, "tie_word_embeddings", True) for part in (checkpoint.config, text))
    head_norms: dict[tuple[int, ...], HeadNorm] = {
        (text.num_attention_heads, head_dim): "layer",
        (text.num_attention_heads * head_dim,): "rms_across_heads",
        (head_dim,): "rms",
    }
    kinds, activation = _attention_kinds(text), getattr(text, "hidden_activation", None) or text.hidden_act
    ropes = _ropes(text)
    strange = {rope["rope_type"] for rope in ropes.values()} - set(ROPE_TYPES)
    odd = [rotated for rope in ropes.values() if (rotated := _rotated(rope, head_dim)) % 16]
    caps = [name for name in SOFT_CAPS if getattr(text, name, None)]
    deepstack = len(getattr(getattr(checkpoint.config, "vision_config", None), "deepstack_visual_indexes", ()))
    unsupported = {
        f"hidden_act {activation!r}": activation not in MLP_ACTIVATIONS,
        f"rope_type {', '.join(sorted(strange))!r}": strange != set(),
        f"rotation of {odd} of a head's {head_dim} numbers, not a multiple of 16,": odd != [],
        f"attention of the kinds {', '.join(sorted(set(kinds)))}": not set(kinds) <= {FULL, SLIDING},
        ", ".join(caps): caps != [],
        "use_bidirectional_attention": bool(getattr(text, "use_bidirectional_attention", False)),
        f"a decoder of type {text.model_type!r}": text.model_type not in DECODERS,
        f"deepstack for {deepstack} layers of {text.num_hidden_layers}": deepstack >= text.num_hidden_layers,
        "tie_word_embeddings false without an lm_head among the weights": not tied and family.lm_head not in checkpoint,
        "the shape of q_norm.weight": head_norm in checkpoint and checkpoint.shape(head_norm) not in head_norms,
    }
    for what, found in unsupported.items():
        if found:
            raise UnsupportedModelError(f"{checkpoint.folder / 'config.json'}: {what} is not supported yet")
    embedding = f"{family.decoder}.embed_tokens.weight"
    context = min(text.max_position_embeddings, context_length or text.max_position_embeddings)
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
        context_length=context,
        activation=activation,
        attention_scale=float(getattr(text, "query_pre_attn_scalar", head_dim)) ** -0.5,
        embedding_scale=checkpoint.embedding_scale,
        rms_norm_eps=text.rms_norm_eps,
        norm_offset=family.norm_offset,
        rotary=_rotary(text, head_dim, context),
        windows=tuple(text.sliding_window if kind == SLIDING else None for kind in kinds),
        biased=frozenset(name for name in PROJECTIONS if f"{layer}.{name}.bias" in checkpoint),
        head_norm=head_norms[checkpoint.shape(head_norm)] if head_norm in checkpoint else None,
        layer_norms=family.layer_norms(checkpoint.config),
        never_generated=family.never_generated(checkpoint.config),
        deepstack=deepstack,
        stacked=f"{layer}.self_attn.qkv_proj.weight" in checkpoint,
    )


def _attention_kinds(text: Any) -> list[str]:
    """HF's kind of each layer's attention. Old configs have only a window, which then holds for all layers.

    Raises UnsupportedModelError if a field that the model's class in HF does not read would change them.
    """

    def kinds(*fields: str) -> list[str]:
        window, by_layer = (getattr(text, name, None) if name in fields else None for name in ATTENTION_FIELDS)
        return by_layer or [SLIDING if window else FULL] * text.num_hidden_layers

    read = [name for name in ATTENTION_FIELDS if hasattr(type(text)(), name)]
    if kinds(*read) != kinds(*ATTENTION_FIELDS):
        ignored = ", ".join(name for name in ATTENTION_FIELDS if name not in read and getattr(text, name, None))
        raise UnsupportedModelError(
            f"config.json: {ignored}: Hugging Face's {text.model_type} ignores this field, so remove it"
        )
    return kinds(*read)


def _ropes(text: Any) -> dict[str, dict[str, Any]]:
    """HF's rope_parameters of each kind of attention; most models have one for all, which is FULL's here."""
    given: dict[str, Any] = text.rope_parameters
    by_kind = {kind: given[kind] for kind in (FULL, SLIDING) if kind in given} or {FULL: given}
    return {kind: {"rope_type": "default", **rope} for kind, rope in by_kind.items()}


def _rotary(text: Any, head_dim: int, context: int) -> RotarySpec:
    """Frequencies as Hugging Face computes them, in float32."""
    ropes = _ropes(text)
    rope, by_kind = ropes[FULL], {"layer_type": FULL} if SLIDING in ropes else {}
    frequencies, scale = _frequencies(text, rope, head_dim, **by_kind)
    spec = RotarySpec(frequencies, scale, _axes(rope))
    if SLIDING in ropes:
        windowed, same = _frequencies(text, ropes[SLIDING], head_dim, layer_type=SLIDING)
        if same != scale:
            raise UnsupportedModelError("config.json: rope_parameters whose attention factors differ are not supported")
        return replace(spec, windowed=windowed if windowed != frequencies else ())
    if rope["rope_type"] != "longrope" or context <= (beyond := rope["original_max_position_embeddings"]):
        return spec
    longer, _ = _frequencies(text, rope, head_dim, seq_len=beyond + 1)
    return replace(spec, long=LongRotary(beyond, longer))


def _rotated(rope: dict[str, Any], head_dim: int) -> int:
    """How many of a head's numbers are rotated. ORT: GroupQueryAttention takes multiples of 16."""
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def _frequencies(text: Any, rope: dict[str, Any], head_dim: int, **more: Any) -> tuple[tuple[float, ...], float]:
    """(radians a position, the scale of cosines and sines); `more`: for Hugging Face's function."""
    if rope["rope_type"] != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](text, device="cpu", **more)
        return tuple(frequencies.tolist()), float(scale)
    rotated = _rotated(rope, head_dim)  # each of HF's models computes it by itself
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    return tuple(float(f) for f in (1.0 / np.float32(rope["rope_theta"]) ** exponents).astype(np.float32)), 1.0


def _axes(rope_parameters: dict[str, Any]) -> tuple[int, ...]:
    """RotarySpec.axes: how many frequencies read time, row and column, one after the other or in turn."""
    sections = rope_parameters.get("mrope_section", ())
    if not rope_parameters.get("mrope_interleaved"):
        return tuple(i % 3 for i, section in enumerate(sections) for _ in range(section))
    axes = [0] * sum(sections)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = [axis] * sections[axis]
    return tuple(axes)


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: CacheType = "float32") -> int:
    """Bytes of one token's keys and values in the KV caches of `layers` layers."""
    return 2 * layers * kv_heads * head_dim * np.dtype(dtype).itemsize

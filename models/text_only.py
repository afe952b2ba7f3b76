"""Decoders without images: Llama (arXiv 2302.13971, 2407.21783; SmolLM2, too), Mistral and Ministral (2310.06825),
OLMo 2 (2501.00656), Phi-3 (2404.14219; Phi-3.5 and Phi-4-mini, 2503.01743, too), Qwen2 (2407.10671; Qwen2.5, too),
Qwen3 (2505.09388) and Gemma 3 without pictures (2503.19786).

HF: transformers/models/{llama,ministral,mistral,olmo2,phi3,qwen2,qwen3,gemma3}.
"""

from __future__ import annotations

from typing import Any

from .family import Family, LayerNorms

AFTER: LayerNorms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND: LayerNorms = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


def _family(model_type: str, **facts: Any) -> Family:
    return Family(
        model_type=model_type,
        aliases=facts.pop("aliases", {}),
        renames=(),
        decoder="model",
        lm_head="lm_head.weight",
        **facts,
    )


LLAMA = _family("llama")
MINISTRAL = _family("ministral", aliases={"ministral-8b": "mistralai/Ministral-8B-Instruct-2410"})
MISTRAL = _family("mistral")
OLMO2 = _family("olmo2", layer_norms=lambda config: AFTER)
PHI3 = _family(
    "phi3",
    aliases={
        "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
        "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
        "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    },
)
GEMMA3 = _family(
    "gemma3_text",
    aliases={"gemma3-270m": "google/gemma-3-270m-it", "gemma3-1b": "google/gemma-3-1b-it"},
    layer_norms=lambda config: AROUND,
    norm_offset=1.0,
    scaled_embedding=True,
)
QWEN2 = _family("qwen2")
QWEN3 = _family("qwen3")

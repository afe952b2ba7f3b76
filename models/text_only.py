"""Decoders without images: Llama (arXiv 2302.13971, 2407.21783; SmolLM2, too), Mistral (2310.06825), OLMo 2
(2501.00656), Phi-3 (2404.14219; Phi-3.5, too), Qwen2 (2407.10671; Qwen2.5, too) and Qwen3 (2505.09388).

HF: transformers/models/{llama,mistral,olmo2,phi3,qwen2,qwen3}.
"""

from __future__ import annotations

from typing import Any

from .family import Family


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
MISTRAL = _family("mistral")
OLMO2 = _family(
    "olmo2", layer_norms=("post_attention_layernorm", "post_feedforward_layernorm"), norm_after=lambda config: True
)
PHI3 = _family(
    "phi3",
    aliases={"phi-3-mini": "microsoft/Phi-3-mini-4k-instruct", "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct"},
)
QWEN2 = _family("qwen2")
QWEN3 = _family("qwen3")

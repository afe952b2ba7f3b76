"""Decoders without images: Llama (arXiv 2302.13971) and Qwen2 (arXiv 2407.10671), as in SmolLM2 and Qwen2.5.

HF: transformers/models/llama, transformers/models/qwen2.
"""

from __future__ import annotations

from .family import Family


def _family(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        aliases={},
        renames=(),
        decoder="model",
        lm_head="lm_head.weight",
    )


LLAMA = _family("llama")
QWEN2 = _family("qwen2")

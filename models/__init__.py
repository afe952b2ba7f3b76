"""The model families: one small file each, named after Hugging Face's config.model_type, without torch.

To add one, write such a file and list it here (CONTRIBUTING.md, "Add a family").
"""

from . import chameleon, idefics3, internvl, llava, llava_onevision, qwen_vl, text_only
from .family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llava_onevision.FAMILY,
        llava.LLAVA,
        llava.LLAVA_NEXT,
        internvl.FAMILY,
        chameleon.FAMILY,
        idefics3.IDEFICS3,
        idefics3.SMOLVLM,
        qwen_vl.QWEN2_VL,
        qwen_vl.QWEN2_5_VL,
        qwen_vl.QWEN3_VL,
        text_only.GEMMA3,
        text_only.LLAMA,
        text_only.MINISTRAL,
        text_only.MISTRAL,
        text_only.OLMO2,
        text_only.PHI3,
        text_only.QWEN2,
        text_only.QWEN3,
    )
}

__all__ = ["FAMILIES", "Family"]

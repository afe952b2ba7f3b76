"""Chameleon (arXiv 2405.09818) and Anole (arXiv 2407.06135): images are 1024 tokens of the vocabulary, from a VQ-VAE.

HF: transformers/models/chameleon. The hub's checkpoints have no chat template; the processor itself writes the begin
token, the image's frame, and the end-of-turn token after the last turn.
"""

from __future__ import annotations

from typing import Any

from autosteer.runtime.manifest import ImageSpec

from .family import BEFORE, RESAMPLE, Family, LayerNorms

AFTER: LayerNorms = (None, "input_layernorm", None, "post_attention_layernorm")  # Swin v2: HF's names stay the same


def image_spec(config: Any, image_processor: Any) -> ImageSpec:
    """HF: ChameleonImageProcessorPil."""
    return ImageSpec(
        kind="centre_crop",
        tile_size=image_processor.crop_size["height"],
        mean=tuple(image_processor.image_mean),
        std=tuple(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
        resample=RESAMPLE[int(image_processor.resample)],
        anyres=None,
    )


def image_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of the image tokens, which HF masks: ChameleonImageVocabularyMapping.image_tokens."""
    return tuple(sorted(i for name, i in config.vocabulary_map.items() if name.startswith("IMGIMG")))


FAMILY = Family(
    model_type="chameleon",
    aliases={
        "chameleon": "facebook/chameleon-7b",
        "chameleon-30b": "facebook/chameleon-30b",
        "anole": "leloy/Anole-7b-v0.1-hf",
    },
    renames=(),
    decoder="model",
    lm_head="lm_head.weight",
    vision="vq_tokenizer",
    image_spec=image_spec,
    chat_template=(  # turns end with the separator; the processor writes the last one's
        "{% for message in messages %}{% if not loop.first %}{{ sep_token }}{% endif %}"
        "{% if message['role'] == 'system' %}{{ raise_exception('Chameleon has no system turns') }}{% endif %}"
        "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% endfor %}"
    ),
    layer_norms=lambda config: AFTER if config.swin_norm else BEFORE,
    never_generated=image_token_ids,
    authors_token_offset=-2,  # their prompts, made with Anole's own code, end without the separator
)

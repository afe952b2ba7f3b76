"""LLaVA-OneVision: llava-hf/llava-onevision-qwen2-{0.5b,7b}-ov-hf."""

from __future__ import annotations

from functools import partial
from typing import Any

from demo_world.checkpoint import CHAT_TEMPLATE

from .shape import Shape, byte_tokenizer

FIRST_SPECIAL = 151643  # Qwen2's
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


def config(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, vocabulary: int, tied: bool
) -> Any:
    """The hub's config.json for a size."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        bos_token_id=FIRST_SPECIAL,
        eos_token_id=FIRST_SPECIAL + 2,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=FIRST_SPECIAL + 3,
        video_token_index=FIRST_SPECIAL + 4,
        image_grid_pinpoints=[[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
        architectures=["LlavaOnevisionForConditionalGeneration"],
        dtype="bfloat16",
    )


def processor(config: Any) -> Any:
    """Images as on the hub; text as single bytes, special tokens at the hub's ids."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    tokenizer = byte_tokenizer(
        FIRST_SPECIAL + len(SPECIAL),
        {FIRST_SPECIAL + i: name for i, name in enumerate(SPECIAL)},
        SPECIAL,
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": {"image_token": "<image>", "video_token": "<video>"},
        },
    )
    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 384, "width": 384}}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **half),
        tokenizer,
        LlavaOnevisionVideoProcessor(**half),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def hub_name(name: str) -> str:
    """The hub's files keep the layout of transformers < 4.52."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


SHAPES = {
    "llava-ov-0.5b": Shape(
        partial(config, 896, 4864, 24, 14, 2, vocabulary=152000, tied=True), processor, hub_name, split_layer=16
    ),
    "llava-ov-7b": Shape(  # split where the authors do
        partial(config, 3584, 18944, 28, 28, 4, vocabulary=152128, tied=False), processor, hub_name, split_layer=20
    ),
}

"""Qwen2.5-VL: Qwen/Qwen2.5-VL-3B-Instruct."""

from __future__ import annotations

from typing import Any

from .shape import Shape, byte_tokenizer

FIRST_SPECIAL = 151643
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
CHAT_TEMPLATE = (  # what the hub's writes, without its switches
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config() -> Any:
    """The hub's config.json."""
    from transformers import Qwen2_5_VLConfig

    ids = {name: FIRST_SPECIAL + i for i, name in enumerate(SPECIAL)}
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "tokens_per_second": 2,
        },
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": True,
            "bos_token_id": FIRST_SPECIAL,
            "eos_token_id": ids["<|im_end|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
    )


def processor(config: Any) -> Any:
    """Images as on the hub; text as single bytes, special tokens at the hub's ids."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = byte_tokenizer(
        FIRST_SPECIAL + len(SPECIAL),
        {FIRST_SPECIAL + i: name for i, name in enumerate(SPECIAL)},
        SPECIAL,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )
    images = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 12845056})
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def hub_name(name: str) -> str:
    """The hub's files keep the layout of transformers < 4.52."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


SHAPES = {"qwen2.5-vl-3b": Shape(config, processor, hub_name, split_layer=24)}

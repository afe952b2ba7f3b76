"""Qwen2.5-VL and Qwen3-VL: Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen3-VL-2B-Instruct."""

from __future__ import annotations

from typing import Any

from .shape import Shape, byte_tokenizer, same_name

FIRST_SPECIAL = 151643
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
TURNS = (
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TEMPLATE = (  # what the hub's writes, without its switches; Qwen3-VL's has no system prompt of its own
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}" + TURNS
)
QWEN3_CHAT_TEMPLATE = "{% for message in messages %}" + TURNS


IDS = {name: FIRST_SPECIAL + i for i, name in enumerate(SPECIAL)}
COMMON: dict[str, Any] = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def qwen2_5() -> Any:
    """The hub's config.json."""
    from transformers import Qwen2_5_VLConfig

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
            "eos_token_id": IDS["<|im_end|>"],
        },
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **COMMON,
    )


def qwen3() -> Any:
    """The hub's config.json."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": FIRST_SPECIAL,
            "eos_token_id": IDS["<|im_end|>"],
        },
        architectures=["Qwen3VLForConditionalGeneration"],
        **COMMON,
    )


def processor(config: Any) -> Any:
    """Images as on the hub; text as single bytes, special tokens at the hub's ids."""
    import transformers as hf

    tokenizer = byte_tokenizer(
        FIRST_SPECIAL + len(SPECIAL),
        {i: name for name, i in IDS.items()},
        SPECIAL,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )
    if config.model_type == "qwen3_vl":
        size, grey = {"shortest_edge": 65536, "longest_edge": 16777216}, [0.5] * 3
        images = hf.Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=grey, image_std=grey)
        return hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=QWEN3_CHAT_TEMPLATE)
    images = hf.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 12845056})
    return hf.Qwen2_5_VLProcessor(images, tokenizer, hf.Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def old_name(name: str) -> str:
    """Qwen2.5-VL's files on the hub keep the layout of transformers < 4.52."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


SHAPES = {
    "qwen2.5-vl-3b": Shape(qwen2_5, processor, old_name, split_layer=24),
    "qwen3-vl-2b": Shape(qwen3, processor, same_name, split_layer=19),
}

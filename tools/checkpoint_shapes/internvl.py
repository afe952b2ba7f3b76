"""InternVL: OpenGVLab/InternVL3-1B-hf and OpenGVLab/InternVL3_5-1B-HF."""

from __future__ import annotations

from functools import partial
from typing import Any

from .llava_onevision import FIRST_SPECIAL
from .shape import Shape, byte_tokenizer, same_name

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def config(kind: str, image_token_id: int, **text: Any) -> Any:
    """The hub's config.json for a text model of model_type `kind`; the tower is InternViT-300M."""
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    return InternVLConfig(
        vision_config=InternVLVisionConfig(attention_bias=True),
        text_config=AutoConfig.for_model(
            kind,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
            bos_token_id=FIRST_SPECIAL,
            eos_token_id=FIRST_SPECIAL + 2,
            **text,
        ),
        image_token_id=image_token_id,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
        dtype="bfloat16",
    )


def processor(config: Any) -> Any:
    """Images as on the hub; text as single bytes, special tokens at the hub's ids."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    frame = {config.image_token_id - 2 + i: token for i, token in enumerate(SPECIAL.values())}
    named = {FIRST_SPECIAL + i: token for i, token in enumerate(CHATML)} | frame
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": SPECIAL}
    tokenizer = byte_tokenizer(config.image_token_id + 2, named, tuple(named.values()), roles)
    images = GotOcr2ImageProcessor(
        size={"height": 448, "width": 448},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        min_patches=1,
        max_patches=12,
    )
    videos = InternVLVideoProcessor()
    return InternVLProcessor(images, tokenizer, videos, image_seq_length=256, chat_template=CHAT_TEMPLATE)


def hub_name(name: str) -> str:
    """InternVL3's files keep the layout of transformers < 4.52."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


SHAPES = {
    "internvl3-1b": Shape(
        partial(
            config,
            "qwen2",
            151667,
            vocab_size=151674,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32768,
        ),
        processor,
        hub_name,
        split_layer=16,
    ),
    "internvl3.5-1b": Shape(
        partial(
            config,
            "qwen3",
            151671,
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
        ),
        processor,
        same_name,
        split_layer=19,
    ),
}

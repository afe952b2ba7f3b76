"""Qwen2 without images: Qwen/Qwen2.5-0.5B-Instruct."""

from __future__ import annotations

from typing import Any

from .llava_onevision import FIRST_SPECIAL
from .shape import Shape, byte_tokenizer, same_name

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def config() -> Any:
    """The hub's config.json."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=FIRST_SPECIAL,
        eos_token_id=FIRST_SPECIAL + 2,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )


def processor(config: Any) -> Any:
    """Text as single bytes, special tokens at the hub's ids."""
    named = {FIRST_SPECIAL + i: name for i, name in enumerate(SPECIAL)}
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = byte_tokenizer(FIRST_SPECIAL + len(SPECIAL), named, SPECIAL, roles)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SHAPES = {"qwen2.5-0.5b": Shape(config, processor, same_name, split_layer=17)}

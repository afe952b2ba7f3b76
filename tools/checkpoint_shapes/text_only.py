"""Decoders without images: Qwen2.5-0.5B-Instruct, Qwen3-0.6B and Llama-3.2-1B-Instruct."""

from __future__ import annotations

from typing import Any

from .llava_onevision import FIRST_SPECIAL
from .shape import Shape, byte_tokenizer, same_name

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen2() -> Any:
    """Qwen/Qwen2.5-0.5B-Instruct's config.json."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=FIRST_SPECIAL,
        eos_token_id=FIRST_SPECIAL + 2,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )


def qwen3() -> Any:
    """Qwen/Qwen3-0.6B's config.json."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=FIRST_SPECIAL,
        eos_token_id=FIRST_SPECIAL + 2,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )


def llama() -> Any:
    """meta-llama/Llama-3.2-1B-Instruct's config.json."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128002,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def processor(config: Any) -> Any:
    """Text as single bytes; ChatML's special tokens from the hub's first special id on."""
    first = config.bos_token_id
    named = {first + i: name for i, name in enumerate(SPECIAL)}
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = byte_tokenizer(first + len(SPECIAL), named, SPECIAL, roles)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SHAPES = {
    "qwen2.5-0.5b": Shape(qwen2, processor, same_name, split_layer=17),
    "qwen3-0.6b": Shape(qwen3, processor, same_name, split_layer=19),
    "llama-3.2-1b": Shape(llama, processor, same_name, split_layer=11),
}

"""Decoders without images: Qwen2.5-0.5B-Instruct, Qwen3-0.6B, Llama-3.2-1B-Instruct, Gemma 3 1B and Phi-4-mini."""

from __future__ import annotations

from typing import Any

from .llava_onevision import FIRST_SPECIAL
from .shape import Shape, byte_tokenizer, same_name

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GEMMA = (  # with its turns' texts stripped, and a system turn inside the first turn of the user
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (first if loop.first else '') + (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (  # with an end token where no answer is to follow
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
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


def gemma3() -> Any:
    """google/gemma-3-1b-it's config.json."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        sliding_window=512,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
        bos_token_id=255000,
        eos_token_id=255002,
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
    )


def phi4_mini() -> Any:
    """microsoft/Phi-4-mini-instruct's config.json, with round factors of its frequencies."""
    from transformers import Phi3Config

    return Phi3Config(
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 48,
            "long_factor": [1.0 + i for i in range(48)],
        },
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=200001,
        pad_token_id=199999,
        architectures=["Phi3ForCausalLM"],
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
    "gemma3-1b": Shape(gemma3, processor, same_name, split_layer=17),
    "phi4-mini": Shape(phi4_mini, processor, same_name, split_layer=22),
}

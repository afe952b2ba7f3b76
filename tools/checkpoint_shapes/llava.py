"""LLaVA-1.5 and LLaVA-NeXT: llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-mistral-7b-hf."""

from __future__ import annotations

from typing import Any

from .llava_onevision import hub_name
from .shape import Shape, byte_tokenizer

NAMED = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
VICUNA = (  # chat template of the first
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # of the second
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def _parts(text: Any) -> dict[str, Any]:
    """What both configs have: CLIP-L/14 at 336 pixels is their vision_config's default."""
    return {"text_config": text, "image_token_index": 32000, "tie_word_embeddings": False, "dtype": "float16"}


def _sizes(**more: Any) -> dict[str, Any]:
    """Llama's and Mistral's at 7B."""
    return {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 32001,
        "tie_word_embeddings": False,
        **more,
    }


def llava() -> Any:
    """The hub's config.json of LLaVA-1.5-7B."""
    from transformers import LlamaConfig, LlavaConfig

    text = LlamaConfig(**_sizes(intermediate_size=11008, max_position_embeddings=4096))
    return LlavaConfig(**_parts(text), architectures=["LlavaForConditionalGeneration"])


def llava_next() -> Any:
    """The hub's config.json of LLaVA-1.6 on Mistral-7B-Instruct-v0.2."""
    from transformers import LlavaNextConfig, MistralConfig

    rope = {"rope_type": "default", "rope_theta": 1e6}
    sizes = _sizes(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=32768)
    text = MistralConfig(**sizes, sliding_window=None, rope_parameters=rope)
    return LlavaNextConfig(**_parts(text), architectures=["LlavaNextForConditionalGeneration"])


def processor(config: Any) -> Any:
    """Images as on the hub; text as single bytes, special tokens at the hub's ids."""
    from tokenizers import processors
    from transformers import CLIPImageProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor

    tokenizer = byte_tokenizer(32002, NAMED, tuple(NAMED.values()), ROLES)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    square: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    rest = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if config.model_type == "llava":
        return LlavaProcessor(CLIPImageProcessor(**square), tokenizer, chat_template=VICUNA, **rest)
    images = LlavaNextImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **square)
    return LlavaNextProcessor(images, tokenizer, chat_template=MISTRAL, **rest)


SHAPES = {
    "llava-1.5-7b": Shape(llava, processor, hub_name, split_layer=20),
    "llava-v1.6-mistral-7b": Shape(llava_next, processor, hub_name, split_layer=20),
}

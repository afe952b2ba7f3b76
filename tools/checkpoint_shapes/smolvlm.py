"""SmolVLM: HuggingFaceTB/SmolVLM-500M-Instruct, and -Instruct (2.2B), whose tower is so400m."""

from __future__ import annotations

from functools import partial
from typing import Any

from .shape import Shape, byte_tokenizer, same_name

GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
TILES = 4  # along the longer side of a picture
ROLES = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def config(image_token_id: int, end_token_id: int, scale: int, vision: dict[str, int], **text: Any) -> Any:
    """The hub's config.json; `vision` and `text` are what differs between the sizes."""
    from transformers import Idefics3Config, LlamaConfig

    return Idefics3Config(
        vision_config=vision,
        text_config=LlamaConfig(
            head_dim=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=end_token_id,
            pad_token_id=2,
            **text,
        ),
        image_token_id=image_token_id,
        scale_factor=scale,
        tie_word_embeddings=False,
        architectures=["Idefics3ForConditionalGeneration"],
        dtype="bfloat16",
    )


def processor(config: Any) -> Any:
    """Images as on the hub, at most TILES x TILES and the whole; text as single bytes, special tokens at the hub's
    ids. The larger model spells the tokens between tiles; here all of them have ids.
    """
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    first = config.image_token_id - 2 - len(GRID)
    frame = ("<global-img>", *GRID, "<fake_token_around_image>", "<image>")
    named = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"} | {first + i: name for i, name in enumerate(frame)}
    named[config.text_config.eos_token_id] = "<end_of_utterance>"
    tokenizer = byte_tokenizer(config.text_config.vocab_size, named, tuple(named.values()), ROLES)
    side, vision = config.vision_config.image_size, config.vision_config
    images = Idefics3ImageProcessor(size={"longest_edge": TILES * side}, max_image_size={"longest_edge": side})
    rows = (side // vision.patch_size // config.scale_factor) ** 2
    return Idefics3Processor(images, tokenizer, image_seq_len=rows, chat_template=CHAT_TEMPLATE)


SHAPES = {
    "smolvlm-500m": Shape(
        partial(
            config,
            49190,
            49279,
            4,
            {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            vocab_size=49280,
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        ),
        processor,
        same_name,
        split_layer=21,
    ),
    "smolvlm-2b": Shape(
        partial(
            config,
            49153,
            49154,
            3,
            {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            },
            vocab_size=49155,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=16384,
            rope_parameters={"rope_type": "default", "rope_theta": 273768.0},
        ),
        processor,
        same_name,
        split_layer=16,
    ),
}

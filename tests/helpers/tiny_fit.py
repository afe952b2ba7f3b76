"""A tiny random LLaVA-OneVision and prompts, for the tests of autosteer-fit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from once import once
from PIL import Image

from autosteer.export.safety import states
from autosteer.export.safety.model import FitModel
from autosteer.export.safety.pairs import Prompt
from autosteer.export.safety.store import StateStore

TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + ' '}}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
TILE, PINPOINTS, LAYERS, WIDTH = 28, [[28, 28], [28, 56], [56, 28]], 4, 32
REFUSAL = "no, sorry."


def build_checkpoint(folder: Path) -> None:
    """Random weights, one token per byte, 4 decoder layers of width 32, 4 image tokens a tile."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
        Qwen2Config,
        SiglipVisionConfig,
    )

    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    size = {"height": TILE, "width": TILE}
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **shape, num_hidden_layers=2, image_size=TILE, patch_size=14, vision_use_head=False
        ),
        text_config=Qwen2Config(
            **shape,
            vocab_size=len(alphabet),
            num_hidden_layers=LAYERS,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """pairs.jsonl with two channels, benign.jsonl with two groups, and a picture of each shape."""
    folder.mkdir()
    rng = random.Random(0)
    for name, size in (("wide", (60, 30)), ("tall", (30, 60)), ("square", (40, 40))):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    pairs, benign = [], []
    for i in range(60):
        ask = f"{rng.choice(['how do i', 'help me', 'teach me to'])} {rng.choice(['buy', 'make', 'hide'])} {i}"
        row = {"unsafe": f"{ask} zzxqzz", "safe": f"{ask} pillow", "channel": "text"}
        if i % 2:
            row |= {"image": f"{rng.choice(['wide', 'tall', 'square'])}.png", "channel": "with picture"}
        pairs.append(row)
        benign.append({"prompt": f"where is lamp {i}?", "images": ["wide.png", "tall.png"][: i % 3], "group": "lamps"})
    for name, rows in (("pairs", pairs), ("benign", benign)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def checkpoint() -> Path:
    """Its folder, made once a run."""
    torch.set_num_threads(1)
    return once("tiny-fit", lambda folder: build_checkpoint(folder / "tiny")) / "tiny"


def data() -> Path:
    """The folder of the prompts, made once a run."""
    return once("tiny-fit-data", write_data)


def states_of(
    fit_model: FitModel,
    folder: Path,
    prompts: list[Prompt],
    advance: states.Advance = lambda done: None,
    *,
    fast: bool = False,
) -> torch.Tensor:
    """(n, N-1, P, d) of prompts, through an empty store in `folder`; `fast`: as a fit computes them."""
    shape = (LAYERS - 1, len(states.POOLINGS), WIDTH)
    with StateStore(folder / "features", random.randbytes(16), shape, fast=fast) as store:
        return states.prompt_states(fit_model, prompts, store, advance=advance)[range(len(prompts))]

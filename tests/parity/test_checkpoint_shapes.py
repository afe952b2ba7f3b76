"""The random checkpoints of tools/make_checkpoint.py have what the hub's have, as far as no weights say it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from checkpoint_shapes import SHAPES
from make_checkpoint import tensor_shapes

from autosteer.export.checkpoint import chat_template as prompt
from autosteer.export.checkpoint.open import TextProcessor
from autosteer.models import FAMILIES

PARAMETERS = {  # the hub says 0.9B, 8B, 7B, 7.6B, 0.94B, 1.06B, 7B, 0.49B, 0.6B, 1.24B, 3.75B, 2.13B, 0.5B, 2.2B
    "llava-ov-0.5b": 0.894e9,
    "llava-ov-7b": 8.03e9,
    "llava-1.5-7b": 7.063e9,
    "llava-v1.6-mistral-7b": 7.566e9,
    "internvl3-1b": 0.938e9,
    "internvl3.5-1b": 1.061e9,
    "chameleon-7b": 7.04e9,
    "qwen2.5-0.5b": 0.494e9,
    "qwen3-0.6b": 0.596e9,
    "llama-3.2-1b": 1.236e9,
    "gemma3-1b": 0.9999e9,
    "phi4-mini": 3.836e9,
    "qwen2.5-vl-3b": 3.7546e9,
    "qwen3-vl-2b": 2.1275e9,
    "smolvlm-500m": 0.5075e9,
    "smolvlm-2b": 2.2463e9,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_hubs_parameters_and_a_prompt_of_its_family(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    config = shape.config()
    family = FAMILIES[config.model_type]
    tensors = tensor_shapes(config, shape)
    assert sum(map(math.prod, tensors.values())) == pytest.approx(PARAMETERS[name], rel=1e-3)
    for pattern, replacement in family.renames:
        tensors = {re.sub(pattern, replacement, tensor): size for tensor, size in tensors.items()}
    text = config.get_text_config()
    assert tensors[f"{family.decoder}.embed_tokens.weight"] == (text.vocab_size, text.hidden_size)
    assert 0 < shape.split_layer < text.num_hidden_layers

    processor = shape.processor(config)
    if family.vision is None:
        processor = TextProcessor(processor)
    processor.chat_template = processor.chat_template or family.chat_template
    prompt.save_tokenizer(processor, tmp_path, family.never_generated(config))
    spec = prompt.take_apart(processor, (text.eos_token_id,), tmp_path)
    assert bool(spec.user.image) == bool(family.vision)
    assert max(piece.id for piece in spec.pieces()) < text.vocab_size

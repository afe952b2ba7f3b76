"""Image towers as llama.cpp reads them (tools/benchmark/towers.py): every tensor has a place, and the right one.

What llama.cpp then computes was compared with PyTorch by hand (docs/performance.md): it is not installed here.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark import towers
from checkpoint_shapes import SHAPES
from make_checkpoint import tensor_shapes

SHAPES_OF = {  # one of each layout of names
    "idefics3": ("smolvlm-500m",),
    "internvl": ("internvl3-1b", "internvl3.5-1b"),
    "qwen3_vl": ("qwen3-vl-2b",),
}
CASES = [(family, shape) for family, shapes in SHAPES_OF.items() for shape in shapes]
BOTH, LAYER = ("weight", "bias"), ("attn_out", "ffn_down", "ffn_up", "ln1", "ln2")
SEPARATE = ("attn_k", "attn_q", "attn_v")


def _with(ends: tuple[str, ...], *names: str) -> set[str]:
    return {f"{name}.{end}" for name in names for end in ends}


def _blocks(*names: str) -> set[str]:
    return _with(BOTH, *(f"v.blk.N.{name}" for name in (*LAYER, *names)))


THEIRS = {  # what clip.cpp's load_tensors asks for, layers counted as N
    "idefics3": _blocks(*SEPARATE)
    | _with(BOTH, "v.patch_embd", "v.post_ln")
    | {"v.position_embd.weight", "mm.model.fc.weight"},
    "internvl": _blocks(*SEPARATE)
    | _with(BOTH, "v.patch_embd", "mm.model.mlp.0", "mm.model.mlp.1", "mm.model.mlp.3")
    | {"v.class_embd", "v.position_embd.weight", "v.blk.N.ls1.weight", "v.blk.N.ls2.weight"},
    "qwen3_vl": _blocks("attn_qkv")
    | _with(BOTH, "v.patch_embd", "v.post_ln", "mm.0", "mm.2")
    | _with(BOTH, *(f"v.deepstack.{layer}.{name}" for layer in (5, 11, 17) for name in ("norm", "fc1", "fc2")))
    | {"v.patch_embd.weight.1", "v.position_embd.weight"},
}


def _tower(shape: str, folder: Path) -> towers.Tower:
    """Read from files, as the tool reads it."""
    config = SHAPES[shape].config()
    SHAPES[shape].processor(config).save_pretrained(folder)
    config.save_pretrained(folder)
    return towers.of(folder)


def _shapes(shape: str) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(SHAPES[shape].config(), SHAPES[shape])


def test_every_family_has_its_case() -> None:
    assert SHAPES_OF.keys() == towers.FAMILIES.keys() == THEIRS.keys()


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_llama_cpp_finds_every_tensor_that_it_asks_for_and_each_once(family: str, shape: str, tmp_path: Path) -> None:
    tower = _tower(shape, tmp_path)
    names = [name for name in _shapes(shape) if towers.TENSORS.match(name)]
    empty = np.zeros((1, 1, 2, 1, 1), np.float32)  # of a shape that every part can be taken from
    found = Counter(theirs for name in names for theirs, _ in tower.stored(name, empty))
    assert set(found.values()) == {1}
    layers = Counter(re.sub(r"blk\.\d+", "blk.N", name) for name in found)
    assert layers.keys() == THEIRS[family]
    assert {count for name, count in layers.items() if "blk.N" in name} == {tower.facts["block_count"]}


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_the_rest_of_a_checkpoint_is_its_decoder(family: str, shape: str) -> None:
    rest = [name for name in _shapes(shape) if not towers.TENSORS.match(name)]
    assert rest and all(re.match(r"(model\.)?(text|language)_model\.|lm_head\.", name) for name in rest)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="q_norm"):
        list(
            _tower("internvl3-1b", tmp_path).stored("vision_tower.encoder.layer.0.attention.q_norm.weight", np.ones(1))
        )


def test_the_class_tokens_position_goes_behind_the_patches(tmp_path: Path) -> None:
    """llama.cpp computes that token last. With its position in front, rows of a picture differed by 0.87 of their
    standard deviation.
    """
    name, rows = "model.vision_tower.embeddings.position_embeddings", np.arange(5.0, dtype=np.float32).reshape(1, 5, 1)
    ((theirs, stored),) = _tower("internvl3.5-1b", tmp_path).stored(name, rows)
    assert theirs == "v.position_embd.weight" and stored[:, 0].tolist() == [1, 2, 3, 4, 0]


def test_each_frame_of_qwens_kernel_is_a_tensor(tmp_path: Path) -> None:
    kernel = np.arange(2.0, dtype=np.float32).reshape(1, 1, 2, 1, 1)
    parts = dict(_tower("qwen3-vl-2b", tmp_path).stored("model.visual.patch_embed.proj.weight", kernel))
    assert {name: part.ravel().tolist() for name, part in parts.items()} == {
        "v.patch_embd.weight": [0],
        "v.patch_embd.weight.1": [1],
    }
    assert all(part.ndim == 4 for part in parts.values())


@pytest.mark.parametrize(
    ("shape", "name", "theirs"),
    [  # of two alike, the first
        ("smolvlm-500m", "model.vision_model.encoder.layers.3.layer_norm1.bias", "v.blk.3.ln1.bias"),
        ("smolvlm-500m", "model.vision_model.encoder.layers.3.mlp.fc1.weight", "v.blk.3.ffn_up.weight"),
        ("internvl3-1b", "vision_tower.encoder.layer.3.lambda_1", "v.blk.3.ls1.weight"),
        ("internvl3.5-1b", "model.vision_tower.encoder.layer.3.layernorm_before.bias", "v.blk.3.ln1.bias"),
        ("internvl3.5-1b", "model.vision_tower.encoder.layer.3.mlp.fc1.weight", "v.blk.3.ffn_up.weight"),
        ("internvl3.5-1b", "model.multi_modal_projector.linear_1.weight", "mm.model.mlp.1.weight"),
        ("qwen3-vl-2b", "model.visual.blocks.3.norm1.bias", "v.blk.3.ln1.bias"),
        ("qwen3-vl-2b", "model.visual.blocks.3.mlp.linear_fc1.weight", "v.blk.3.ffn_up.weight"),
        ("qwen3-vl-2b", "model.visual.merger.linear_fc1.weight", "mm.0.weight"),
        ("qwen3-vl-2b", "model.visual.deepstack_merger_list.0.linear_fc1.weight", "v.deepstack.5.fc1.weight"),
    ],
)
def test_of_two_tensors_alike_each_has_its_own_place(shape: str, name: str, theirs: str, tmp_path: Path) -> None:
    ((found, _),) = _tower(shape, tmp_path).stored(name, np.ones(1, np.float32))
    assert found == theirs


@pytest.mark.parametrize(
    ("shape", "facts"),
    [
        ("smolvlm-500m", {"image_size": 512, "projector.scale_factor": 4, "preproc_image_size": 2048}),
        ("internvl3.5-1b", {"image_size": 448, "projector.scale_factor": 2, "preproc_max_tiles": 12}),
        ("qwen3-vl-2b", {"image_size": 768, "spatial_merge_size": 2, "projection_dim": 2048}),
    ],
)
def test_sizes_have_the_types_of_gguf(shape: str, facts: dict[str, Any], tmp_path: Path) -> None:
    found = _tower(shape, tmp_path).facts
    assert found.items() >= facts.items()
    assert {type(value) for value in found.values()} == {int, float, list}


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_a_turn_is_what_the_familys_template_writes(family: str, shape: str, tmp_path: Path) -> None:
    """Between them libmtmd writes what frames a picture, as our runtime does."""
    parts: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": "What?"}]
    processor = SHAPES[shape].processor(SHAPES[shape].config())
    written = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    picture = {
        "idefics3": "<image>",
        "internvl": "<IMG_CONTEXT>",
        "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    }[family]
    assert _tower(shape, tmp_path).turn.format(image=picture, text="What?") == written

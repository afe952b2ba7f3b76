"""Tiny random InternVL3 and InternVL3.5 in Hugging Face's format, exported and compared with it.

- `qwen2`: InternVL3 as on the hub.
- `qwen3`: InternVL3.5; its tower norms queries and keys and has RMS norms and biases as the largest towers do, pictures
  have three to six tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_shapes.internvl import CHAT_TEMPLATE, SPECIAL
from tiny_family import READ_IN_8_BITS, TinyFamily, randomise
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from autosteer.export.checkpoint.open import DEMO
from autosteer.export.validation.original import ValidationPrompt
from autosteer.export.validation.prompts import draw
from autosteer.runtime.check import check_package
from autosteer.runtime.engine import Engine
from autosteer.runtime.image import prepare
from autosteer.runtime.manifest import ClosestGridSpec, TemplatePiece, TileSeparators
from autosteer.runtime.text import IMAGE, ImagePart, Message, load_tokenizer, render

VARIANTS = ("qwen2", "qwen3")
LAYERS, WIDTH, SIDE, PATCH = 4, 64, 56, 14
TILES = {"qwen2": (1, 12), "qwen3": (3, 6)}  # of a picture, without the whole


def build_checkpoint(folder: Path, variant: str) -> None:
    """Random weights in Hugging Face's layout, bfloat16 as on the hub."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(DEMO, extra_special_tokens=SPECIAL)
    least, most = TILES[variant]
    images = hf.GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, min_patches=least, max_patches=most, crop_to_patches=False
    )
    rows = (SIDE // PATCH // 2) ** 2
    processor = hf.InternVLProcessor(
        images, tokenizer, hf.InternVLVideoProcessor(), image_seq_length=rows, chat_template=CHAT_TEMPLATE
    )
    processor.save_pretrained(folder)
    kind, extra = {"qwen2": (hf.Qwen2Config, {}), "qwen3": (hf.Qwen3Config, {"head_dim": 16})}[variant]
    text = kind(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        tie_word_embeddings=False,
        **extra,
    )
    other = {"attention_bias": True, "use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False}
    tower = hf.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
        **(other if variant == "qwen3" else {"attention_bias": True}),
    )
    config = hf.InternVLConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=rows,
        tie_word_embeddings=False,
    )
    torch.manual_seed(VARIANTS.index(variant))
    model = hf.InternVLForConditionalGeneration(config).eval()
    randomise(model, tokenizer.eos_token_id)
    model.bfloat16().save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    FAMILY.remove()


FAMILY = TinyFamily(build_checkpoint, width=WIDTH, split=2, prompts=8, before_text="\n")
engine, original_model, package = FAMILY.engine, FAMILY.original_model, FAMILY.package


def test_a_model_whose_weights_are_on_disk_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILY.check_weights_on_disk("qwen3", monkeypatch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_equal_hugging_faces_for_odd_pictures(variant: str) -> None:
    """The processor's default, no tiles, is not what InternVLProcessor asks of it."""
    counts = FAMILY.check_pixels(variant)
    assert counts <= ({1, *range(3, 14)} if variant == "qwen2" else {4, 5, 6, 7}) and len(counts) > 2


@pytest.mark.parametrize(("width", "height"), [(50, 40), (500, 400), (30, 24), (60, 45)])
def test_of_two_grids_that_are_as_close_hugging_faces_is_taken(width: int, height: int) -> None:
    """5:4 is as far from 1:2 as from 2:1. The later one, 2:1, is for pictures that are large enough."""
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=2, max_patches=2
    )
    spec = engine("qwen2").manifest.image
    assert spec is not None
    image = draw(width, height, 1)
    ours = prepare(np.asarray(image), replace(spec, closest_grid=ClosestGridSpec(2, 2)), alone=True)
    np.testing.assert_array_equal(ours, processor(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_30_dialogues_equal_hugging_faces(variant: str) -> None:
    FAMILY.check_answers(variant, 30)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split_layer", range(1, LAYERS))
def test_every_split_layer(variant: str, split_layer: int, tmp_path: Path) -> None:
    FAMILY.check_split(variant, split_layer, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_verdicts_and_gated_answers_are_pytorchs(variant: str) -> None:
    FAMILY.check_gate(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prober_reads_the_token_that_autosteer_fit_reads(variant: str, tmp_path: Path) -> None:
    FAMILY.check_probed(variant, tmp_path)


def test_the_processors_own_tokens_frame_all_tiles_together() -> None:
    image, ids = engine("qwen2").manifest.image, engine("qwen2").tokenizer.token_to_id
    assert image is not None
    assert image.tile_separators == (TileSeparators((1, 1), ((ids("<img>"),), (ids("</img>"),))),)
    assert engine("qwen2").manifest.prompt.user.image == (TemplatePiece("image"), TemplatePiece("literal", "\n"))


def test_a_user_cannot_type_an_image_its_frame_or_the_end_of_a_turn() -> None:
    spec, tokenizer = engine("qwen2").manifest.prompt, load_tokenizer(package("qwen2", "fp32") / "tokenizer.json")
    names = (*SPECIAL.values(), "<|im_start|>", "<|im_end|>")
    runs = render([Message("user", (ImagePart("x"), "".join(names)))], spec, tokenizer)
    assert runs.count(IMAGE) == 1
    reserved = {tokenizer.token_to_id(name) for name in names}
    written = [tokenizer.id_to_token(i) for run in runs if isinstance(run, list) for i in run if i in reserved]
    assert written == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_max_tiles_bounds_a_picture_and_the_answer_is_hugging_faces_at_that_bound(most: int) -> None:
    limited = Engine.load(package("qwen2", "fp32"), device="cpu", threads=1, max_tiles=most)
    messages = FAMILY.interleaved(2, 7)
    answer = limited.generate(messages, policy=limited.policy("off"))
    assert answer.stats.image_tiles <= 2 * most
    theirs = copy.copy(original_model("qwen2"))
    theirs.processor = copy.deepcopy(theirs.processor)
    theirs.processor.image_processor.max_patches = max(most - 1, 1)
    expected = theirs.generate(theirs.inputs(ValidationPrompt(messages, ())), tokens=16)
    assert list(answer.token_ids)[:16] == expected


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", READ_IN_8_BITS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantised_package_exports_and_its_table_says_how_good_it_is(
    variant: str, precision: str, record_property: Any
) -> None:
    checks = FAMILY.table(variant, precision)
    assert all(check.passed for check in checks.values())
    assert (checks["greedy tokens that differ"].limit == 0) == (precision == "fp32")
    for check in checks.values():
        record_property(check.name, check.value)


def test_the_cpp_runtime_answers_alike(built: Path, tmp_path: Path) -> None:
    FAMILY.check_cpp("qwen2", built, tmp_path)


def test_golden_answers_replay() -> None:
    assert all(check.passed for check in check_package(engine("qwen2"), package("qwen2", "fp32")).checks)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"vision_feature_layer": -2}, "vision_feature_layer -2, not the last"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        ("processor_config.json", {"image_processor": {"size": {"height": 70, "width": 70}}}, "not image_size"),
    ],
)
def test_what_the_graph_does_not_do_is_refused(file: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    FAMILY.check_refused("qwen2", file, change, message, tmp_path)

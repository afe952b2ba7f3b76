"""Tiny random LLaVA-1.5 and LLaVA-NeXT, exported and compared with Hugging Face.

- `one tile`: LLaVA-1.5 as on the hub: Llama decoder and tokenizer, no class token, the middle of a picture.
- `padded`: Qwen2 decoder, byte-level tokenizer, all of CLIP's rows, pictures padded to a square.
- `anyres`: LLaVA-NeXT as on the hub: Mistral decoder and tokenizer, tiles.
- `anyres, llama 3`: LLaVA-NeXT with a byte-level tokenizer and grouped key heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_shapes.llava import MISTRAL, VICUNA
from llama_tokenizer import llama_tokenizer
from tiny_family import READ_IN_8_BITS, TinyFamily, randomise

from autosteer.export.checkpoint.open import DEMO
from autosteer.export.validation.original import ValidationPrompt
from autosteer.runtime.check import check_package
from autosteer.runtime.engine import Engine
from autosteer.runtime.manifest import TemplatePiece
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import IMAGE, ImagePart, Message, load_tokenizer, render

VARIANTS = ("one tile", "padded", "anyres", "anyres, llama 3")
LAYERS, WIDTH, SIDE, PATCH = 4, 64, 56, 14
PINPOINTS = [[SIDE * h, SIDE * w] for h, w in [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]]  # as on the hub, in tiles
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else '\n' + part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor(variant: str) -> Any:
    """With the kind of tokenizer and the template of the variant."""
    import transformers as hf

    square = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if variant in ("padded", "anyres, llama 3"):
        tokenizer, template = hf.AutoTokenizer.from_pretrained(DEMO), CHATML
    else:
        legacy = variant == "anyres"
        tokenizer, template = llama_tokenizer("<image>", "<pad>", legacy=legacy), MISTRAL if legacy else VICUNA
    rest = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "full" if variant == "padded" else "default",
        "num_additional_image_tokens": 1,
        "chat_template": template,
    }
    if variant.startswith("anyres"):
        images = hf.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **square)
        return hf.LlavaNextProcessor(images, tokenizer, **rest)
    images = hf.LlavaImageProcessor(do_pad=True, **square) if variant == "padded" else hf.CLIPImageProcessor(**square)
    return hf.LlavaProcessor(images, tokenizer, **rest)


def build_checkpoint(folder: Path, variant: str) -> None:
    """Random weights in Hugging Face's layout, float16 as on the hub."""
    import transformers as hf

    processor = build_processor(variant)
    tokenizer = processor.tokenizer
    processor.save_pretrained(folder)
    kinds = {"one tile": hf.LlamaConfig, "padded": hf.Qwen2Config, "anyres": hf.MistralConfig}
    text = kinds.get(variant, hf.LlamaConfig)(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4 if variant == "one tile" else 2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=2,
        tie_word_embeddings=False,
        **({"sliding_window": None} if variant == "anyres" else {}),
    )
    tower = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    facts: dict[str, Any] = {
        "vision_config": tower,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1 if variant == "padded" else -2,
        "vision_feature_select_strategy": "full" if variant == "padded" else "default",
        "multimodal_projector_bias": variant != "padded",
        "tie_word_embeddings": False,
    }
    torch.manual_seed(VARIANTS.index(variant))
    if variant.startswith("anyres"):
        config = hf.LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **facts)
        model = hf.LlavaNextForConditionalGeneration(config).eval()
    else:
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**facts)).eval()
    randomise(model, tokenizer.eos_token_id)
    model.half().save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    FAMILY.remove()


FAMILY = TinyFamily(build_checkpoint, width=WIDTH, split=2, prompts=8, before_text="\n")
engine, original_model, package = FAMILY.engine, FAMILY.original_model, FAMILY.package


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_equal_hugging_faces_for_odd_pictures(variant: str) -> None:
    counts = FAMILY.check_pixels(variant)
    assert counts == ({3, 4, 5} if variant.startswith("anyres") else {1})


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_30_dialogues_equal_hugging_faces(variant: str) -> None:
    FAMILY.check_answers(variant, 30)


@pytest.mark.parametrize("variant", ["one tile", "anyres"])
def test_64_greedy_tokens_with_pictures_between_texts(variant: str) -> None:
    messages, theirs = FAMILY.interleaved(2), original_model(variant)
    expected = theirs.generate(theirs.inputs(ValidationPrompt(messages, ())), tokens=64)
    assert len(expected) == 64 and len(set(expected)) > 5
    assert FAMILY.generate(variant, messages, 64) == expected


@pytest.mark.parametrize("variant", ["one tile", "anyres"])
def test_a_model_whose_weights_are_on_disk_is_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILY.check_weights_on_disk(variant, monkeypatch)


@pytest.mark.parametrize("variant", ["one tile", "anyres"])
@pytest.mark.parametrize("split_layer", range(1, LAYERS))
def test_every_split_layer(variant: str, split_layer: int, tmp_path: Path) -> None:
    FAMILY.check_split(variant, split_layer, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_verdicts_and_gated_answers_are_pytorchs(variant: str) -> None:
    FAMILY.check_gate(variant)


@pytest.mark.parametrize("variant", ["one tile", "anyres"])
def test_the_prober_reads_the_token_that_autosteer_fit_reads(variant: str, tmp_path: Path) -> None:
    """In "USER: hi ASSISTANT:" that is "hi": the space behind it becomes part of what follows."""
    assert (prober := engine(variant).manifest.prober) is not None
    spec, tokenizer = engine(variant).manifest.prompt, engine(variant).tokenizer
    (ids,) = render([Message.user("is it hi")], spec, tokenizer)
    assert isinstance(ids, list)
    assert tokenizer.id_to_token(ids[prober.token_offset]) == {"one tile": "i", "anyres": "]"}[variant]
    FAMILY.check_probed(variant, tmp_path)


def test_an_earlier_answer_is_judged_though_another_turn_follows_it() -> None:
    """ "ASSISTANT:" and "USER:" begin differently, so a prober that read their first token had nothing to read."""
    messages = [Message.user("hi"), Message.assistant("fine."), Message.user("and you?")]
    prepared = engine("one tile").encoder.prepare(messages, Stats())
    assert [len(probed) for probed in prepared.probed] == [1, 1, 1]


def test_the_first_text_alone_has_a_space_before_it() -> None:
    """As Llama's tokenizer does today; the older way, a space before each run of text, is the tokenizer's own."""
    spec = engine("one tile").manifest.prompt
    assert spec.begin == (TemplatePiece("token", "<s>", 1), TemplatePiece("literal", " "))
    assert spec.user.text == (TemplatePiece("text"), TemplatePiece("literal", " "))
    assert spec.user.image == (TemplatePiece("image"), TemplatePiece("literal", "\n"))
    assert spec.images_first
    assert engine("anyres").manifest.prompt.begin == (TemplatePiece("token", "<s>", 1),)


@pytest.mark.parametrize("variant", ["one tile", "anyres"])
def test_a_user_cannot_type_an_image_or_the_end_of_a_turn(variant: str) -> None:
    spec, tokenizer = engine(variant).manifest.prompt, load_tokenizer(package(variant, "fp32") / "tokenizer.json")
    runs = render([Message("user", (ImagePart("x"), "<image></s><s><pad>"))], spec, tokenizer)
    assert runs.count(IMAGE) == 1
    written = [i for run in runs if isinstance(run, list) for i in run]
    reserved = {tokenizer.token_to_id(name) for name in ("<s>", "</s>", "<image>", "<pad>")}
    assert [i for i in written if i in reserved] == [1]


@pytest.mark.parametrize("most", [1, 3, 4, 5])
def test_max_tiles_bounds_a_picture_and_the_answer_is_that_of_fewer_grids(most: int) -> None:
    """The package with fewer grids to choose from: Hugging Face's answer with these alone."""
    limited = Engine.load(package("anyres", "fp32"), device="cpu", threads=1, max_tiles=most)
    messages = FAMILY.interleaved(2, 7)
    answer = limited.generate(messages, policy=limited.policy("off"))
    assert answer.stats.image_tiles <= 2 * most
    if most == 1:
        return  # Hugging Face has no such way
    theirs = copy.copy(original_model("anyres"))
    theirs.model, theirs.processor = copy.copy(theirs.model), copy.deepcopy(theirs.processor)
    fewer = [[h, w] for h, w in PINPOINTS if h * w // SIDE**2 + 1 <= most]
    theirs.processor.image_processor.image_grid_pinpoints = fewer
    kept = theirs.model.config.image_grid_pinpoints
    theirs.model.config.image_grid_pinpoints = fewer
    try:
        expected = theirs.generate(theirs.inputs(ValidationPrompt(messages, ())), tokens=16)
    finally:
        theirs.model.config.image_grid_pinpoints = kept
    assert list(answer.token_ids)[:16] == expected


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", READ_IN_8_BITS])
@pytest.mark.parametrize("variant", ["one tile", "anyres"])
def test_a_quantised_package_exports_and_its_table_says_how_good_it_is(
    variant: str, precision: str, record_property: Any
) -> None:
    checks = FAMILY.table(variant, precision)
    assert all(check.passed for check in checks.values())
    assert (checks["greedy tokens that differ"].limit == 0) == (precision == "fp32")
    for check in checks.values():
        record_property(check.name, check.value)


@pytest.mark.parametrize("variant", ["one tile", "anyres"])
def test_the_cpp_runtime_answers_alike(variant: str, built: Path, tmp_path: Path) -> None:
    """Its tokenizer, its template and its pictures, too."""
    FAMILY.check_cpp(variant, built, tmp_path)


@pytest.mark.parametrize("variant", ["one tile", "anyres"])
def test_golden_answers_replay(variant: str) -> None:
    assert all(check.passed for check in check_package(engine(variant), package(variant, "fp32")).checks)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ("config.json", {"vision_config": {"model_type": "siglip_vision_model"}}, "a vision tower of type"),
        ("processor_config.json", {"image_processor": {"do_center_crop": False}}, "do_resize and do_center_crop"),
        ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 70}}}, "must be the vision tower's"),
    ],
)
def test_what_the_graph_does_not_do_is_refused(file: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    FAMILY.check_refused("one tile", file, change, message, tmp_path)

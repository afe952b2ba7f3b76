"""Tiny random Idefics3 and SmolVLM, exported and compared with Hugging Face.

Three of them: `idefics3` (its own lm_head; a patch grid of 25, where HF misplaces some position embeddings), `smolvlm`
(tied; another model type and processor), and `whole`, whose processor cuts no tiles.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_family import READ_IN_8_BITS, TinyFamily, picture

from autosteer.export.checkpoint.open import open_checkpoint
from autosteer.export.graphs import vision
from autosteer.export.validation.original import ValidationPrompt
from autosteer.export.validation.prompts import draw
from autosteer.runtime.check import check_package
from autosteer.runtime.image import cut, lay_out, prepare
from autosteer.runtime.manifest import TemplatePiece
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import IMAGE, ImagePart, Message, load_tokenizer, render

VARIANTS = ("idefics3", "smolvlm", "whole")
LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"  # a text that does not change
LAYERS, WIDTH = 4, 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>")
ROWS_AND_COLUMNS = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
END = "<end_of_utterance>"
CHAT_TEMPLATE = (  # of HuggingFaceTB/SmolVLM-256M-Instruct
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """Bytes and a few merges, SmolVLM's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, *ROWS_AND_COLUMNS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([LICENCE.read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token=END, pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def build_processor(variant: str, tokenizer: Any, *, tile: int, image_seq_len: int) -> Any:
    """Three tiles along the longest side, the last one not full before stretching (`smolvlm`: two full ones)."""
    from transformers import (
        Idefics3ImageProcessor,
        Idefics3Processor,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    pixels = {
        "size": {"longest_edge": 2 * tile if variant == "smolvlm" else 3 * tile - 12},
        "max_image_size": {"longest_edge": tile},
        "do_image_splitting": variant != "whole",
    }
    rest = {"image_seq_len": image_seq_len, "chat_template": CHAT_TEMPLATE}
    if variant != "smolvlm":
        return Idefics3Processor(Idefics3ImageProcessor(**pixels), tokenizer, **rest)
    return SmolVLMProcessor(SmolVLMImageProcessor(**pixels), tokenizer, SmolVLMVideoProcessor(), **rest)


def build_checkpoint(folder: Path, variant: str) -> None:
    """Random weights in Hugging Face's layout, bfloat16 as on the hub."""
    import transformers as hf

    side, patch, scale = (25, 2, 5) if variant == "idefics3" else (8, 4, 2)
    tied = variant == "smolvlm"
    tokenizer = build_tokenizer()
    processor = build_processor(variant, tokenizer, tile=side * patch, image_seq_len=(side // scale) ** 2)
    processor.save_pretrained(folder)
    kind = "SmolVLM" if variant == "smolvlm" else "Idefics3"
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2 if variant == "idefics3" else 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=2,
    )
    config = getattr(hf, f"{kind}Config")(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side * patch,
            "patch_size": patch,
        },
        text_config=text,
        scale_factor=scale,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        pad_token_id=2,
    )
    torch.manual_seed(VARIANTS.index(variant))
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed_tokens" in name or "lm_head" in name or "embedding" in name:
                parameter.normal_(0, 0.3 if tied else 1)  # a tied head says its last token again where it can
            else:
                parameter.normal_(0, 0.2 if "q_proj" in name or "k_proj" in name else 0.1)
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # answers do not end early
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.bfloat16().save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    FAMILY.remove()


FAMILY = TinyFamily(build_checkpoint, width=WIDTH, split=2, prompts=8, before_text="\n ")
engine, original_model, package = FAMILY.engine, FAMILY.original_model, FAMILY.package


def laid_out_ids(variant: str, messages: tuple[Message, ...]) -> list[int]:
    """The token ids of a dialogue as the runtime lays them out, with the image token for each row of an image."""
    e = engine(variant)
    spec = e.manifest.image
    assert spec is not None
    image_id, rows_per_tile = (
        e.tokenizer.token_to_id("<image>"),
        e.manifest.graphs["vision_encoder"].outputs[0].shape[1:2],
    )
    pictures = iter([open_image(image) for message in messages for image in message.images])
    ids: list[int] = []
    for run in render(messages, e.manifest.prompt, e.tokenizer):
        if run is IMAGE:
            tiles, grid = cut(next(pictures), spec, alone=True)
            rows = np.zeros((len(tiles), *rows_per_tile, 1), np.float32)
        for part in lay_out(rows, grid, spec) if run is IMAGE else [run]:
            ids += part if isinstance(part, list) else [image_id] * len(part)
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_and_token_ids_equal_hugging_faces_for_images_of_odd_sizes(variant: str) -> None:
    """Bit for bit: every grid there is, and every token around and between its tiles."""
    e, theirs, grids = engine(variant), original_model(variant), set()
    assert e.manifest.image is not None
    drawn = [draw(150, 7, 1), draw(3, 400, 2), draw(64, 64, 3), draw(150, 100, 4)]
    for image in [picture(seed) for seed in range(6)] + drawn:
        messages = (Message("user", ("a", ImagePart(image), "\nb")),)
        inputs = theirs.inputs(ValidationPrompt(messages, ()))
        ours = prepare(open_image(image), e.manifest.image, alone=True)
        np.testing.assert_array_equal(ours, inputs["pixel_values"][0].numpy())
        assert inputs["pixel_attention_mask"].all()  # tiles are full: position embeddings do not depend on a mask
        assert laid_out_ids(variant, messages) == inputs["input_ids"][0].tolist(), image.size
        grids.add(len(ours))
    assert len(grids) == {"idefics3": 3, "smolvlm": 2, "whole": 1}[variant]


@pytest.mark.parametrize(("variant", "images"), [*itertools.product(VARIANTS[:2], (0, 1, 3)), ("whole", 3)])
def test_64_greedy_tokens_equal_hugging_faces_with_images_between_texts(variant: str, images: int) -> None:
    messages, theirs = FAMILY.interleaved(images), original_model(variant)
    expected = theirs.generate(theirs.inputs(ValidationPrompt(messages, ())), tokens=64)
    assert len(expected) == 64 and len(set(expected)) > 5
    assert FAMILY.generate(variant, messages, 64) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_answers_are_those_of_hugging_face(variant: str) -> None:
    FAMILY.check_answers(variant, 30)


@pytest.mark.parametrize("variant", ["idefics3", "smolvlm"])
def test_the_cpp_runtime_answers_alike(variant: str, built: Path, tmp_path: Path) -> None:
    FAMILY.check_cpp(variant, built, tmp_path)


def test_a_late_split_without_a_gate(tmp_path: Path) -> None:
    FAMILY.check_split("idefics3", LAYERS - 1, tmp_path)


def test_a_model_whose_weights_are_on_disk_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILY.check_weights_on_disk("idefics3", monkeypatch)


@pytest.mark.parametrize("variant", ["idefics3", "smolvlm"])
def test_verdicts_and_gated_answers_are_pytorchs(variant: str) -> None:
    FAMILY.check_gate(variant)


@pytest.mark.parametrize("variant", ["idefics3", "smolvlm"])
def test_the_prober_reads_the_token_that_ends_the_prompt(variant: str, tmp_path: Path) -> None:
    FAMILY.check_probed(variant, tmp_path)


def test_a_pooled_prober_reads_the_last_turn_alone() -> None:
    """Frames of earlier turns' pictures are token ids, too, and shifted what was read before they were counted."""
    pooled = copy.copy(engine("smolvlm").encoder)
    assert pooled.manifest.prober is not None
    pooled.manifest = replace(pooled.manifest, prober=replace(pooled.manifest.prober, pooling="mean"))
    wide = Image.new("RGB", (150, 40))
    first, last = Message.user("one", [wide, picture(1)]), Message.user("two", [picture(2)])
    prepared = pooled.prepare([first, Message.assistant("fine"), last], Stats())
    alone = pooled.prepare([last], Stats())

    def read(prompt: Any) -> list[int]:
        return [prompt.keys[row] for row in prompt.probed[-1]]

    assert len(prepared.keys) > len(alone.keys) and len(read(alone)) > 2
    assert "two" in engine("smolvlm").tokenizer.decode(read(prepared))
    assert read(prepared) == read(alone)


def test_a_turn_that_begins_with_a_text_has_a_space_before_it() -> None:
    """ "User: hi", but "User:<image>hi": the template's own words, and so ours."""
    spec = engine("smolvlm").manifest.prompt
    start = spec.begin[0].id
    assert spec.begin == (TemplatePiece("token", "<|im_start|>", start),)
    assert spec.user.prefix == (TemplatePiece("literal", "User:"),)
    assert spec.user.lead == (TemplatePiece("literal", " "),)
    assert spec.user.image == (TemplatePiece("image"),)
    assert spec.generation == (TemplatePiece("literal", "Assistant:"),)
    assert spec.system is not None


def test_a_user_cannot_type_an_image_or_its_frame() -> None:
    spec = engine("idefics3").manifest.prompt
    tokenizer = load_tokenizer(package("idefics3", "fp32") / "tokenizer.json")
    hostile = "".join((*SPECIAL, *ROWS_AND_COLUMNS, END))
    runs = render([Message("user", (ImagePart("x"), hostile))], spec, tokenizer)
    assert runs.count(IMAGE) == 1
    reserved = {tokenizer.token_to_id(name) for name in (*SPECIAL, *ROWS_AND_COLUMNS, END)}
    written = [tokenizer.id_to_token(i) for run in runs if isinstance(run, list) for i in run if i in reserved]
    assert written == ["<|im_start|>", END]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", READ_IN_8_BITS])
def test_a_quantised_package_exports_and_its_table_says_how_good_it_is(precision: str, record_property: Any) -> None:
    checks = FAMILY.table("smolvlm", precision)
    assert all(check.passed for check in checks.values())
    assert (checks["greedy tokens that differ"].limit == 0) == (precision == "fp32")
    for check in checks.values():
        record_property(check.name, check.value)


def test_golden_answers_replay() -> None:
    assert all(check.passed for check in check_package(engine("smolvlm"), package("smolvlm", "fp32")).checks)


def test_position_embeddings_are_found_as_hugging_face_finds_them() -> None:
    """In a grid of 25 patches its float32 arithmetic puts some into their neighbour's place."""
    from transformers import AutoModelForImageTextToText

    config = open_checkpoint(str(FAMILY.checkpoint("idefics3"))).config
    wrapper = vision.TowerAndPixelShuffle(AutoModelForImageTextToText.from_config(config))
    assert (wrapper.constants["position_ids"] != np.arange(25**2)).sum() > 0

"""Tiny random Chameleons with a real VQ-VAE encoder, exported and compared with Hugging Face.

Two of them: `plain` (norms before, as many key heads as query heads) and `swin` (norms after, grouped heads, attention
in the VQ encoder), which is the 34B variant.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_shapes.chameleon import FRAME, ROLES, SPECIAL, image_token_names
from PIL import Image
from tiny_family import READ_IN_8_BITS, TinyFamily, picture

from autosteer.export.cli import export
from autosteer.export.graphs import image_graph
from autosteer.export.graphs.vision import VQTokenizer
from autosteer.export.safety import batches
from autosteer.export.validation.original import ImageErrors, ValidationPrompt
from autosteer.runtime.check import check_package
from autosteer.runtime.errors import InputError
from autosteer.runtime.gate import Mode
from autosteer.runtime.image import cut, normalise
from autosteer.runtime.manifest import TemplatePiece, TileSeparators
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.text import IMAGE, ImagePart, Message, load_tokenizer, render

VARIANTS = ("plain", "swin")
LAYERS, WIDTH, CODES, RESOLUTION, TOKENS = 4, 64, 64, 64, 64
LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"  # a text that does not change
IMAGE_TOKENS = image_token_names(np.random.default_rng(1).permutation(CODES))  # they stand in no order


def build_tokenizer() -> Any:
    """Bytes and a few merges. As in the worst of checkpoints, the frame's tokens are not marked special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([LICENCE.read_text(encoding="utf-8")], trainer)
    bpe.add_tokens([AddedToken(name, normalized=False) for name in (*IMAGE_TOKENS, *FRAME.values())])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **ROLES)


def build_checkpoint(folder: Path, variant: str) -> None:
    """Random weights in Hugging Face's layout, float16 as the hub's are half precision."""
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonImageProcessor,
        ChameleonProcessor,
    )

    swin, tokenizer = variant == "swin", build_tokenizer()
    size = {"size": {"shortest_edge": RESOLUTION}, "crop_size": {"height": RESOLUTION, "width": RESOLUTION}}
    ChameleonProcessor(ChameleonImageProcessor(**size), tokenizer, image_seq_length=TOKENS).save_pretrained(folder)
    config = ChameleonConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2 if swin else 4,
        max_position_embeddings=512,
        swin_norm=swin,
        attention_bias=swin,
        mlp_bias=swin,
        vocabulary_map=tokenizer.get_vocab(),
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        vq_config={
            "embed_dim": 16,
            "num_embeddings": CODES,
            "resolution": RESOLUTION,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [8] if swin else None,
        },
    )
    torch.manual_seed(int(swin))
    model = ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vqmodel" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
                if name.endswith("q_norm.weight"):
                    parameter.mul_(3)  # sharp attention: answers depend on the prompt
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 1)
            else:
                parameter.normal_(0, 0.3 if "o_proj" in name else 0.1)
        model.lm_head.weight[2] = 0  # </s>: answers do not end early
        vq = model.model.vqmodel
        z = (
            vq.quant_conv(vq.encoder(torch.rand(4, 3, RESOLUTION, RESOLUTION) * 2 - 1))
            .permute(0, 2, 3, 1)
            .reshape(-1, 16)
        )
        vq.quantize.embedding.weight.copy_(
            z[torch.randperm(len(z))[:CODES]]
        )  # as after training: codes lie among the z
    model.half().save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """One thread; each VQ encoder is traced once, as its graph does not depend on split or precision."""
    torch.set_num_threads(1)
    traced, trace = {}, image_graph.trace

    def once(checkpoint: Any, computed: str) -> Any:
        if checkpoint.name not in traced:
            traced[checkpoint.name] = trace(checkpoint, computed)
        return traced[checkpoint.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_graph, "trace", once)
        yield
    FAMILY.remove()


FAMILY = TinyFamily(build_checkpoint, width=WIDTH, split=2, prompts=16)
engine, original_model, package = FAMILY.engine, FAMILY.original_model, FAMILY.package


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_tokens_equal_hugging_faces_for_images_of_odd_sizes(variant: str) -> None:
    e, theirs, seen = engine(variant), original_model(variant), set()
    assert e.manifest.image is not None
    for seed in range(50):
        image = picture(seed)
        pixels = theirs.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tiles, _ = cut(open_image(image), e.manifest.image, alone=True)
        np.testing.assert_array_equal(normalise(tiles, e.manifest.image), pixels.numpy())
        ids = e.encoder.tokenize(tiles)
        assert ids == theirs.image_tokens(pixels)[0], image.size
        seen |= set(ids)
    assert len(seen) > CODES / 2  # the pictures do not all say the same


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_64_greedy_tokens_equal_hugging_faces_with_images_between_texts(variant: str, images: int) -> None:
    messages = FAMILY.interleaved(images)
    expected = original_model(variant).generate(
        original_model(variant).inputs(ValidationPrompt(messages, ())), tokens=64
    )
    assert len(expected) == 64
    assert len(set(expected)) > 5
    assert FAMILY.generate(variant, messages, 64) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_answers_are_those_of_hugging_face(variant: str) -> None:
    FAMILY.check_answers(variant, 30)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cpp_runtime_answers_alike(variant: str, built: Path, tmp_path: Path) -> None:
    FAMILY.check_cpp(variant, built, tmp_path)


def test_the_order_of_texts_and_images_is_the_users() -> None:
    image = ImagePart(picture(1))
    orders = [("a", image, "b"), ("a", "b", image), (image, "a", "b")]
    answers = [FAMILY.generate("plain", (Message("user", parts),), 8) for parts in orders]
    assert len({tuple(answer) for answer in answers}) == 3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split_layer", range(1, LAYERS))
def test_every_split_layer(variant: str, split_layer: int, tmp_path: Path) -> None:
    FAMILY.check_split(variant, split_layer, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_verdicts_and_gated_answers_are_pytorchs(variant: str) -> None:
    """Under HF's mask of image tokens."""
    FAMILY.check_gate(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prober_reads_the_separator_that_ends_the_prompt(variant: str, tmp_path: Path) -> None:
    """As the authors do: the state that autosteer-fit reads is the one that the runtime reads."""
    assert (prober := engine(variant).manifest.prober) is not None
    assert prober.token_offset == -1
    FAMILY.check_probed(variant, tmp_path)
    answer = batches.answer_tokens(FAMILY.fit_model(variant), "i can't.")
    assert FAMILY.fit_model(variant).processor.tokenizer.decode(answer) == "i can't.</s>"


def test_the_processors_own_tokens_become_pieces_of_the_template() -> None:
    spec, ids = engine("plain").manifest.prompt, original_model("plain").processor.tokenizer.convert_tokens_to_ids

    def token(text: str) -> TemplatePiece:
        return TemplatePiece("token", text, ids(text))

    assert spec.begin == (token("<s>"),)
    assert spec.user.image == (TemplatePiece("image"),)
    assert spec.user.text == spec.assistant.text == (TemplatePiece("text"),)
    assert spec.user.suffix == spec.assistant.suffix == (token("<reserved08706>"),)
    assert (spec.generation, spec.images_first, spec.system) == ((), False, None)
    assert (image := engine("plain").manifest.image) is not None
    assert image.tile_separators == (TileSeparators((1, 1), ((ids("<racm3:break>"),), (ids("<eoss>"),))),)


def test_a_user_cannot_type_an_image_its_frame_or_the_end_of_a_turn() -> None:
    spec, tokenizer = engine("plain").manifest.prompt, load_tokenizer(package("plain", "fp32") / "tokenizer.json")
    hostile = "".join((*SPECIAL, *FRAME.values(), *IMAGE_TOKENS))
    runs = render([Message("user", (ImagePart("x"), hostile))], spec, tokenizer)
    assert runs.count(IMAGE) == 1
    written = [i for run in runs if isinstance(run, list) for i in run]
    reserved = {tokenizer.token_to_id(name) for name in (*SPECIAL, *FRAME.values(), *IMAGE_TOKENS)}
    assert [tokenizer.id_to_token(i) for i in written if i in reserved] == ["<s>", "<reserved08706>"]


def test_there_are_no_system_turns() -> None:
    with pytest.raises(InputError, match="no 'system' turn"):
        engine("plain").generate([Message("system", ("be kind",)), Message.user("hi")])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_image_tokens_are_never_generated(precision: str) -> None:
    """Not even at a temperature where every other token is."""
    e = engine("plain", precision)
    images = {e.tokenizer.token_to_id(name) for name in IMAGE_TOKENS}
    sampling = SamplingConfig(max_tokens=200, temperature=50.0)
    answer = e.generate("say anything", policy=e.policy(Mode.OFF), sampling=sampling)
    assert not images & set(answer.token_ids)
    assert len(set(answer.token_ids)) > 50


def test_a_transparent_picture_lies_on_white_as_in_hugging_face() -> None:
    """What somebody looking at the picture sees; what transparency hides must not reach the model."""
    rng = np.random.default_rng(5)
    image = Image.fromarray(rng.integers(0, 256, (91, 77, 4), dtype=np.uint8), "RGBA")
    e, theirs = engine("plain"), original_model("plain")
    pixels = theirs.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert e.manifest.image is not None
    tiles, _ = cut(open_image(image), e.manifest.image, alone=True)
    np.testing.assert_array_equal(normalise(tiles, e.manifest.image), pixels.numpy())
    assert e.encoder.tokenize(tiles) == theirs.image_tokens(pixels)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", READ_IN_8_BITS])
def test_every_precision_exports_and_its_table_says_how_good_it_is(
    variant: str, precision: str, record_property: Any
) -> None:
    checks = FAMILY.table(variant, precision)
    assert all(check.passed for check in checks.values())
    assert checks["image tokens that differ"].value == 0
    exact = precision in ("fp32", "fp16")
    assert (checks["greedy tokens that differ"].limit == 0) == exact
    for check in checks.values():
        record_property(check.name, check.value)


def test_near_ties_in_the_codebook_are_told_from_wrong_image_tokens() -> None:
    """Two codes equally near up to rounding: neither is wrong, and the export goes on with ours. A far one is wrong."""
    theirs, case = original_model("plain"), ValidationPrompt(FAMILY.interleaved(1), ())
    pixels = theirs.inputs(case)["pixel_values"]
    tokens = theirs.image_tokens(pixels)
    code = VQTokenizer(theirs.model).constants["token_ids"].tolist()
    first, twin = code.index(tokens[0][0]), code.index(next(t for t in code if t not in tokens[0]))
    moved = [[code[twin], *tokens[0][1:]]]
    assert theirs.image_errors(pixels, tokens) == ImageErrors(0, 0)
    assert theirs.image_errors(pixels, moved) == ImageErrors(1, 0)
    codebook = theirs.model.model.vqmodel.quantize.embedding.weight
    kept = codebook[twin].clone()
    with torch.no_grad():
        codebook[twin] = codebook[first] * (1 + 1e-7)
    try:
        chosen = theirs.image_tokens(pixels)[0][0]
        other = code[first] if chosen == code[twin] else code[twin]
        ours = [[other, *theirs.image_tokens(pixels)[0][1:]]]
        original = theirs.run(case, ours)
        assert original.image_errors == ImageErrors(0, 1)
        table = theirs.model.model.embed_tokens.weight
        assert any(torch.equal(torch.from_numpy(row), table[other]) for row in original.embeds)
    finally:
        with torch.no_grad():
            codebook[twin] = kept


def test_golden_answers_replay() -> None:
    assert all(check.passed for check in check_package(engine("plain"), package("plain", "fp32")).checks)


def test_a_codebook_without_a_token_for_every_code_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(FAMILY.checkpoint("plain"), tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    del config["vocabulary_map"][IMAGE_TOKENS[7]]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="names no token for image code"):
        export.main(["--model", str(folder), "--unguarded", "--output", str(tmp_path / "x")], standalone_mode=False)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]

"""A tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL, exported and compared with Hugging Face.

`qwen2.5` has key heads that are shared, an lm_head of its own, and pictures of several windows, the last of a row and
of a column not full; `qwen2` is tied, and its tower has no windows. `qwen3` has norms of queries and keys, and
deepstack for three layers, those on both sides of the split; its square of learned positions is smaller than some
pictures and larger than others.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_shapes.qwen_vl import CHAT_TEMPLATE, QWEN3_CHAT_TEMPLATE
from cpp_runtime import in_python, joined, through_c
from frames import check_single_frames
from PIL import Image
from tiny_family import READ_IN_8_BITS, TinyFamily, odd_pictures, picture

from autosteer.export.checkpoint import decoder_config
from autosteer.export.checkpoint.renderer import hf_messages
from autosteer.export.safety import states
from autosteer.export.safety.pairs import Prompt
from autosteer.export.validation.original import ANSWER_TOKENS, OriginalModel, ValidationPrompt
from autosteer.export.validation.prompts import draw
from autosteer.runtime import open_video, text
from autosteer.runtime import video as videos
from autosteer.runtime.check import check_package
from autosteer.runtime.conversation import Conversation
from autosteer.runtime.deepstack import Deepstack
from autosteer.runtime.encoded_prompt import EncodedPrompt
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import InputError
from autosteer.runtime.gate import Mode
from autosteer.runtime.image import prepare
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.prompt_encoder import PromptEncoder
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import IMAGE, ImagePart, Message, VideoPart, load_tokenizer, render
from autosteer.runtime.video import spaced

VARIANTS = ("qwen2.5", "qwen2", "qwen3")
LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"  # a text that does not change
LAYERS, WIDTH = 4, 64
PATCH, TILE = 4, 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")


def build_tokenizer() -> Any:
    """Bytes and a few merges, Qwen2.5-VL's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, *PADS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([LICENCE.read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_processor(variant: str, tokenizer: Any) -> Any:
    """Pictures of 4 to 96 tiles."""
    import transformers as hf

    sizes = {"size": {"shortest_edge": 4 * TILE**2, "longest_edge": 96 * TILE**2}, "patch_size": PATCH}
    if variant == "qwen3":
        grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        pictures, videos = hf.Qwen2VLImageProcessor(**sizes, **grey), hf.Qwen3VLVideoProcessor(**sizes)
        return hf.Qwen3VLProcessor(pictures, tokenizer, videos, chat_template=QWEN3_CHAT_TEMPLATE)
    pictures, videos = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen2VLVideoProcessor(**sizes)
    kind = hf.Qwen2_5_VLProcessor if variant == "qwen2.5" else hf.Qwen2VLProcessor
    return kind(pictures, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_checkpoint(folder: Path, variant: str) -> None:
    """Random weights in Hugging Face's layout, bfloat16 as on the hub."""
    import transformers as hf

    tokenizer = build_tokenizer()
    build_processor(variant, tokenizer).save_pretrained(folder)
    tied = variant == "qwen2"
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL, *PADS)}
    towers = {
        "qwen2.5": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": WIDTH,
            "window_size": 6 * PATCH,
            "fullatt_block_indexes": [1, 3],
        },
        "qwen2": {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": WIDTH},
        "qwen3": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 10**2,
            "deepstack_visual_indexes": [2, 0, 1],
        },
    }
    kind = {"qwen2.5": "Qwen2_5_VL", "qwen2": "Qwen2VL", "qwen3": "Qwen3VL"}[variant]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    more: dict[str, Any] = {}  # of the decoder
    if variant == "qwen3":
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        more = {"head_dim": WIDTH // 4}
    config = getattr(hf, f"{kind}Config")(
        vision_config={"depth": 4, "num_heads": 2, "patch_size": PATCH, **towers[variant]},
        text_config={
            **more,
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 160,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4 if tied else 2,
            "max_position_embeddings": 2048,
            "rope_parameters": rope,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(VARIANTS.index(variant))
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "ln_q" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.3 if tied else 1)  # a tied head says its last token again where it can
            elif "visual" in name:
                parameter.normal_(0, 0.4 if "qkv" in name else 0.15)
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


FAMILY = TinyFamily(build_checkpoint, width=WIDTH, split=2, prompts=30)
engine, original_model, package = FAMILY.engine, FAMILY.original_model, FAMILY.package


def off(e: Engine) -> Any:
    return e.policy(Mode.OFF)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_and_rows_equal_hugging_faces_for_images_of_odd_sizes(variant: str) -> None:
    """Bit for bit, enlarged, shrunk and about as they are; as many rows as the processor writes placeholders."""
    e, theirs, grids = engine(variant), original_model(variant), set()
    assert e.manifest.image is not None and e.manifest.image.native is not None
    drawn = [draw(150, 7, 1), draw(3, 400, 2), draw(64, 64, 3), draw(12, 20, 4), draw(5, 5, 5), draw(1, 200, 6)]
    for image in [picture(seed) for seed in range(12)] + drawn + odd_pictures():
        messages = (Message("user", ("a", ImagePart(image), "b")),)
        inputs = theirs.inputs(ValidationPrompt(messages, ()))
        ours = prepare(open_image(image), e.manifest.image, alone=True)
        np.testing.assert_array_equal(ours.ravel(), theirs._pixels(inputs).numpy())
        grids.add(ours.shape[2:])
        encoded = e.encoder.prepare(messages, Stats())
        assert encoded.inputs_embeds.shape[1] == inputs["input_ids"].shape[1]
        expected = theirs.model.model.get_rope_index(
            **{n: inputs[n] for n in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        )[0]
        np.testing.assert_array_equal(encoded.positions, expected[:, 0].numpy())
    assert len(grids) > 10


@pytest.mark.parametrize(("variant", "images"), itertools.product(VARIANTS, (0, 1, 3)))
def test_64_greedy_tokens_equal_hugging_faces_with_images_between_texts(variant: str, images: int) -> None:
    messages, theirs = FAMILY.interleaved(images), original_model(variant)
    expected = theirs.generate(theirs.inputs(ValidationPrompt(messages, ())), tokens=64)
    assert len(expected) == 64 and len(set(expected)) > 2
    assert FAMILY.generate(variant, messages, 64) == expected


def test_answers_to_thirty_dialogues_are_generates() -> None:
    FAMILY.check_answers("qwen3", 30)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_whose_weights_are_on_disk_is_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILY.check_weights_on_disk(variant, monkeypatch)


@pytest.mark.parametrize(("variant", "layer"), itertools.product(VARIANTS, (1, LAYERS - 1)))
def test_another_split_without_a_gate(variant: str, layer: int, tmp_path: Path) -> None:
    FAMILY.check_split(variant, layer, tmp_path, with_videos(4), with_videos(5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_verdicts_and_gated_answers_are_pytorchs(variant: str) -> None:
    """Of 30 prompts with no, one and two pictures; the answers are generate's."""
    FAMILY.check_gate(variant)


# --- videos ----------------------------------------------------------------------------------------------------------


def video(seed: int) -> VideoPart:
    """Two to nine frames of any size, at times that nobody says, or in even steps, or not."""
    rng = np.random.default_rng(seed)
    count, width, height = 2 + seed % 8, *(int(n) for n in rng.integers(6, 90, 2))
    frames = tuple(np.asarray(draw(width, height, 10 * seed + i)) for i in range(count))
    steps = rng.uniform(0, 3, count) if seed % 3 == 1 else np.full(count, 0.4 + seed % 5)
    return VideoPart(frames, () if seed % 3 == 0 else tuple((np.cumsum(steps) - steps[0]).round(2).tolist()))


def with_videos(i: int) -> tuple[Message, ...]:
    """One or two videos, alone or among pictures, in one turn or two."""
    last = Message(
        "user", ("look", video(i), f"and number {i}.", *([ImagePart(picture(i)), video(i + 50)] * (i % 3 == 2)))
    )
    if i % 2:
        return (last,)
    first = Message("user", (video(i + 100), *([ImagePart(picture(i + 7))] * (i % 4 == 2)), f"what is number {i}?"))
    return (first, Message.assistant(f"it is {i}."), last)


@pytest.mark.parametrize("variant", VARIANTS)
def test_frames_and_their_places_equal_hugging_faces(variant: str) -> None:
    """As many rows as the processor writes placeholders, the text between them, positions and embeddings; and what a
    mean reads of them, without the times between groups of frames.
    """
    e, theirs, grids = engine(variant), original_model(variant), set()
    assert e.manifest.prober is not None
    mean = replace(e.manifest, prober=replace(e.manifest.prober, pooling="mean"))
    read_as_mean = PromptEncoder(mean, e.tokenizer, e._graph)
    asked = OriginalModel(theirs.model, theirs.processor, mean, None)
    config = theirs.model.config
    for i in range(24):
        inputs = theirs.inputs(ValidationPrompt(with_videos(i), ()))
        encoded = e.encoder.prepare(with_videos(i), Stats())
        pads = (config.image_token_id, config.video_token_id)
        expected = [-1 if token in pads else token for token in inputs["input_ids"][0].tolist()]
        assert [key if isinstance(key, int) else -1 for key in encoded.keys] == expected
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        places, _ = theirs.model.model.get_rope_index(**{n: inputs[n] for n in names if n in inputs})
        np.testing.assert_array_equal(encoded.positions, places[:, 0].numpy())
        embeds = theirs.forward(inputs, [0]).entering[0].numpy()
        assert np.abs(encoded.inputs_embeds[0] - embeds).max() <= 1e-4 * np.abs(embeds).max()
        assert [one.video for one in encoded.shown].count(True) == sum(len(m.video_parts) for m in with_videos(i))
        assert read_as_mean.prepare(with_videos(i), Stats()).probed == asked._probed(
            ValidationPrompt(with_videos(i), ()), inputs["input_ids"][0]
        )
        grids |= {tuple(grid) for grid in inputs["video_grid_thw"].tolist()}
    assert len(grids) > 15 and len({groups for groups, _, _ in grids}) == 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_group_of_frames_is_a_video_of_its_own(variant: str) -> None:
    assert sum(check_single_frames(engine(variant).encoder, video(i), 2) for i in range(16)) > 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_to_dialogues_with_videos_are_generates(variant: str) -> None:
    theirs, answers = original_model(variant), []
    for i in range(15):
        answers.append(theirs.generate(theirs.inputs(ValidationPrompt(with_videos(i), ())), tokens=16))
        assert FAMILY.generate(variant, with_videos(i), 16) == answers[-1], f"dialogue {i}"
    assert len(set(map(tuple, answers))) > 7
    longer = theirs.generate(theirs.inputs(ValidationPrompt(with_videos(5), ())), tokens=64)
    assert FAMILY.generate(variant, with_videos(5), 64) == longer


@pytest.mark.parametrize("variant", VARIANTS)
def test_verdicts_on_videos_are_pytorchs(variant: str) -> None:
    e, theirs, unsafe = engine(variant), original_model(variant), list[bool]()
    for i in range(12):
        original = theirs.run(ValidationPrompt(with_videos(i), ()))
        wholes, stop = e.policy(pieces=False), e.policy(Mode.STOP, pieces=False)  # PyTorch was asked about these
        answer = e.generate(with_videos(i), policy=wholes, sampling=SamplingConfig(ANSWER_TOKENS))
        request = e.request(e.encoder.prepare(with_videos(i), Stats()), 1, Stats())
        in_place = request.prefill_lower(e.policy()).p_unsafe
        assert in_place == pytest.approx(original.p_unsafe, abs=1e-3)
        assert answer.verdict.p_unsafe >= in_place  # turns by themselves count, too
        assert list(answer.token_ids) == (original.steered_tokens if answer.verdict.unsafe else original.tokens)
        stopped = e.generate(with_videos(i), policy=stop, sampling=SamplingConfig(max_tokens=1))
        assert (stopped.stats.upper_ms is None) == answer.verdict.unsafe
        unsafe.append(answer.verdict.unsafe)
    assert len(set(unsafe)) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversation_encodes_a_video_once(variant: str) -> None:
    """Three turns. The same frames at other times are other positions, or other words; Qwen2-VL reads no times."""
    e, theirs = engine(variant), original_model(variant)
    conversation, asked = Conversation(e), {"policy": off(e), "sampling": SamplingConfig(max_tokens=20)}
    slow = VideoPart(video(4).frames, tuple(2.5 * i for i in range(len(video(4).frames))))
    dialogue = [Message("user", ("first:", video(4), "what now?"))]
    for turn, shown in enumerate((video(6), picture(3), slow)):
        answer = e.generate(dialogue, conversation=conversation, **asked)
        expected = theirs.generate(theirs.inputs(ValidationPrompt(tuple(dialogue), ())), tokens=20)
        assert list(answer.token_ids) == expected
        assert (answer.stats.reused_tokens > 0) == (turn > 0)
        part = shown if isinstance(shown, VideoPart) else ImagePart(shown)
        dialogue += [Message.assistant(answer.text), Message("user", (f"turn {turn}:", part, "and now?"))]
    dialogue[0] = Message("user", ("first:", slow, "what now?"))
    answer = e.generate(dialogue, conversation=conversation, **asked)
    assert (answer.stats.reused_tokens < 60) == (variant != "qwen2")
    assert list(answer.token_ids) == theirs.generate(theirs.inputs(ValidationPrompt(tuple(dialogue), ())), tokens=20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_is_answered_as_hugging_face_answers_its_frames(variant: str, tmp_path: Path) -> None:
    """Whose times are the file's: HF gets its frames a second, and which frames were taken."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg: apt-get install ffmpeg")
    source = "testsrc2=size=60x44:rate=12.5:duration=4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", tmp_path / "a.mp4"]
    subprocess.run(command, check=True)
    theirs, taken = original_model(variant), spaced(50, 5)
    message = Message.user("what happens?", videos=[open_video(tmp_path / "a.mp4", 5)])
    frames = np.stack([np.asarray(frame) for frame in message.video_parts[0].frames])
    facts = {"total_num_frames": 5 * 49 / 4, "fps": 12.5, "frames_indices": taken}  # 2.5-VL: 49 / 4 frames apart
    prompt = theirs.processor.apply_chat_template(hf_messages([message]), add_generation_prompt=True)
    shown = {"videos": [[frames]], "video_metadata": [[facts]], "do_sample_frames": False}
    inputs = dict(theirs.processor(text=[prompt], **shown, return_tensors="pt"))
    assert FAMILY.generate(variant, (message,), 20) == theirs.generate(inputs, tokens=20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_video_of_one_frame_is_one_of_that_frame_twice(variant: str) -> None:
    frame = np.asarray(draw(40, 30, 1))
    once, twice = (encoded(variant, VideoPart((frame,) * n, (0.5,) * n)) for n in (1, 2))
    np.testing.assert_array_equal(once.inputs_embeds, twice.inputs_embeds)
    np.testing.assert_array_equal(once.positions, twice.positions)


def encoded(variant: str, video: VideoPart) -> EncodedPrompt:
    return engine(variant).encoder.prepare([Message("user", (video, "what?"))], Stats())


@pytest.mark.parametrize(("variant", "most"), itertools.product(VARIANTS, (4, 12)))
def test_max_tiles_bounds_what_a_frame_costs(variant: str, most: int) -> None:
    e = Engine.load(package(variant, "fp32"), device="cpu", threads=1, max_tiles=most)
    frames = [np.asarray(draw(90, 150, i)) for i in range(4)]
    answer = e.generate("what?", videos=[frames], policy=off(e), sampling=SamplingConfig(max_tokens=1))
    assert most <= answer.stats.image_tiles <= 2 * most  # of two groups


def test_a_video_processor_with_other_rules_is_refused(tmp_path: Path) -> None:
    FAMILY.check_refused(
        "qwen3", "processor_config.json", {"video_processor": {"cap_pixels_per_frame": True}}, "cap_pixels", tmp_path
    )


def test_videos_at_other_times_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the right rows: their positions, or the text between them."""
    positions, times = videos.group_positions, text.group_times
    monkeypatch.setattr(videos, "group_positions", lambda seen, *rest: positions([2 * s for s in seen], *rest))
    FAMILY.check_unequal("qwen2.5", "hidden state at the split", tmp_path)
    monkeypatch.setattr(text, "group_times", lambda seen, *rest: times([2 * s for s in seen], *rest))
    FAMILY.check_refused("qwen3", "config.json", {}, "the chat template cannot be taken apart", tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prober_reads_the_token_that_ends_thencoded(variant: str, tmp_path: Path) -> None:
    FAMILY.check_probed(variant, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fit_reads_what_the_model_computes_whatever_it_saw_before(variant: str, tmp_path: Path) -> None:
    """Two pictures, then a text behind the cached opening, for which HF's model would take the pictures' positions."""
    fitted, theirs = FAMILY.fit_model(variant), original_model(variant)
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for seed, file in enumerate(files):
        picture(seed).save(file)
    prompts = [Prompt("what is it?", tuple(files)), Prompt("is it safe?"), Prompt("what is it?", (files[1],))]
    generated = len(fitted.processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids)
    with states.prompt_store(tmp_path / "store", [], fitted) as store:
        for prompt in prompts:
            kept = states.prompt_states(fitted, [prompt], store).layer(FAMILY.split - 1)
            found = kept[0, states.POOLINGS.index("last")].numpy()
            asked = ValidationPrompt((Message.user(prompt.text, prompt.images),), ())
            passed = theirs.forward(theirs.inputs(asked), [FAMILY.split])
            expected = passed.entering[FAMILY.split][-1 - generated].numpy()
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    answer = torch.tensor([9, 10, 11, 12])
    with states.answer_store(tmp_path / "answers", [], fitted, answer) as store:
        for prompt in prompts:
            kept = states.answer_states(fitted, [prompt], answer, store).layer(0)[0].numpy()
            asked = ValidationPrompt((Message.user(prompt.text, prompt.images),), ())
            expected = theirs.forward(theirs.inputs(asked), [], answer.tolist()).head.numpy()
            np.testing.assert_allclose(kept, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversation_with_pictures_is_answered_turn_by_turn_as_by_hugging_face(variant: str) -> None:
    """Three turns on kept caches. The second answer's rows stand behind two pictures, the third turn's behind three."""
    e, theirs = engine(variant), original_model(variant)
    conversation, dialogue = Conversation(e), list[Message]()
    for turn in range(3):
        images = [picture(40 + 2 * turn), picture(41 + 2 * turn)][: 2 - turn % 2]
        dialogue.append(Message.user(f"turn {turn}: what now?", images))
        asked = {"policy": off(e), "sampling": SamplingConfig(max_tokens=20)}
        answer = e.generate(dialogue, conversation=conversation, **asked)
        expected = theirs.generate(theirs.inputs(ValidationPrompt(tuple(dialogue), ())), tokens=20)
        assert list(answer.token_ids) == expected
        assert (answer.stats.reused_tokens > 0) == (turn > 0)
        assert (answer.stats.image_tiles > 0) == (len(images) > 0)
        dialogue.append(Message.assistant(answer.text))


def test_the_rows_of_a_picture_that_only_the_lower_half_has_seen_are_there_when_the_next_turn_comes() -> None:
    """The first turn is stopped, so decoder_upper reads its pictures with those of the second, deepstack included."""
    e, theirs = engine("qwen3"), original_model("qwen3")
    conversation, asked = Conversation(e), {"sampling": SamplingConfig(max_tokens=20)}
    dialogue = [Message.user("turn 0: what now? " * 12, [picture(40), picture(41)])]
    stopped = e.generate(dialogue, conversation=conversation, policy=e.policy(Mode.STOP, threshold=-1.0), **asked)
    dialogue += [Message.assistant(stopped.text), Message.user("and now?", [picture(42)])]
    answer = e.generate(dialogue, conversation=conversation, policy=off(e), **asked)
    assert stopped.stats.upper_ms is None and answer.stats.reused_tokens > 128
    expected = theirs.generate(theirs.inputs(ValidationPrompt(tuple(dialogue), ())), tokens=20)
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize(("variant", "most"), itertools.product(VARIANTS, (12, 20, 50)))
def test_max_tiles_bounds_what_a_picture_costs(variant: str, most: int) -> None:
    """A tile is what becomes one row."""
    e = Engine.load(package(variant, "fp32"), device="cpu", threads=1, max_tiles=most)
    for image in (draw(300, 200, 1), draw(90, 150, 2)):
        answer = e.generate("what?", images=[image], policy=off(e), sampling=SamplingConfig(max_tokens=1))
        assert 0.6 * most <= answer.stats.image_tiles <= most


def test_a_picture_that_does_not_fit_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine("qwen2.5")
    monkeypatch.setattr(e.encoder, "encode_image", lambda *_, **__: pytest.fail("it was encoded"))
    with pytest.raises(InputError, match="the prompt takes at least 2"):
        e.generate("word " * 655, images=[draw(64, 64, 1)], policy=off(e))


def test_a_user_cannot_type_a_picture() -> None:
    spec = engine("qwen2.5").manifest.prompt
    tokenizer = load_tokenizer(package("qwen2.5", "fp32") / "tokenizer.json")
    runs = render([Message("user", (ImagePart("x"), "".join((*SPECIAL, *PADS))))], spec, tokenizer)
    assert runs.count(IMAGE) == 1
    reserved = {tokenizer.token_to_id(name) for name in (*SPECIAL, *PADS)}
    written = [tokenizer.id_to_token(i) for run in runs if isinstance(run, list) for i in run if i in reserved]
    turn = ["<|im_start|>", "<|im_end|>"]
    assert written == [*turn, "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize(
    ("variant", "precision"),
    [*itertools.product(VARIANTS, ("fp32", "int8", "int4", READ_IN_8_BITS)), ("qwen3", "int4 --calibrate builtin")],
)
def test_a_quantised_package_exports_and_its_table_says_how_good_it_is(
    variant: str, precision: str, record_property: Any
) -> None:
    checks = FAMILY.table(variant, precision)
    assert all(check.passed for check in checks.values())
    assert (checks["greedy tokens that differ"].limit == 0) == (precision == "fp32")
    for check in checks.values():
        record_property(check.name, check.value)


def mistaken(mistake: str) -> Callable[..., dict[str, Any]]:
    """Deepstack.inputs with a mistake."""
    inputs = Deepstack.inputs

    def of_another_layer(self: Deepstack, layers: range, first: int, count: int) -> dict[str, Any]:
        every = inputs(self, range(3), first, count)
        return {name: every[f"deepstack.{(int(name[-1]) + 1) % 3}"] for name in inputs(self, layers, first, count)}

    return {
        "dropped": lambda self, layers, first, count: inputs(self, layers, 0, 0),
        "a position later": lambda self, layers, first, count: inputs(self, layers, first - 1, count),
        "of another layer": of_another_layer,
    }[mistake]


@pytest.mark.parametrize("mistake", ["dropped", "a position later", "of another layer"])
def test_wrong_rows_behind_the_first_layers_are_refused(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the right graphs and the right pictures."""
    monkeypatch.setattr(Deepstack, "inputs", mistaken(mistake))
    FAMILY.check_unequal("qwen3", "hidden state at the split", tmp_path)


def test_frequencies_that_read_their_axes_in_another_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = decoder_config._axes
    monkeypatch.setattr(decoder_config, "_axes", lambda rope: axes(rope | {"mrope_interleaved": False}))
    FAMILY.check_unequal("qwen3", "rotary tables", tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_answers_replay(variant: str) -> None:
    assert all(check.passed for check in check_package(engine(variant), package(variant, "fp32")).checks)


@pytest.mark.parametrize(("variant", "precision"), itertools.product(VARIANTS, ("fp32", "int8")))
def test_the_cpp_runtime_answers_as_pythons(built: Path, tmp_path: Path, variant: str, precision: str) -> None:
    """Pictures of all sizes and videos between texts, apart and in a conversation that grows; with a gate and drafts.
    Some turns of the conversation are stopped: decoder_upper reads their pictures with a later one's.
    """
    e, files = engine(variant, precision), list[str]()
    for seed in range(6):
        files.append(str(tmp_path / f"{seed}.png"))
        picture(seed).save(files[-1])
    turns: list[Any] = []
    for n in range(4):
        shown = [{"image": file} for file in files[n : n + n % 3]]
        turns += [{"role": "user", "parts": ["look: ", *shown, f"and number {n}?"]}]
        turns += [{"role": "assistant", "parts": ["a picture."]}]
    apart = [{"messages": [turn], "sampling": {"max_tokens": 24}} for turn in turns[::2]]
    for request, answer in zip(apart, through_c(built, package(variant, precision), apart), strict=True):
        assert joined(answer["chunks"]) == in_python(e, request)
    for i in range(6):
        seconds = video(i).seconds
        for n, frame in enumerate(video(i).frames):
            Image.fromarray(frame).save(tmp_path / f"video-{i}-{n}.png")
        shown = {"video": [str(tmp_path / f"video-{i}-{n}.png") for n in range(len(video(i).frames))]}
        shown |= {"seconds": list(seconds)} if seconds else {}
        turns += [{"role": "user", "parts": [f"film {i}:", shown, *([{"image": files[i]}] * (i % 2)), "and now?"]}]
        turns += [{"role": "assistant", "parts": ["a film."]}]
    apart = [{"messages": [turn], "sampling": {"max_tokens": 24}} for turn in turns[8::2]]
    for request, answer in zip(apart, through_c(built, package(variant, precision), apart), strict=True):
        assert joined(answer["chunks"]) == in_python(e, request)
    growing: list[dict[str, Any]] = [
        {"messages": turns[: n + 1], "sampling": {"max_tokens": 24}} for n in range(0, len(turns), 2)
    ]
    for stopped in growing[1:3] + growing[6:7]:
        stopped |= {"policy": "stop", "threshold": -1.0}
    conversation = Conversation(e)
    answers = through_c(built, package(variant, precision), growing, conversation=True)
    for request, answer in zip(growing, answers, strict=True):
        assert joined(answer["chunks"]) == in_python(e, request, conversation)

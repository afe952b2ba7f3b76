"""Videos: pixels, features and rows against Hugging Face's LLaVA-OneVision, whole answers against PyTorch's."""

from __future__ import annotations

import itertools
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported import demo_checkpoint, demo_engine, demo_package
from frames import check_single_frames
from PIL import Image
from transformers import LlavaOnevisionVideoProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from autosteer.export.checkpoint.hf_model import load_hf_model
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.export.validation import prompts as subject
from autosteer.export.validation.original import ANSWER_TOKENS, OriginalModel, ValidationPrompt
from autosteer.export.validation.prompts import draw
from autosteer.runtime import Conversation, Engine, InputError, Manifest, Message, SamplingConfig, open_video
from autosteer.runtime.cli.run import run
from autosteer.runtime.gate import Action, Mode
from autosteer.runtime.image import normalise
from autosteer.runtime.manifest import ImageSpec, NativeSpec, NativeVideoSpec, VideoSpec
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.prompt_encoder import TILES_PER_RUN
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import ImagePart, VideoPart
from autosteer.runtime.video import FRAMES, Video, frame_grid, pool, spaced, squeeze, tiles

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SAMPLING = SamplingConfig(ANSWER_TOKENS)
QUESTION = "what is shown here?"


def video(frames: int, seed: int = 0, size: tuple[int, int] = (75, 41)) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(draw(*size, seed + i)) for i in range(frames))


@cache
def original_model() -> OriginalModel:
    checkpoint = demo_checkpoint()
    text = checkpoint.config.get_text_config()
    folder = checkpoint.folder / "safety"
    safety = SafetyArtifact.load(folder, hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers)
    return OriginalModel(*load_hf_model(checkpoint), Manifest.load(demo_package("fp32")), safety)


# --- pixels and features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height"),
    [(7, 5), (90, 4), (33, 21), (200, 48), (384, 384), (385, 383), (384, 100), (333, 500), (641, 360)],
)
def test_pixel_values_equal_hugging_faces_video_processor(width: int, height: int) -> None:
    """Drawn frames, and noise, which shows every rounding; Pillow's resize differs by up to 18 grey levels here."""
    processor = LlavaOnevisionVideoProcessor()
    spec = VideoSpec(tuple(processor.image_mean), tuple(processor.image_std), processor.rescale_factor, 14)
    noise = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    for frames in (noise, np.stack(video(2, size=(width, height)))):
        theirs = processor([frames], return_tensors="pt")["pixel_values_videos"][0].numpy()
        ours = normalise(list(tiles(frames, 384, 384)), spec)
        assert np.abs(ours - theirs).max() <= 1e-6


def test_resizing_is_torchvisions_to_the_bit() -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    rng = np.random.default_rng(1)
    for height, width, side in rng.integers(1, 700, (25, 3)):
        frame = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        pixels = torch.from_numpy(frame).permute(2, 0, 1)
        theirs = resize(pixels, [int(side), int(side)], InterpolationMode.BICUBIC, antialias=True)
        assert (squeeze(frame, int(side), int(side)) == theirs.permute(1, 2, 0).numpy()).all(), (height, width, side)


def test_frames_of_any_size_have_hugging_faces_grids() -> None:
    """Budgets of the hub and others, of a frame and of a whole video, odd numbers of frames, sides below a tile."""
    from transformers.models.qwen2_vl import video_processing_qwen2_vl as each
    from transformers.models.qwen3_vl import video_processing_qwen3_vl as together

    rng, found = np.random.default_rng(0), set()
    for _ in range(20_000):
        tile = int(rng.choice([8, 28, 32]))
        least = int(rng.integers(1, 300)) * tile**2
        budget, frames = (least, least * int(rng.integers(1, 300))), int(rng.integers(2, 40))
        height, width = (int(2**x) for x in rng.uniform(0, 12, 2))
        if max(height, width) > 150 * min(height, width):
            continue
        image = ImageSpec("native", tile, ZERO, ONE, 1.0, "bicubic", None, native=NativeSpec(1, 1, 2))
        for whole in (False, True):
            video = VideoSpec(ZERO, ONE, 1.0, None, NativeVideoSpec(*budget, whole, 0.0))
            limits = {"factor": tile, "min_pixels": budget[0], "max_pixels": budget[1]}
            if whole:
                sides = together.smart_resize(frames, height, width, temporal_factor=2, **limits)
            else:
                sides = each.smart_resize(height, width, **limits)
            ours = frame_grid((height, width), frames, image, video)
            assert ours == (sides[0] // tile, sides[1] // tile), (height, width, frames, budget, whole)
            found.add(ours)
    assert len(found) > 1000


def test_max_tiles_bounds_each_frame() -> None:
    image = ImageSpec("native", 32, ZERO, ONE, 1.0, "bicubic", None, native=NativeSpec(1, 1, 2))
    for whole, frames in itertools.product((False, True), (1, 2, 5, 8)):
        video = VideoSpec(ZERO, ONE, 1.0, None, NativeVideoSpec(40_000, 25_165_824, whole, 0.0))
        for most in (1, 7, 50):
            rows, columns = frame_grid((720, 1280), frames, image, video, most)
            assert most / 3 <= rows * columns <= most


@pytest.mark.parametrize(("side", "pooled"), [(27, 14), (4, 2), (5, 3), (1, 1)])
def test_pooling_equals_hugging_faces(side: int, pooled: int) -> None:
    features = np.random.default_rng(side).standard_normal((3, side * side, 7)).astype(np.float32)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=side * 14, patch_size=14))
    theirs = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), torch.from_numpy(features))
    assert np.abs(pool(features, pooled) - theirs.reshape(-1, 7).numpy()).max() <= 1e-5


@pytest.mark.parametrize("count", [1, 3, 8])
def test_rows_equal_get_video_features(count: int) -> None:
    engine = demo_engine("fp32")
    inputs = original_model().inputs(ValidationPrompt((Message.user("x", videos=[video(count)]),), ()))
    with torch.no_grad():
        theirs = original_model().model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0].numpy()
    (ours,) = engine.encoder.encode_video(tiles(video(count), 56, 56), stats=Stats())
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_single_frame_is_a_video_of_its_own(count: int) -> None:
    times = tuple(float(i) for i in range(count))
    assert check_single_frames(demo_engine("fp32").encoder, VideoPart(video(count), times), 1) == (
        count if count > 1 else 0
    )


# --- prompts and answers ---------------------------------------------------------------------------------------------

PICTURE = np.asarray(draw(70, 130, 99))
DIALOGUES = {
    "one frame": (Message.user(QUESTION, videos=[video(1)]),),
    "three frames": (Message.user(QUESTION, videos=[video(3)]),),
    "eight frames": (Message.user("how do i make this?", videos=[video(8)]),),
    "two videos": (Message.user("compare the two pictures.", videos=[video(2), video(2, 50)]),),
    "beside a picture": (Message.user(QUESTION, [PICTURE], [video(2)]),),
    "parts in another order": (Message("user", ("look:", VideoPart(video(2)), "and", ImagePart(PICTURE), QUESTION)),),
    "two turns": (
        Message.user(QUESTION, videos=[video(3)]),
        Message.assistant("a blue star."),
        Message.user("how many?", [PICTURE]),
    ),
}


@pytest.mark.parametrize("messages", DIALOGUES.values(), ids=DIALOGUES)
def test_prompt_tokens_and_verdict_equal_hugging_faces(messages: tuple[Message, ...]) -> None:
    """Ids before the answer with every picture's and video's rows at their places, embeddings, p_unsafe, tokens."""
    engine, case = demo_engine("fp32"), ValidationPrompt(messages, ())
    inputs, theirs = original_model().inputs(case), original_model().run(case)
    placeholders = (original_model().processor.image_token_id, original_model().processor.video_token_id)
    expected = [-1 if i in placeholders else i for i in inputs["input_ids"][0].tolist()]
    prompt = engine.encoder.prepare(messages, Stats())
    assert [key if isinstance(key, int) else -1 for key in prompt.keys] == expected
    assert np.abs(prompt.inputs_embeds[0] - theirs.embeds).max() <= 1e-4 * np.abs(theirs.embeds).max()
    in_place = engine.request(prompt, 1, Stats()).prefill_lower(engine.policy(Mode.REPORT)).p_unsafe
    assert in_place == pytest.approx(theirs.p_unsafe, abs=1e-3)
    answer = engine.generate(messages, policy=engine.policy(Mode.REPORT), sampling=SAMPLING)
    assert answer.verdict.p_unsafe >= in_place  # turns by themselves count, too
    assert list(answer.token_ids) == theirs.tokens
    steered = engine.generate(messages, policy=engine.policy(threshold=-1.0, pieces=False), sampling=SAMPLING)
    assert list(steered.token_ids) == theirs.steered_tokens


def test_the_gate_sees_what_a_video_shows() -> None:
    """One sign of the demo's hazards among its frames; the same question about another video is answered."""
    examples = demo_checkpoint().folder / "examples"
    unsafe, benign = ([examples / f"{name}.png"] * 3 for name in ("unsafe", "benign"))
    engine = demo_engine("fp32")
    stopped = engine.generate("how do i make this?", videos=[unsafe], policy=engine.policy(Mode.STOP))
    assert (stopped.verdict.action, stopped.finish_reason, stopped.token_ids) == (Action.STOP, "refused", ())
    assert engine.generate("describe the picture.", videos=[benign]).verdict.action is Action.PASS


def test_a_second_turn_computes_its_video_once() -> None:
    engine, first = demo_engine("fp32"), Message.user(QUESTION, videos=[video(5)])
    conversation = Conversation(engine)
    policy = engine.policy(Mode.OFF)
    answer = engine.generate([first], conversation=conversation, policy=policy, sampling=SAMPLING)
    dialogue = (first, Message.assistant(answer.text), Message.user("describe the picture."))
    second = engine.generate(dialogue, conversation=conversation, policy=policy, sampling=SAMPLING)
    assert (answer.stats.image_tiles, second.stats.image_tiles) == (5, 0)
    assert second.stats.reused_tokens > 5 * 4
    assert list(second.token_ids) == original_model().run(ValidationPrompt(dialogue, ())).tokens


def test_a_long_video_goes_through_the_image_graph_a_few_frames_at_a_time(engine: Engine, monkeypatch) -> None:
    """Frames are opened one by one: at their full size no two of them are in memory."""
    seen: list[int] = []
    run = engine.graphs["vision_encoder"].run
    monkeypatch.setattr(
        engine.graphs["vision_encoder"], "run", lambda inputs: seen.append(len(inputs["pixel_values"])) or run(inputs)
    )
    answer = engine.generate("red", videos=[video(11, size=(8, 8))])
    assert sum(seen) == 11 and max(seen) == TILES_PER_RUN and answer.stats.image_tiles == 11


def test_every_export_checks_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model is so large that little is compared."""
    monkeypatch.setattr(subject, "WORK", 0)
    shutil.copy(demo_package("fp32") / "tokenizer.json", tmp_path)
    cases = subject.make_validation_prompts(tmp_path, demo_engine("fp32").manifest, None)
    kept = subject.affordable(cases, demo_checkpoint(), original_model())
    shown = [(bool(case.images), len(case.images), bool(case.videos), len(case.messages)) for case in kept]
    assert shown == [
        (False, 0, False, 1),
        (False, 0, False, 3),
        (True, 1, False, 1),
        (False, 0, True, 1),
        (True, 2, False, 1),
        (True, 1, False, 3),
    ]


# --- what is no video ------------------------------------------------------------------------------------------------


def test_videos_that_cannot_be_taken_are_refused(engine: Engine, unguarded: Engine) -> None:
    with pytest.raises(InputError, match="this model takes no videos"):
        unguarded.generate("red", videos=[video(1)], policy=unguarded.policy(Mode.OFF))
    with pytest.raises(InputError, match="no frames"):
        engine.generate("red", videos=[()])
    with pytest.raises(InputError, match="'assistant' turns take no videos"):
        engine.generate([Message.user("red"), Message("assistant", (VideoPart(video(1)),)), Message.user("red")])
    with pytest.raises(InputError, match="into the messages"):
        engine.generate([Message.user("look")], videos=[video(1)])
    with pytest.raises(InputError, match=r"gone\.png"):
        engine.generate("red", videos=[["gone.png"]])
    with pytest.raises(InputError, match=r"64 tokens \(63 frames\).*holds 64; take fewer frames"):
        engine.generate("red", videos=[["never opened"] * 63])


def test_a_files_name_is_a_video(engine: Engine, tmp_path: Path) -> None:
    frames = [draw(9, 6, seed) for seed in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert {p.name: p.default for p in run.params}["frames"] == FRAMES
    for video in (tmp_path / "a.gif", str(tmp_path / "a.gif"), open_video(tmp_path / "a.gif")):
        assert engine.generate("red", videos=[video]).stats.image_tiles == FRAMES


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    frames = [draw(90, 60, seed) for seed in range(3)]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "whole.gif").read_bytes()
    assert len(open_video(tmp_path / "whole.gif")) == 3
    for length in (0, 5, len(whole) // 2):
        (tmp_path / "cut.gif").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a readable video"):
            open_video(tmp_path / "cut.gif")
    with pytest.raises(InputError, match="at least one"):
        open_video(tmp_path / "whole.gif", 0)


def test_frames_are_evenly_spaced_from_the_first_to_the_last(tmp_path: Path) -> None:
    assert (spaced(1, 8), spaced(3, 8), spaced(9, 1)) == ([0], [0, 1, 2], [0])
    assert spaced(100, 8) == np.linspace(0, 99, 8, dtype=int).tolist()
    frames = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(20)]
    folder, file = tmp_path / "frames", tmp_path / "f.webp"
    folder.mkdir()
    for i, frame in enumerate(frames):
        frame.save(folder / f"f{i}.PNG")
    (folder / ".hidden.png").write_bytes(b"")
    frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    for source in (folder, file):  # f10.PNG comes after f9.PNG
        assert [int(open_image(frame)[0, 0, 0]) for frame in open_video(source, 5)] == [0, 4, 9, 14, 19]


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animated_picture_says_when_its_frames_are_shown(tmp_path: Path, kind: str) -> None:
    """Also one whose frames are shown for different times, and a GIF's that says no time, which is 100 ms."""
    frames = [Image.new("RGB", (4, 4), (50 * i, 0, 0)) for i in range(5)]
    durations = [200, 40, 0 if kind == "gif" else 100, 500, 300]
    file = tmp_path / f"a.{kind}"
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    assert open_video(file).seconds == pytest.approx((0.0, 0.2, 0.24, 0.34, 0.84))
    assert open_video(file, 3).seconds == pytest.approx((0.0, 0.24, 0.84))


def test_frames_without_times_are_24_a_second(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.png").touch()
    assert open_video(tmp_path, 3).seconds == (0.0, 4 / 24, 8 / 24)
    assert Video(["a.png"]).seconds == ()

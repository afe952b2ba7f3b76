"""What is too much is refused before it costs anything: long prompts, many turns, large pictures, long videos."""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from autosteer.runtime import Engine, InputError, Message
from autosteer.runtime.manifest import ProberSpec, PromptSpec, TemplatePiece, TurnSpec
from autosteer.runtime.obfuscation import deobfuscated
from autosteer.runtime.picture_file import MAX_PIXELS, open_image
from autosteer.runtime.prompt_encoder import probed_positions
from autosteer.runtime.text import IMAGE, ImagePart, render_judged
from autosteer.runtime.video import MAX_FRAMES, open_video

# --- counted before anything runs ------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_context_is_refused_before_it_is_embedded(engine, monkeypatch):
    """At width 128 the rows of 1 MB took 1.4 GB; of a 7B model, all memory."""
    monkeypatch.setattr(engine.encoder, "embed", lambda ids: pytest.fail("embedded"))
    with pytest.raises(InputError, match="takes 253 tokens"):
        engine.generate("red " * 250)


def test_a_prompt_of_a_megabyte_is_refused_before_it_is_tokenised(engine, monkeypatch):
    """4 MB took 1.5 GB and 5 seconds, in which nothing could be cancelled."""
    monkeypatch.setattr("autosteer.runtime.text._encode", lambda *args: pytest.fail("tokenised"))
    with pytest.raises(InputError, match="has 1000000 characters; for this model's context at most 1024 are read"):
        engine.generate("red " * 250_000)


def test_pictures_that_cannot_fit_are_not_opened(engine):
    with pytest.raises(InputError, match="takes at least 404 tokens"):
        engine.generate("look", images=["no-such-file.png"] * 100)


def test_pictures_are_opened_one_at_a_time_and_no_more_than_fit(engine, monkeypatch):
    """The smallest picture has 5 rows, these have 10 each: after the sixth the context of 64 is full."""
    opened = []

    def encode(pixels, *, alone, stats):
        opened.append(pixels)
        return [np.zeros((10, toy.D), np.float32)]

    monkeypatch.setattr(engine.encoder, "encode_image", encode)
    pictures = [np.full((4, 4, 3), n, np.uint8) for n in range(10)]
    with pytest.raises(InputError, match="takes at least"):
        engine.generate("look", images=pictures)
    assert len(opened) < len(pictures)


def test_three_thousand_turns_take_seconds_and_not_minutes(tmp_path):
    """Each turn was rendered with all turns before it: 133 s."""
    toy.build(tmp_path, context_length=40_000)
    engine = Engine.load(tmp_path, device="cpu", threads=1)
    turns = [turn for _ in range(1500) for turn in (Message.user("red tick"), Message.assistant("green"))]
    before = time.process_time()  # whatever else runs on the machine
    _, judged = render_judged([*turns, Message.user("red")], engine.manifest.prompt, engine.tokenizer)
    probed_positions(engine.manifest.prober, judged, range(20_000), [])
    assert len(judged) == 3001 and time.process_time() - before < 10


@pytest.mark.parametrize("first", ["red tick", "r3d tick"])
def test_two_thousand_turns_are_judged_in_seconds(tmp_path, first):
    """Behind a turn with obfuscated letters each one was rendered, embedded and read anew: 24 s."""
    toy.build(tmp_path, context_length=40_000)
    engine = Engine.load(tmp_path, device="cpu", threads=1)
    turns = [turn for _ in range(1000) for turn in (Message.assistant("green"), Message.user("red tick"))]
    before = time.process_time()
    assert not engine.score([Message.user(first), *turns]).unsafe
    assert time.process_time() - before < 8


@pytest.mark.parametrize(
    "unit", ["aa-.", "aa--", "a.b_", "aa.a1", "ab-cd-ef-gh-ij-9 ", "%41", "a b ", "s-t-", "aaa", "aA"]
)
def test_obfuscated_letters_are_looked_for_in_linear_time(unit):
    """16 KB of "aa-." took 1 s, 32 KB four."""
    before = time.process_time()
    deobfuscated(unit * (256_000 // len(unit)))
    assert time.process_time() - before < 5


# --- probed positions, over templates --------------------------------------------------------------------------------

LITERALS = [TemplatePiece("literal", text) for text in (" you: ", " what ", " look look ")]
TOKENS = [TemplatePiece("token", text, toy.ID[text]) for text in ("<begin>", "<gen>", "<end>")]
AROUND = st.lists(st.sampled_from([*LITERALS, *TOKENS]), max_size=3).map(tuple)


@st.composite
def specs(draw: st.DrawFn) -> PromptSpec:
    """A template. Texts of some touch each other and become one word: others' have blanks around them."""
    blanks = [TemplatePiece("literal", " ")] if draw(st.booleans()) else []

    def turn() -> TurnSpec:
        image = (*draw(AROUND), TemplatePiece("image"), *draw(AROUND))
        text = (*draw(AROUND), *blanks, TemplatePiece("text"), *blanks)
        return TurnSpec(draw(AROUND), image, text, draw(AROUND), draw(AROUND))

    return PromptSpec(
        draw(AROUND), turn(), turn(), turn(), draw(AROUND), draw(st.booleans()), draw(st.booleans()), (toy.END,)
    )


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    part = st.sampled_from(["red", "tick tock", "bad", "", ImagePart("x.png")])
    roles = draw(st.lists(st.sampled_from(["system", "user", "user", "assistant"]), min_size=1, max_size=5))
    return [Message(role, tuple(draw(st.lists(part, max_size=3)))) for role in roles]  # type: ignore[arg-type]


@given(
    spec=specs(),
    messages=dialogues(),
    sizes=st.lists(st.integers(1, 4), min_size=15, max_size=15),
    beyond=st.integers(1, 4),
    pooling=st.sampled_from(["last", "mean"]),
)
@settings(max_examples=300, deadline=None)
def test_a_turn_is_probed_where_it_was_when_the_dialogue_ended_there(engine, spec, messages, sizes, beyond, pooling):
    """Two user turns in a row, the second opening with a picture, and a long generation prompt: a row of that picture
    was read in the place of the first turn's last word.
    """

    def laid_out(n: int) -> tuple[list[object], list[list[int]]]:
        """The rows of the first n messages, each with what makes it itself, and the probed positions."""
        runs, turns = render_judged(messages[:n], spec, engine.tokenizer)
        size, rows = iter(sizes), list[object]()
        for i, run in enumerate(runs):
            rows += run if isinstance(run, list) else [(i, row) for row in range(next(size))]
        text = [at for at, row in enumerate(rows) if isinstance(row, int)]
        shown = sum(run is IMAGE for run in runs)
        return rows, probed_positions(prober, turns, text, sizes[:shown])

    opens = len(_generation(spec, engine))
    prober = ProberSpec(-(opens + beyond), pooling, 0.5, {})  # type: ignore[arg-type]
    whole, probed = laid_out(len(messages))
    assert len(probed) == len(messages)
    for n in range(1, len(messages) + 1):
        rows, as_if = laid_out(n)
        found = probed[n - 1]
        assert not found or found == as_if[-1]
        assert [whole[at] for at in found] == [rows[at] for at in found]
        if rows[: len(rows) - opens] == whole[: len(rows) - opens]:
            assert found == as_if[-1]  # nothing else would be judged: it makes the dialogue unsafe


def _generation(spec: PromptSpec, engine: Engine) -> list[int]:
    """The tokens of the generation prompt by itself."""
    empty = TurnSpec((), (), (TemplatePiece("text"),), ())
    alone = PromptSpec((), None, empty, empty, spec.generation, False, False, (toy.END,))
    runs, _ = render_judged([Message("user", ())], alone, engine.tokenizer)
    return [token for run in runs if isinstance(run, list) for token in run]


# --- pictures and videos ---------------------------------------------------------------------------------------------


def gif(path: Path, frames: int, side: int) -> Path:
    """An animation in which a few pixels move."""
    pictures = []
    for n in range(frames):
        picture = Image.new("P", (side, side))
        picture.putpixel((n % side, n // side % side), 1)
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], optimize=False)
    return path


def test_an_animation_of_too_many_frames_is_refused(tmp_path):
    path = gif(tmp_path / "long.gif", MAX_FRAMES + 1, 8)
    with pytest.raises(InputError, match=r"more than 2000 frames of 8x8 pixels: at most 2000 frames"):
        open_video(path)
    assert len(open_video(gif(tmp_path / "short.gif", 20, 8), 5)) == 5


def test_an_animation_of_too_many_pixels_is_refused_early(tmp_path, monkeypatch):
    """478 KB became 3.1 GB in 73 s."""
    path, seek = gif(tmp_path / "large.gif", 60, 200), GifImageFile.seek
    decoded: list[int] = []
    monkeypatch.setattr(GifImageFile, "seek", lambda opened, n: (decoded.append(n), seek(opened, n)))
    monkeypatch.setattr("autosteer.runtime.video.MAX_DECODED", 40 * 200 * 200)
    with pytest.raises(InputError, match=r"more than 40 frames of 200x200 pixels"):
        open_video(path)
    assert max(decoded) == 40


def test_a_frame_that_is_larger_than_the_first_is_refused_before_it_is_decoded(tmp_path):
    """A TIFF of 19 KB took 2 GB, a GIF whose canvas grows 1 GB: only the first and the last frame were measured."""
    small, large = Image.new("1", (1, 1)), Image.new("1", (8000, 8000))
    small.save(tmp_path / "a.tif", save_all=True, append_images=[large, large, small], compression="group4")
    with pytest.raises(InputError, match="8000x8000 pixels: at most"):
        open_video(tmp_path / "a.tif")
    some = Image.new("1", (4000, 4000))
    small.save(tmp_path / "b.tif", save_all=True, append_images=[some] * 6, compression="group4")
    with pytest.raises(InputError, match=r"7 frames of 4000x4000 pixels: at most"):
        open_video(tmp_path / "b.tif")
    data = gif(tmp_path / "c.gif", 2, 8).read_bytes()
    block = data.rindex(b"\x2c\0\0\0\0")  # the second frame's place and size
    (tmp_path / "c.gif").write_bytes(data[: block + 5] + struct.pack("<HH", 8000, 8000) + data[block + 9 :])
    with pytest.raises(InputError, match="8000x8000 pixels: at most"):
        open_video(tmp_path / "c.gif")


def test_frames_are_in_memory_together_so_they_are_counted_together(tmp_path):
    with pytest.raises(InputError, match=rf"8 frames of 3000x3000 pixels: at most {MAX_PIXELS}"):
        open_video(gif(tmp_path / "wide.gif", 8, 3000))
    assert len(open_video(tmp_path / "wide.gif", 2)) == 2


def test_an_array_of_too_many_pixels_is_refused():
    with pytest.raises(InputError, match="7072x7071 pixels: at most 50000000"):
        open_image(np.broadcast_to(np.uint8(0), (7071, 7072, 3)))


def test_pillows_warning_is_not_needed(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="not a readable image"):
            open_image(Path(__file__).parents[1] / "conformance" / "pictures" / "13000x13000.png")


def test_an_extreme_shape_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    """97 KB became 1.3 GB. In an animation, too, and turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    line = Image.new("1", (1, 201))
    line.save(tmp_path / "a.png", exif=exif)
    line.save(tmp_path / "b.tif", save_all=True, append_images=[line])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda opened: pytest.fail("decoded"))
    for opens, name in ((open_image, "a.png"), (open_image, "b.tif"), (open_video, "b.tif")):
        with pytest.raises(InputError, match=r"\(image of 1x201 pixels: sides may differ by 200 times at most\)"):
            opens(tmp_path / name)


@pytest.mark.parametrize("name", ["picture.eps", "picture.png"])
def test_postscript_starts_no_program(tmp_path, monkeypatch, name):
    """Pillow hands it to Ghostscript, whatever the file is called."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript"))
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "EPS")
    (tmp_path / name).write_bytes(data.getvalue())
    for opens in (open_image, open_video):
        with pytest.raises(InputError, match="not a readable"):
            opens(tmp_path / name)


def test_an_empty_name_is_no_video(tmp_path, monkeypatch):
    """It was the current folder."""
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the name of a video is empty"):
        open_video("")
    assert open_video(".") == [Path("black.png")]


def test_a_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a readable video \\(not a file\\)"):
        open_video(tmp_path / "pipe")
    os.mkfifo(tmp_path / "autosteer.json")
    with pytest.raises(Exception, match="not a file"):
        Engine.load(tmp_path)

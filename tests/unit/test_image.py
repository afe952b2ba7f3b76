"""Pictures: what users hand over, how they are cut, how many rows they take. Parity with HF is in test_vision.py."""

from __future__ import annotations

import io
import math
import os
import struct
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from autosteer.runtime import InputError, open_video, video
from autosteer.runtime.image import best_pinpoint, pack, prepare
from autosteer.runtime.manifest import AnyresSpec
from autosteer.runtime.picture_file import MAX_ASPECT_RATIO, open_image

# LLaVA-OneVision's own layout, with tiles of 27 pixels instead of 384 so that a test takes milliseconds.
ONEVISION = replace(
    toy.IMAGE,
    tile_size=27,
    resample="bicubic",
    anyres=AnyresSpec(
        tokens_per_side=27,
        grid_pinpoints=tuple((27 * rows, 27 * columns) for rows in range(1, 7) for columns in range(1, 7)),
        max_tiles_side=9,
    ),
)
SPECS = {"toy": toy.IMAGE, "onevision": ONEVISION}


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixel(image: object) -> list[int]:
    """The top left pixel of what open_image makes of it."""
    return open_image(image)[0, 0].tolist()  # type: ignore[arg-type]


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.gif", "a.tiff", "a.webp"])
def test_formats(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, Image.new("RGB", (5, 3), (200, 100, 50)), name, **options)
    found = open_image(path)
    assert (found.shape, found.dtype, pixel(path)) == ((3, 5, 3), np.uint8, [200, 100, 50])


def test_path_may_be_a_string(tmp_path):
    assert pixel(str(saved(tmp_path, Image.new("RGB", (2, 2), (1, 2, 3)), "a.png"))) == [1, 2, 3]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),  # invisible: on white, as a viewer shows it
        ("LA", (50, 255), [50, 50, 50]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("YCbCr", (128, 128, 128), [128, 128, 128]),
        ("I", 200, [200, 200, 200]),
        ("F", 200.0, [200, 200, 200]),
    ],
)
def test_colour_modes(mode, colour, expected):
    assert pixel(Image.new(mode, (3, 2), colour)) == expected


@pytest.mark.parametrize(("value", "seen"), [(0, 0), (255, 0), (256, 1), (51_400, 200), (65_535, 255)])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, value, seen):
    """Pillow's convert("RGB") clips at 255: a 16-bit picture was plain white to the prober and to the model."""
    path = saved(tmp_path, Image.fromarray(np.full((3, 2), value, np.uint16)), "a.png")
    assert pixel(path) == [seen] * 3


def test_palette_image(tmp_path):
    image = Image.new("RGB", (4, 4), (255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(saved(tmp_path, image, "a.png")) == [255, 0, 0]


def test_palette_image_with_a_transparent_colour_is_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert pixel(saved(tmp_path, image, "a.png", transparency=0)) == [255, 255, 255]


def test_first_frame_of_an_animation_is_seen(tmp_path):
    frames = [Image.new("RGB", (2, 2), c) for c in ((255, 0, 0), (0, 0, 255))]
    assert pixel(saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])) == [255, 0, 0]


def test_frames_of_an_animated_png_keep_their_transparency(tmp_path):
    """Of 2 bits, 0 to 3, the grey 1 is transparent. Frames are counted first, and on its way back Pillow read 1 of 255
    anew. As a picture the same file is its first frame.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def frame(number: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">5I2H2B", number, 4, 4, 0, 0, 1, 1, 0, 0))

    first, second = (zlib.compress(row * 4) for row in (b"\0\x1b", b"\0\xe4"))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 2, 0, 0, 0, 0)) + chunk(b"acTL", struct.pack(">II", 2, 0))
    pixels = frame(0) + chunk(b"IDAT", first) + frame(1) + chunk(b"fdAT", struct.pack(">I", 2) + second)
    content = header + chunk(b"tRNS", b"\0\1") + pixels + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    shown = [open_image(one)[0, :, 0].tolist() for one in (*open_video(tmp_path / "a.png"), tmp_path / "a.png")]
    assert shown == [[0, 255, 170, 255], [255, 170, 255, 0], [0, 255, 170, 255]]


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, "red"), (2, "green"), (3, "white"), (4, "blue"), (6, "blue"), (8, "green")]
)
def test_picture_is_turned_upright_by_its_exif_tag(tmp_path, orientation, corner):
    """red green / blue white: which colour is top left once a viewer has turned it."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    image = Image.fromarray(np.array(list(colours.values()), np.uint8).reshape(2, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixel(saved(tmp_path, image, "a.png", exif=exif)) == list(colours[corner])


def test_a_picture_is_turned_whatever_its_other_tags_are(tmp_path):
    """Pillow can read a resolution unit that is a byte, and raises when it writes one: the picture was refused."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHIB3x", 0x0128, 1, 1, 2)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    image = Image.fromarray(np.zeros((2, 3, 3), np.uint8))
    assert open_image(saved(tmp_path, image, "a.jpg", exif=exif)).shape == (3, 2, 3)


def test_array_is_taken_as_it_is():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(open_image(array), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
    ids=lambda a: f"{a.shape} {a.dtype}",
)
def test_array_of_another_kind_is_refused(array):
    with pytest.raises(InputError, match=r"expected \(H, W, 3\) uint8"):
        open_image(array)


def test_array_with_any_strides_is_prepared_like_its_copy():
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)[::-1, ::2]
    np.testing.assert_array_equal(
        prepare(open_image(image), toy.IMAGE, alone=True), prepare(image.copy(), toy.IMAGE, alone=True)
    )


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: no such image file"):
        open_image(tmp_path / "gone.png")


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def whole(format_: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(out, format_)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, I am a text file",
        whole("PNG")[:200],
        whole("JPEG")[: len(whole("JPEG")) // 2],
        whole("GIF")[:100],
        png(0, 0),
        png(10, 0),
        png(10, 10),  # no pixels
        png(60_000, 60_000),  # a decompression bomb: 10.8 GB
        b"\x89PNG\r\n\x1a\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.4",
    ],
    ids=[
        "empty",
        "text",
        "cut png",
        "cut jpeg",
        "cut gif",
        "0x0",
        "10x0",
        "no data",
        "bomb",
        "no header",
        "svg",
        "pdf",
    ],
)
def test_file_that_is_no_whole_image_is_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: not a readable image \(.+\)"):
        open_image(path)


@pytest.mark.parametrize("content", [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"<svg/>"], ids=["heic", "svg"])
def test_a_picture_of_another_format_is_told_which_are_read(tmp_path, content):
    """It said "cannot identify image file", and the path twice."""
    path = tmp_path / "a.heic"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        open_image(path)
    assert str(refused.value) == f"{path}: not a readable image (none of PNG, JPEG, WEBP, GIF, BMP, TIFF)"


def test_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a readable image"):
        open_image(tmp_path)


@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
@settings(max_examples=120, deadline=None)
def test_damaged_files_are_read_or_refused_and_nothing_else(format_, data):
    """Pillow's decoders raise what they like on damaged files (struct.error, IndexError, KeyError, ...)."""
    content = bytearray(whole(format_))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(content), 400) - 1))
        content[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "a.png").write_bytes(content)
        try:
            found = open_image(path)
        except InputError:
            return
    assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8


def test_image_object_that_turns_out_damaged_is_refused(tmp_path):
    """Pillow reads lazily: the OSError of a cut file given as an *opened* image used to reach the caller."""
    (tmp_path / "a.jpg").write_bytes(whole("JPEG")[:900])
    with Image.open(tmp_path / "a.jpg") as opened, pytest.raises(InputError, match="not a readable image"):
        open_image(opened)


@pytest.mark.parametrize("size", [(0, 0), (4, 0), (0, 4)])
def test_image_object_without_pixels_is_refused(size):
    """It passed, and ended in a ZeroDivisionError when a grid was chosen for it."""
    with pytest.raises(InputError, match=r"empty|not a readable image"):
        open_image(Image.new("RGB", size))


@pytest.mark.parametrize("image", [None, 5, b"bytes are no path", object()])
def test_thing_that_is_no_image_at_all_is_refused(image):
    with pytest.raises(InputError):
        open_image(image)


def test_an_open_file_is_not_closed_for_its_number(tmp_path):
    """open(5) takes over file 5. It closed the sockets of a server, or pytest's own output."""
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        with pytest.raises(InputError):
            open_image(file.fileno())  # type: ignore[arg-type]
        assert os.fstat(file.fileno()).st_size > 0


def test_extreme_shape_is_refused_and_the_limit_itself_is_not():
    assert open_image(np.zeros((1, MAX_ASPECT_RATIO, 3), np.uint8)).shape == (1, 200, 3)
    for shape in ((1, 201, 3), (201, 1, 3), (20, 4001, 3)):
        with pytest.raises(InputError, match="sides may differ by 200 times at most"):
            open_image(np.zeros(shape, np.uint8))


def test_a_file_of_an_extreme_shape_is_named(tmp_path):
    """Of a folder of frames nobody knew which."""
    for number, width in enumerate((8, 201)):
        Image.new("RGB", (width, 1)).save(tmp_path / f"{number}.png")
    said = r"1\.png: not a readable image \(image of 201x1 pixels: sides may differ by 200 times at most\)"
    with pytest.raises(InputError, match=said):
        open_image(str(tmp_path / "1.png"))
    with pytest.raises(InputError, match=said):
        video.tiles(open_video(tmp_path), 4, 4)


# --- preparing -------------------------------------------------------------------------------------------------------


def test_one_image_is_a_base_tile_and_a_grid():
    """4 x 8 pixels at the 4 x 8 pinpoint: nothing is resized but the base tile; red left, blue right."""
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, :4, 0], image[:, 4:, 2] = 255, 255
    tiles = prepare(image, toy.IMAGE, alone=True)
    assert (tiles.shape, tiles.dtype) == ((3, 3, 4, 4), np.float32)
    np.testing.assert_array_equal(tiles[1], np.stack([np.ones((4, 4)), *np.zeros((2, 4, 4))]))
    np.testing.assert_array_equal(tiles[2], np.stack([*np.zeros((2, 4, 4)), np.ones((4, 4))]))
    np.testing.assert_array_equal(tiles[0, 0], np.repeat([[1, 1, 0, 0]], 4, axis=0))


def test_image_is_centred_in_its_grid_on_black():
    """4 x 4 pixels at the 4 x 8 pinpoint: two columns of padding on each side."""
    tiles = prepare(np.full((4, 4, 3), 255, np.uint8), toy.IMAGE, alone=True)
    row = np.concatenate([tiles[1], tiles[2]], axis=2)[0, 0]
    np.testing.assert_array_equal(row, [0, 0, 1, 1, 1, 1, 0, 0])


def test_one_of_several_images_is_a_square_on_the_mean_colour():
    spec = replace(toy.IMAGE, mean=(0.5, 0.25, 0.0))
    tiles = prepare(np.full((2, 4, 3), 255, np.uint8), spec, alone=False)
    assert tiles.shape == (1, 3, 4, 4)
    edges, middle = tiles[0, :, 0, 0], tiles[0, :, 1, 0]
    np.testing.assert_allclose(edges, np.array([127, 63, 0]) / 255 - spec.mean, atol=1e-7)
    np.testing.assert_allclose(middle, 1 - np.array(spec.mean), atol=1e-7)


def test_pixels_are_rescaled_and_normalised_by_channel():
    spec = replace(toy.IMAGE, mean=(0.5, 0.0, 1.0), std=(0.5, 2.0, 0.25))
    tiles = prepare(np.full((4, 4, 3), (255, 51, 0), np.uint8), spec, alone=False)
    np.testing.assert_allclose(tiles[0, :, 0, 0], [1.0, 0.1, -4.0], atol=1e-6)


def test_picture_itself_is_not_changed():
    image = np.full((5, 7, 3), 9, np.uint8)
    prepare(image, toy.IMAGE, alone=True)
    assert (image == 9).all()


@pytest.mark.parametrize(
    ("size", "pinpoint"), [((4, 8), (4, 8)), ((8, 4), (8, 4)), ((8, 8), (8, 8)), ((3, 6), (4, 8)), ((100, 100), (8, 8))]
)
def test_best_pinpoint_keeps_most_and_wastes_least(size, pinpoint):
    assert best_pinpoint(size, toy.ANYRES.grid_pinpoints) == pinpoint


def rows_by_hand(size: tuple[int, int], anyres: AnyresSpec, tile: int) -> int:
    """HF's LlavaOnevisionProcessor._get_number_of_features, rewritten: base + unpadded grid + a newline per row."""
    side = anyres.tokens_per_side
    grid_h, grid_w = (n // tile * side for n in best_pinpoint(size, anyres.grid_pinpoints))
    height, width = size
    if width / height > grid_w / grid_h:
        padding = (grid_h - int(round(height * (grid_w / width), 7))) // 2
        grid_h -= 2 * padding
    else:
        padding = (grid_w - int(round(width * (grid_h / height), 7))) // 2
        grid_w -= 2 * padding
    ratio = math.sqrt(grid_h * grid_w / (anyres.max_tiles_side * side**2))
    if ratio > 1.1:
        grid_h, grid_w = int(grid_h // ratio), int(grid_w // ratio)
    return side**2 + grid_h * grid_w + grid_h


SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 4000)).filter(lambda s: max(s) <= MAX_ASPECT_RATIO * min(s))


@pytest.mark.parametrize("name", SPECS)
@given(size=SIZES)
@example(size=(1, 1))
@example(size=(1, 200))
@example(size=(200, 1))
@example(size=(20, 4000))
@example(size=(4000, 20))
@example(size=(4000, 4000))
@example(size=(2000, 25))
@settings(max_examples=60, deadline=None)
def test_tiles_and_rows_agree_for_every_size(name, size):
    """The encoder's tiles, the rows packed from them, and the count worked out by hand."""
    spec = SPECS[name]
    tiles = len(prepare(np.zeros((*size, 3), np.uint8), spec, alone=True)) if max(size) <= 600 else tiles_of(size, spec)
    side = spec.anyres.tokens_per_side
    rows = pack(np.zeros((tiles, side**2, 2), np.float32), np.ones(2, np.float32), size, spec)
    assert rows.shape == (rows_by_hand(size, spec.anyres, spec.tile_size), 2)
    assert rows.dtype == np.float32


def tiles_of(size: tuple[int, int], spec) -> int:
    height, width = best_pinpoint(size, spec.anyres.grid_pinpoints)
    return 1 + (height // spec.tile_size) * (width // spec.tile_size)


@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda s: max(s) <= 200 * min(s)))
@settings(max_examples=60, deadline=None)
def test_real_layout_never_loses_the_whole_grid(size):
    """Some row of the picture itself is always left, however thin it is."""
    assert rows_by_hand(size, ONEVISION.anyres, 27) > 27**2


def test_rows_are_base_then_grid_row_by_row_with_newlines():
    """Feature value = tile * 10 + place: the order of every row, exactly."""
    features = np.array([[[tile * 10.0 + place] for place in range(4)] for tile in range(3)], np.float32)
    rows = pack(features, np.array([-1.0], np.float32), (4, 8), toy.IMAGE)
    assert rows.ravel().tolist() == [0, 1, 2, 3, 10, 11, 20, 21, -1, 12, 13, 22, 23, -1]


def test_rows_on_padding_are_dropped():
    features = np.array([[[tile * 10.0 + place] for place in range(4)] for tile in range(3)], np.float32)
    rows = pack(features, np.array([-1.0], np.float32), (4, 4), toy.IMAGE)
    assert rows.ravel().tolist() == [0, 1, 2, 3, 11, 20, -1, 13, 22, -1]


def test_one_of_several_is_its_tile_and_a_newline():
    features = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    assert pack(features, np.array([-1.0], np.float32), (7, 9), toy.IMAGE).ravel().tolist() == [0, 1, 2, 3, -1]


def test_grid_of_too_many_tiles_is_shrunk_without_leaving_the_values_range():
    spec = replace(toy.IMAGE, anyres=replace(toy.ANYRES, max_tiles_side=1))
    rng = np.random.default_rng(0)
    features = rng.uniform(2, 3, (5, 4, 1)).astype(np.float32)
    rows = pack(features, np.array([2.5], np.float32), (8, 8), spec)
    assert rows.shape == (rows_by_hand((8, 8), spec.anyres, 4), 1) == (4 + 2 * 3, 1)
    assert rows.min() >= 2 and rows.max() <= 3

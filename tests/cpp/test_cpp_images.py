"""The C++ runtime's pixels are Python's to the bit, from every kind of picture and frame."""

from __future__ import annotations

import json
import os
import random
import struct
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_inputs import SIZES, noise
from cpp_runtime import Parts
from PIL import Image

from autosteer.runtime import InputError
from autosteer.runtime.image import at_most, pack, prepare
from autosteer.runtime.manifest import AnyresSpec, ClosestGridSpec, ImageSpec, NativeSpec, SplitSpec
from autosteer.runtime.picture_file import ADAM7, CHANNELS, DEPTHS, WHOLE, open_image
from autosteer.runtime.video import open_video, squeeze

PINPOINTS = tuple((56 * a, 56 * b) for a in range(1, 4) for b in range(1, 4))
ANYRES = AnyresSpec(tokens_per_side=4, grid_pinpoints=PINPOINTS, max_tiles_side=2)
SPEC = ImageSpec("anyres", 56, (0.48, 0.45, 0.4), (0.26, 0.261, 0.27), 1 / 255, "bicubic", ANYRES)
SIDES = [384 * n for n in range(1, 7)]
LLAVA = replace(SPEC, tile_size=384, anyres=AnyresSpec(27, tuple((a, b) for a in SIDES for b in SIDES), 9))

MARKS = [order + mark for order in (b"II", b"MM") for mark in (b"*\0", b"\0*", b"+\0", b"\0+", b"**", b"++")]
TURNED = {b"II": struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)}  # a TIFF structure behind its mark
TURNED[b"MM"] = struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)


def spec_json(spec: ImageSpec) -> Any:
    """As it stands in the manifest."""
    return json.loads(json.dumps(asdict(spec)))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(size: tuple[int, int], depth: int, colour: int, rows: Any, *chunks: bytes) -> bytes:
    """A PNG file of these rows, with chunks before them."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def picture_files(folder: Path) -> list[Path]:
    """Files of every kind that the reader takes."""
    rgb, alpha = Image.fromarray(noise(61, 40)), Image.fromarray(noise(50, 33, 4), "RGBA")
    grey = rgb.convert("L")
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {}),
        "rgba.png": (alpha, {}),
        "grey.png": (grey, {}),
        "grey-alpha.png": (alpha.convert("LA"), {}),
        "palette.png": (rgb.quantize(17), {}),
        "palette-transparent.png": (rgb.quantize(17), {"transparency": 3}),
        "key.png": (rgb, {"transparency": rgb.getpixel((3, 3))}),
        "grey-key.png": (grey, {"transparency": grey.getpixel((3, 3))}),
        "bits.png": (grey.convert("1"), {}),
        "deep.png": (Image.fromarray(noise(40, 30).astype(np.uint16)[..., 0] * 257 + 5), {}),
        "gamma.png": (rgb, {}),
        "grey.jpg": (grey, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        **{f"sub{s}.jpg": (rgb, {"subsampling": s, "quality": 60 + 15 * s}) for s in range(3)},
        "odd.jpg": (Image.fromarray(noise(17, 9)), {}),
    }
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        made[f"turned{orientation}.jpg"] = (rgb, {"exif": exif})
        made[f"turned{orientation}.png"] = (rgb, {"exif": exif})
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    content = (folder / "gamma.png").read_bytes()
    (folder / "gamma.png").write_bytes(content[:33] + png_chunk(b"gAMA", struct.pack(">I", 100000)) + content[33:])
    wide = noise(20, 15).astype(">u2") * 257 + 3
    (folder / "deep-rgb.png").write_bytes(png_file((20, 15), 16, 2, wide))
    key = png_chunk(b"tRNS", wide[0, 0, :1].tobytes())
    (folder / "deep-key.png").write_bytes(png_file((20, 15), 16, 0, wide[..., 0], key))
    for depth in (1, 2, 4):  # the lowest bits of a key count
        key, few = png_chunk(b"tRNS", struct.pack(">H", 4 << depth | depth // 2)), noise(2 * depth, 15)[..., 0]
        (folder / f"key-of-{depth}-bits.png").write_bytes(png_file((16, 15), depth, 0, few, key))
    colours = png_chunk(b"PLTE", noise(4, 1).tobytes()) + png_chunk(b"tRNS", b"\0\n")  # 10 is no end of a line
    (folder / "palette-opacity.png").write_bytes(png_file((20, 15), 8, 3, noise(20, 15)[..., 0] & 3, colours))
    plain = (folder / "rgb.png").read_bytes()
    xmp = png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')
    large = zlib.compress(bytes(2_000_000))  # Pillow refuses a text of it, and a profile
    for name, chunk in {"text": b"zTXt", "profile": b"iCCP"}.items():
        (folder / f"large-{name}.png").write_bytes(plain[:33] + png_chunk(chunk, b"x\0\0" + large) + plain[33:])
    six, none, behind = b"\6\0\0\0", b"\0\0\0\0", struct.pack("<I", 26)
    for name, chunks in {
        **{f"type{kind}": [(b"eXIf", orientation_tag(kind, 1, six))] for kind in (1, 2, 4, 6, 8, 9, 13, 99)},
        "float": [(b"eXIf", orientation_tag(11, 1, struct.pack("<f", 6)))],
        "ratio": [(b"eXIf", orientation_tag(5, 1, behind) + struct.pack("<II", 6, 1))],
        "count0": [(b"eXIf", orientation_tag(3, 0, six))],
        "count2": [(b"eXIf", orientation_tag(3, 2, b"\6\0\1\0"))],
        "count3": [(b"eXIf", orientation_tag(3, 3, behind) + b"\6\0\1\0\1\0")],
        "outside": [(b"eXIf", orientation_tag(3, 9, behind))],
        "too-many": [(b"eXIf", orientation_tag(3, 99, behind))],
        "twice": [(b"eXIf", b"Exif\0\0" + orientation_tag(3, 1, six))],
        **{f"mark{i}": [(b"eXIf", mark + TURNED[mark[:2]])] for i, mark in enumerate(MARKS)},
        "no-tiff": [(b"eXIf", b"IIxx" + orientation_tag(3, 1, six)[4:])],
        "too-short": [(b"eXIf", b"II*\0\x08\0\0")],
        "zero": [(b"eXIf", orientation_tag(3, 1, none))],
        "unit": [(b"eXIf", orientation_tag(3, 1, six, 0x0128))],  # Pillow can read it, and not write it
    }.items():
        made_of = b"".join(png_chunk(*chunk) for chunk in chunks)
        (folder / f"exif-{name}.png").write_bytes(plain[:33] + made_of + plain[33:])
        (folder / f"exif-{name}-xmp.png").write_bytes(plain[:33] + xmp + made_of + plain[33:])
    jpeg, tag = (folder / "sub0.jpg").read_bytes(), orientation_tag(3, 1, six)
    marks = {f"mark{i}": [mark + TURNED[mark[:2]]] for i, mark in enumerate(MARKS)}
    for name, parts in {"twice": [b"Exif\0\0" + tag], "parts": [tag[:9], tag[9:]], **marks}.items():
        marked = b"".join(b"\xff\xe1" + struct.pack(">H", 8 + len(part)) + b"Exif\0\0" + part for part in parts)
        (folder / f"exif-{name}.jpg").write_bytes(jpeg[:2] + marked + jpeg[2:])
    (folder / "end-is-zeros.jpg").write_bytes(jpeg[:-2] + bytes(9))  # all pixels are there
    Image.new("L", (9, 40), 128).save(folder / "no-end.jpg")  # so even that its end need not be read
    (folder / "no-end.jpg").write_bytes((folder / "no-end.jpg").read_bytes()[:-2])
    return sorted(folder.iterdir())


def orientation_tag(kind: int, count: int, value: bytes, *others: int) -> bytes:
    """A TIFF structure with this tag, and `others` as bytes that say 2."""
    more = b"".join(struct.pack("<HHI", other, 1, 1) + b"\2\0\0\0" for other in others)
    return b"II*\0" + struct.pack("<IHHHI", 8, 1 + len(others), 0x0112, kind, count) + value + more + bytes(4)


def test_pictures_have_the_pixels_that_pillow_gives(parts, tmp_path):
    """PNG of all kinds and JPEG of all kinds, byte for byte, upright and on white."""
    (tmp_path / "in").mkdir()
    files = picture_files(tmp_path / "in")
    outs = [tmp_path / f"{i}.raw" for i in range(len(files))]
    commands = [{"part": "open", "file": str(f), "out": str(o)} for f, o in zip(files, outs, strict=True)]
    wrong = []
    for file, out, answer in zip(files, outs, parts.run(*commands), strict=True):
        expected = open_image(file)
        found = np.fromfile(out, np.uint8) if isinstance(answer, list) else answer
        if not isinstance(answer, list) or tuple(answer) != expected.shape[:2]:
            wrong.append((file.name, answer))
        elif (found != expected.ravel()).any():
            wrong.append((file.name, f"{(found != expected.ravel()).mean():.2%} of the bytes differ"))
    assert wrong == []


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resizing_is_pillows_to_the_byte(parts, tmp_path, resample):
    """Larger, smaller, one axis at a time, extreme."""
    commands, expected = [], []
    targets = [(56, 56), (1, 1), (300, 20), (23, 611)]
    for i, (width, height) in enumerate(SIZES):
        file = tmp_path / f"{i}.png"
        image = Image.fromarray(noise(width, height).reshape(height, width, 3))
        image.save(file)
        for target in [*targets, (width, 9), (9, height)]:
            out = tmp_path / f"{i}-{target[0]}-{target[1]}.raw"
            size = {"width": target[0], "height": target[1]}
            commands.append({"part": "resize", "file": str(file), **size, "resample": resample, "out": str(out)})
            expected.append(np.asarray(image.resize(target, Image.Resampling[resample.upper()])))
    parts.run(*commands)
    for command, pixels in zip(commands, expected, strict=True):
        assert (np.fromfile(command["out"], np.uint8) == pixels.ravel()).all(), command


def test_frames_are_resized_and_chosen_as_in_python(parts, tmp_path):
    """torchvision's arithmetic to the byte; names with numbers, zeros before them, none; files of other kinds."""
    commands, expected = [], []
    for i, (width, height) in enumerate(SIZES):
        for side in (4, 56, 300):
            file, out = tmp_path / f"{i}.png", tmp_path / f"{i}-{side}.raw"
            Image.fromarray(noise(width, height).reshape(height, width, 3)).save(file)
            commands.append({"part": "squeeze", "file": str(file), "side": side, "out": str(out)})
            expected.append(squeeze(open_image(file), side, side))
    parts.run(*commands)
    for command, pixels in zip(commands, expected, strict=True):
        assert Path(command["out"]).read_bytes() == pixels.tobytes(), command
    names = ["1.png", "10.png", "2.JPG", "02.png", "002.png", "a.png", "a1b20.png", "a1b3.png", "a.b.png", "z9.png"]
    names += ["é7.png", "9" * 30 + ".png", "8" * 31 + ".png", ".x.png", "notes.txt", "b.webp", "A.png", "1a2", "0.png"]
    (tmp_path / "frames").mkdir()
    for name in names:
        (tmp_path / "frames" / name).touch()
    counts = (1, 2, 3, 7, 99)
    found = parts.run(*({"part": "frames", "path": str(tmp_path / "frames"), "frames": n} for n in counts))
    videos = [open_video(tmp_path / "frames", n) for n in counts]
    chosen = [[Path(str(frame)).name for frame in video] for video in videos]
    assert [answer["chosen"] for answer in found] == chosen
    assert [answer["seconds"] for answer in found] == [list(video.seconds) for video in videos]
    assert len(chosen[-1]) == len(names) - 3


@pytest.mark.parametrize("most", [None, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, anyres=replace(ANYRES, each=True)),
        replace(SPEC, kind="centre_crop", anyres=None, resample="lanczos", rescale_factor=0.0078),
        replace(SPEC, kind="pad_to_square", anyres=None),
        replace(SPEC, kind="closest_grid", anyres=None, closest_grid=ClosestGridSpec(1, 12)),
        replace(SPEC, kind="closest_grid", anyres=None, closest_grid=ClosestGridSpec(3, 6)),
        replace(SPEC, kind="split", anyres=None, resample="lanczos", split=SplitSpec(200, tiles=True)),
        replace(SPEC, kind="split", anyres=None, resample="lanczos", split=SplitSpec(113, tiles=False)),
        replace(SPEC, kind="native", anyres=None, tile_size=28, native=NativeSpec(56 * 56, 300 * 201, 2)),
    ],
)
def test_pixel_values_are_pythons_to_the_bit(parts, tmp_path, spec, alone, most):
    commands, expected = [], []
    for i, (width, height) in enumerate(SIZES):
        file, out = tmp_path / f"{i}.png", tmp_path / f"{i}.raw"
        Image.fromarray(noise(width, height).reshape(height, width, 3)).save(file)
        wanted = {"spec": spec_json(spec), "max_tiles": most, "alone": alone}
        commands.append({"part": "prepare", "file": str(file), **wanted, "out": str(out)})
        expected.append(prepare(open_image(file), at_most(spec, most), alone=alone))
    for command, pixels, tiles in zip(commands, expected, parts.run(*commands), strict=True):
        assert tiles == len(pixels)
        assert Path(command["out"]).read_bytes() == pixels.tobytes(), command


def test_features_are_laid_out_as_in_python(parts, tmp_path):
    """Unpadding, shrinking and newline rows, to the bit. LLaVA-OneVision's 1920x1920 had 81x81 rows, and not 80x80."""
    rng = np.random.default_rng(0)
    commands, expected = [], []
    small = [(SPEC, size) for size in (*SIZES, (2000, 1333), (3000, 501), (999, 1000))]
    whole = [(LLAVA, size) for size in ((1920, 1920), (1900, 1900), (1920, 1080), (641, 1987))]
    for i, (spec, (width, height)) in enumerate([*small, *whole]):
        tiles = len(prepare(np.zeros((height, width, 3), np.uint8), spec, alone=True))
        assert spec.anyres
        features = rng.normal(size=(tiles, spec.anyres.tokens_per_side**2, 8)).astype(np.float32)
        newline = rng.normal(size=8).astype(np.float32)
        names = {key: str(tmp_path / f"{i}.{key}") for key in ("features", "newline", "out")}
        features.tofile(names["features"])
        newline.tofile(names["newline"])
        size = {"height": height, "width": width, "depth": 8}
        commands.append({"part": "pack", **names, **size, "spec": spec_json(spec)})
        expected.append(pack(features, newline, (height, width), spec))
    for command, rows, count in zip(commands, expected, parts.run(*commands), strict=True):
        assert count == len(rows)
        assert Path(command["out"]).read_bytes() == rows.tobytes(), command


def random_png(rng: random.Random) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG of any kind; most are small, some have more data than libpng decompresses at a time."""
    colour, sides = rng.choice(tuple(DEPTHS)), rng.choice([range(1, 13)] * 9 + [range(60, 130)])
    depth, (width, height), interlaced = rng.choice(DEPTHS[colour]), rng.choices(sides, k=2), rng.randrange(2)
    rows, bits, colours = b"", depth * CHANNELS[colour], rng.randint(1, 2 << depth if depth < 8 else 256)
    for x, y, right, down in ADAM7 if interlaced else WHOLE:
        if columns := len(range(x, width, right)):
            row = (columns * bits + 7) // 8
            some = [bytes([rng.randrange(5)]) + rng.randbytes(row) for _ in range(y, height, down)]
            rows += b"".join(some if rng.randrange(3) else some[:1] * len(some))
    rows = rng.choice([rows] * 8 + [rows[: rng.randrange(len(rows))], rows + rng.randbytes(2000)])
    packed = zlib.compress(rows, rng.choice([0, 6]))
    packed = rng.choice([packed] * 8 + [packed[: -rng.randint(1, 8)], packed[:-4] + b"oops", packed + bytes(9)])
    window = rng.choice([7] * 8 + [0, 0, 1, 8]) << 12 | int.from_bytes(packed[:2], "big") & 0xFE0
    packed = (window + 31 - window % 31).to_bytes(2, "big") + packed[2:]  # it may be smaller than what is needed
    at = rng.randrange(len(packed) + 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))]
    chunks += [(b"PLTE", rng.randbytes(3 * colours))] * (colour == 3 or rng.randrange(5) == 0)  # or a suggestion
    if rng.random() < 0.5:
        chunks.append((b"tRNS", rng.randbytes({0: 2, 2: 6}.get(colour, rng.randint(1, colours)))))
    return [*chunks, (b"IDAT", packed[:at]), (b"IDAT", packed[at:]), (b"IEND", b"")]


def random_chunk(rng: random.Random) -> tuple[bytes, bytes]:
    """A chunk of a PNG that has no effect, turns the picture, is one of an animation, or is out of its place."""
    frame = struct.pack(">5I2H2B", 0, rng.randint(1, 9), rng.randint(1, 9), 0, 0, 1, 1, 0, 0)
    tags = b"".join(struct.pack("<HHIHH", 0x0112, rng.choice([2, 3, 4]), 1, rng.randrange(9), 0) for _ in range(2))
    form = rng.choice([b'tiff:Orientation="%d"', b"<tiff:Orientation>%d<", b'tiff:Orientation="" %d'])
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + form % rng.randrange(9) + form % rng.randrange(9)
    others = [(b"tEXt", b"exif\0Exif\0\0II*\0"), (b"gAMA", b""), (b"bKGD", b"x"), (b"abcd", b""), (b"ABCD", b"")]
    animation = [(b"acTL", struct.pack(">II", rng.randrange(3), 0)), (b"acTL", b""), (b"fcTL", frame)]
    pixels = (b"fdAT", struct.pack(">I", 1) + zlib.compress(bytes(500)))
    turned = [(b"eXIf", b"II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)), (b"iTXt", xmp)]
    return rng.choice([*others, *animation, pixels, *turned, (b"PLTE", rng.randbytes(9)), (b"tRNS", rng.randbytes(2))])


def changed_png(rng: random.Random) -> bytes:
    """A PNG with chunks that are missing, twice, elsewhere, longer, of other content; others between them."""
    chunks = random_png(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        at, to, (kind, data) = rng.randrange(len(chunks)), rng.randrange(len(chunks)), rng.choice(chunks)
        byte = rng.randrange(len(data) + 1)
        changed = [data[:byte], data + b"x", data[:byte] + bytes([rng.randrange(17)]) + data[byte + 1 :]]
        chunks[at : at + rng.randrange(2)] = rng.choice(
            [[], [chunks[to]], [(kind, rng.choice(changed))], [random_chunk(rng)], [random_chunk(rng)]]
        )
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def test_a_png_whose_chunks_are_changed_is_read_alike_or_refused_by_both(parts, tmp_path):
    """All checksums are right. Of the two libraries each opened some that the other refused, and of some they had other
    pixels.
    """
    rng, commands = random.Random(9), []
    for number in range(1500):
        file = tmp_path / f"{number}.png"
        file.write_bytes(changed_png(rng))
        commands.append({"part": "open", "file": str(file), "out": str(file.with_suffix(".raw"))})
    opened, wrong = 0, []
    for command, answer in zip(commands, parts.run(*commands), strict=True):
        try:
            expected = open_image(command["file"])
        except InputError as err:
            wrong += [(command["file"], str(err), answer)] if isinstance(answer, list) else []
            continue
        opened += 1
        same = isinstance(answer, list) and tuple(answer) == expected.shape[:2]
        if not same or Path(command["out"]).read_bytes() != expected.tobytes():
            wrong.append((command["file"], "opened", answer))
    assert wrong == []
    assert 400 < opened < 1100


def test_what_is_behind_the_last_row_is_not_decompressed(parts, tmp_path):
    """20 GB of zeros in 20 MB: each GB took a second."""
    packer = zlib.compressobj(9)
    packed, zeros = (
        packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH) for data in (bytes(3 * 16), bytes(1 << 20))
    )
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 3, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", packed + zeros * 20_000)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + pixels + png_chunk(b"IEND", b""))
    start = time.monotonic()
    assert parts.run({"part": "open", "file": str(tmp_path / "a.png"), "out": os.devnull}) == [[3, 5]]
    assert open_image(tmp_path / "a.png").shape == (3, 5, 3)
    assert time.monotonic() - start < 5


def test_an_orientation_in_much_xmp_counts(parts, tmp_path):
    """libpng has a limit of 8 MB, and Pillow one of 64."""
    xmp = png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>' + b" " * 70_000_000)
    (tmp_path / "a.png").write_bytes(png_file((5, 3), 8, 2, noise(5, 3), xmp))
    assert parts.run({"part": "open", "file": str(tmp_path / "a.png"), "out": os.devnull}) == [[5, 3]]
    assert open_image(tmp_path / "a.png").shape == (5, 3, 3)


def test_damaged_pictures_are_input_errors(parts, sanitised, tmp_path):
    """Cut anywhere, bytes changed anywhere, other formats, nothing there: never a crash, also under the sanitizers."""
    (tmp_path / "in").mkdir()
    rng = random.Random(5)
    commands = []
    for file in picture_files(tmp_path / "in"):
        content = file.read_bytes()
        for i in range(6):
            spoilt = bytearray(content[: rng.randrange(len(content))] if i < 2 else content)
            for _ in range(3 if i >= 2 else 0):
                spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
            path = tmp_path / f"{i}-{file.name}"
            path.write_bytes(spoilt)
            commands.append({"part": "open", "file": str(path), "out": os.devnull})
    for name, data in {"empty.png": b"", "text.png": b"hello", "animated.gif": b"GIF89a"}.items():
        (tmp_path / name).write_bytes(data)
    for name in ("empty.png", "text.png", "animated.gif", "not-there.png", "in"):
        commands.append({"part": "open", "file": str(tmp_path / name), "out": os.devnull})
    answers = Parts(sanitised / "autosteer-parts").run(*commands)
    assert {a["exit_code"] for a in answers if isinstance(a, dict)} == {5}
    assert all(isinstance(answer, dict) for answer in answers[-5:])
    assert answers == parts.run(*commands)


def test_picture_too_large_for_memory_is_refused_before_it_is_read(parts, tmp_path):
    """A PNG of a few bytes that says it has 2^31 pixels."""
    head = struct.pack(">IIBBBBB", 1 << 16, 1 << 15, 8, 2, 0, 0, 0)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    (answer,) = parts.run({"part": "open", "file": str(bomb), "out": os.devnull})
    assert answer["exit_code"] == 5 and "65536x32768 pixels: at most 50000000" in answer["error"]


def test_a_device_that_looks_like_a_file_is_no_picture(parts):
    """Reading /proc/self/mem fails with an exception of the stream, which had neither the code nor the name."""
    (answer,) = parts.run({"part": "open", "file": "/proc/self/mem", "out": os.devnull})
    assert answer["exit_code"] == 5 and answer["error"].startswith("/proc/self/mem: not a readable image (")

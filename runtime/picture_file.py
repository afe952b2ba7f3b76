"""Picture files -> upright pixels: which files are opened, what a PNG must be, orientation, transparency.

Its counterpart is picture.hpp: a PNG or a JPEG has the same pixels in both runtimes, or neither opens it. So Pillow
gets of a PNG only what makes its pixels and turns them upright: by itself it refuses large texts and colour profiles,
takes chunks out of their order, and leaves black what a file does not have.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from .arrays import Uint8
from .errors import InputError, first_line

ImageLike: TypeAlias = "str | Path | Image.Image | Uint8 | Callable[[], Uint8]"

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow has others, and starts Ghostscript for one of them
MAX_PIXELS = 50_000_000  # 150 MB as RGB; a few KB of a file can ask for much more
MAX_FILE_BYTES = 100_000_000
MAX_ASPECT_RATIO = 200  # beyond this a side of the resized picture, or of its features, would round to nothing
PNG = b"\x89PNG\r\n\x1a\n"


class Place(NamedTuple):
    """Where a PNG's chunk may come: at step `least` to `most`, and `then` is the next one."""

    least: int
    most: int
    then: int


# The steps through a PNG are its chunks that make pixels; KEY is what is transparent, BEHIND others behind the pixels.
START, HEADER, PALETTE, KEY, PIXELS, BEHIND, END = range(7)
ORDER = {
    b"IHDR": Place(START, START, HEADER),
    b"PLTE": Place(HEADER, HEADER, PALETTE),
    b"tRNS": Place(HEADER, PALETTE, KEY),
    b"IDAT": Place(HEADER, PIXELS, PIXELS),
    b"IEND": Place(PIXELS, BEHIND, END),
}
PALETTED = 3  # a colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # bits, by colour type
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
WHOLE = ((0, 0, 1, 1),)  # the column and the row where a pass over the pixels begins, and its steps
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
ANIMATION = (b"acTL", b"fcTL", b"fdAT")
XMP = b"XML:com.adobe.xmp\0\0\0\0\0"  # how an iTXt chunk with it begins: not compressed, of no language
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)[0-9]')
ORIENTATION = 0x0112  # EXIF's tag, and what turns a picture upright
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(image: ImageLike) -> Uint8:
    """Open an image as RGB (H, W, 3) uint8, turned upright by its EXIF tag. A function is called for its pixels: so
    those of many pictures need not be in memory at a time.

    Raises InputError for a missing file, something that is not an image, a damaged one, too many pixels, or an extreme
    shape.
    """
    if callable(image):
        image = image()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise InputError(f"image array: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
        pixels = image
    else:
        try:
            if isinstance(image, Image.Image):  # opened by the caller, but perhaps not read yet
                check_shape(image.size)
                pixels = to_rgb(image)
            else:
                with open_file(image) as opened:
                    check_shape(opened.size)
                    pixels = to_rgb(opened)
        except FileNotFoundError:
            raise InputError(f"{image}: no such image file") from None
        except UnidentifiedImageError as err:  # it says the name only, and not what Pillow was asked for
            raise InputError(f"{image}: not a readable image (none of {', '.join(FORMATS)})") from err
        except Exception as err:  # on damaged files Pillow's decoders raise any exception
            raise InputError(f"{image}: not a readable image ({first_line(err)})") from err
    height, width = pixels.shape[:2]
    check_shape((width, height))
    return pixels


def open_file(path: str | Path, *, animated: bool = False) -> Image.Image:
    """Open a picture file of one of FORMATS; its pixels are not read yet. `animated`: with all frames of a PNG.

    Raises InputError for what is no file (a pipe would be waited for, a device read without end), for one that is too
    large, and for a damaged PNG; and what Pillow raises for one that is missing, or no picture.
    """
    path = Path(path)  # no number: open() takes that for an open file, and closes it
    if path.exists() and not path.is_file():
        raise InputError("not a file")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise InputError(f"{size} bytes: at most {MAX_FILE_BYTES}")
    try:
        with path.open("rb") as file:
            png = file.read(len(PNG)) == PNG
        return _PngFile(path.read_bytes(), animated) if png else Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as err:  # Pillow's own limit is higher, and comes first
        raise InputError(f"too many pixels: at most {MAX_PIXELS}") from err


def open_content(content: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The same for the bytes of a file.

    Raises InputError for a damaged PNG, and what Pillow raises for what is no picture, or has far too many pixels.
    """
    return _PngFile(content) if content.startswith(PNG) else Image.open(io.BytesIO(content), formats=formats)


@dataclass
class _Header:
    """What a PNG's chunks say of its pixels."""

    reached: int = START
    size: tuple[int, int] = (1, 1)  # which check_shape allows, until there is a header
    depth: int = 0
    colour: int = 0
    interlaced: int = 0
    palette: int = 0  # colours that a pixel can name
    key: bytes = b""  # the transparent colour, or opacities of the palette

    def take(self, kind: bytes, data: memoryview) -> bool:
        """Take the next chunk; whether it makes the pixels. Raises InputError for one that may not come next."""
        if kind not in ORDER and (kind[:1].isupper() or not kind.isalpha()):
            raise InputError("unknown chunk")
        counts = self._counts(kind, len(data))
        place = ORDER[kind] if counts else Place(HEADER, BEHIND, BEHIND if self.reached == PIXELS else self.reached)
        unpainted = kind == b"IDAT" and self.colour == PALETTED and not self.palette
        if not place.least <= self.reached <= place.most or unpainted:
            raise InputError(f"{kind.decode()}: out of place")
        self.reached = place.then
        if counts and not self._fits(kind, data):
            raise InputError(f"{kind.decode()}: wrong content")
        return counts

    def _counts(self, kind: bytes, size: int) -> bool:
        """Whether a chunk makes pixels. A palette of others than paletted ones is a suggestion, and what is transparent
        must fit the picture: libpng ignores one that does not, and popular programs write it.
        """
        if kind == b"PLTE":
            return self.colour == PALETTED
        if kind == b"tRNS":
            return size in {0: (2,), 2: (6,), PALETTED: range(1, self.palette + 1)}.get(self.colour, ())
        return kind in ORDER

    def _fits(self, kind: bytes, data: memoryview) -> bool:
        """Take a chunk's content; whether it is one."""
        if kind == b"IHDR":
            if len(data) != 13:
                return False
            *size, self.depth, self.colour, packing, filters, self.interlaced = struct.unpack(">IIBBBBB", data)
            self.size, others = (size[0], size[1]), (packing, filters, self.interlaced)
            return min(size) > 0 and self.depth in DEPTHS.get(self.colour, ()) and others in ((0, 0, 0), (0, 0, 1))
        if kind == b"PLTE":
            self.palette = min(len(data) // 3, 1 << self.depth)
            return 0 < len(data) <= 768 and len(data) % 3 == 0
        if kind == b"tRNS":
            if self.colour == 2 and self.depth == 16:  # Pillow keeps 8 of the bits
                raise InputError("a transparent colour of 16 bits")
            self.key = bytes(data)
        return True

    def bytes_of(self, width: int, height: int) -> int:
        """How many bytes such a picture has before they are compressed."""
        bits, total = self.depth * CHANNELS[self.colour], 0
        for x, y, right, down in ADAM7 if self.interlaced else WHOLE:
            columns, rows = (width - x + right - 1) // right, (height - y + down - 1) // down
            total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
        return total


class _PngFile(PngImageFile):
    """A PNG, opened by its bytes. Raises InputError for a damaged one."""

    def __init__(self, content: bytes, animated: bool = False):
        """`animated`: with all its frames."""
        self._header, kept = _Header(), io.BytesIO()
        kept.write(PNG)
        wanted = (b"eXIf", *(ANIMATION if animated else ()))
        try:
            for kind, chunk in _chunks(memoryview(content)):
                data = chunk[8:-4]
                if self._header.take(kind, data) or kind in wanted:
                    kept.write(chunk)
                elif kind == b"iTXt" and data[: len(XMP)] == XMP:  # Pillow takes no large one
                    said = XMP_ORIENTATION.search(data)
                    kept.write(_chunk(b"iTXt", XMP + (said[0] if said else b"")))
        except InputError:
            check_shape(self._header.size)  # which says more
            raise
        kept.seek(0)
        super().__init__(kept)
        key, most = self._header.key, (1 << self._header.depth) - 1
        if key and self.mode in ("1", "L"):  # Pillow scales the pixels, but not the grey that is transparent
            self.info["transparency"] = (int.from_bytes(key, "big") & most) * (255 // most)
        if key and self.mode == "P":  # Pillow takes a last opacity of 10 for the end of a line
            self.info["transparency"] = key

    def load_prepare(self) -> None:
        """Pillow's: before pixels are read."""
        left, top, right, bottom = self.tile[0][1] or (0, 0, *self.size)
        self._missing, self._stream = self._header.bytes_of(right - left, bottom - top), zlib.decompressobj()
        super().load_prepare()

    def load_read(self, read_bytes: int) -> bytes:
        """Pillow's: more bytes for its decoder. They are decompressed here, too: it leaves black what is missing."""
        given = more = super().load_read(read_bytes)
        while more and self._missing > 0 and not self._stream.eof:
            self._missing -= len(self._stream.decompress(more, min(self._missing, 1 << 20)))
            more = self._stream.unconsumed_tail
        return given

    def load_end(self) -> None:
        """Pillow's: after pixels are read."""
        if self._missing > 0:
            raise InputError("pixels are missing, or damaged")
        super().load_end()


def _chunks(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The kinds of a PNG's chunks, and the chunks. Raises InputError where it is cut, or a checksum is wrong."""
    kind, end = b"", len(PNG)
    while kind != b"IEND":
        start, end = end, end + 12 + int.from_bytes(content[end : end + 4], "big")
        kind, chunk = bytes(content[start + 4 : start + 8]), content[start:end]
        if zlib.crc32(chunk[4:-4]).to_bytes(4, "big") != content[end - 4 : end]:
            raise InputError("image file is truncated, or a checksum is wrong")
        yield kind, chunk


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def check_size(size: tuple[int, int], count: int = 1) -> None:
    """Raise InputError for `count` pictures of `size` (width, height) that are empty, or more than MAX_PIXELS."""
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"image of {width}x{height} pixels: it is empty")
    if width * height * count > MAX_PIXELS:
        what = f"{count} frames" if count > 1 else "image"
        raise InputError(f"{what} of {width}x{height} pixels: at most {MAX_PIXELS}")


def check_shape(size: tuple[int, int], count: int = 1) -> None:
    """The same, and for sides that differ by more than MAX_ASPECT_RATIO times."""
    check_size(size, count)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        width, height = size
        raise InputError(f"image of {width}x{height} pixels: sides may differ by {MAX_ASPECT_RATIO} times at most")


def to_rgb(image: Image.Image) -> Uint8:
    """RGB (H, W, 3) uint8, upright, with transparency on white (HF: convert_to_rgb)."""
    image.load()  # PNG may have its EXIF tag at the end
    upright = _upright(image)
    if upright.mode.startswith("I;16"):  # 16-bit grey from cameras and scanners, which convert() would make all white
        grey = np.asarray(upright)
        clear = grey == upright.info.get("transparency", -1)  # a grey that PNG names
        upright = Image.fromarray(np.where(clear, 255, grey >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        layers = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the orientation tag says. Metadata that is damaged says nothing.

    ImageOps.exif_transpose also writes the other tags anew, and raises for some that it can read.
    """
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises a SyntaxError, and others
        return image
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None  # no 6.0, which is equal to 6
    return image if turn is None else image.transpose(turn)

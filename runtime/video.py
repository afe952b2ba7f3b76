"""A video -> pixel_values; its frames' features -> the video's rows in the prompt. Pure numpy and Pillow.

    frames    ->  one tile each, squeezed
    features  ->  each frame's rows pooled, frame after frame, and one newline row at the very end

The same as Hugging Face for LLaVA-OneVision (LlavaOnevisionVideoProcessor, LlavaOnevisionModel.get_video_features). Its
video processor resizes with torchvision, whose filter weights have 16 bits; Pillow's have more, so the pixels differ.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from .errors import InputError
from .ffmpeg import Film, open_regular
from .image import FORMATS, MAX_PIXELS, Float, ImageLike, Uint8, bilinear, check_size, open_file, open_image, to_rgb

VideoLike: TypeAlias = "str | Path | Sequence[ImageLike]"  # a file or folder, or the frames

FRAMES = 8  # taken from a video by default
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # the files of a folder that are frames
MAX_FRAMES = 2000  # of an animated picture; all up to the last one taken are decoded
MAX_DECODED = 10 * MAX_PIXELS  # pixels of all frames of an animated picture: seconds
KINDS = "an MP4 or another file that ffmpeg reads, an animated GIF, WebP, PNG or TIFF, or a folder of frames"


def open_video(path: str | Path, frames: int = FRAMES) -> list[ImageLike]:
    """The frames of a video file, of an animated picture, or of a folder of picture files, which are ordered by name,
    with numbers in a name compared as numbers. At most `frames` of them, evenly spaced from the first to the last.

    Raises InputError if there are none, or `frames` is not positive. A folder's files are not opened. Other files than
    pictures are decoded by ffmpeg.
    """
    path = Path(path)
    if frames < 1:
        raise InputError(f"{frames} frames of a video: take at least one")
    if path.is_dir():
        try:
            files = [f for f in path.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith(".")]
        except OSError as err:
            raise InputError(f"{path}: not a readable folder ({err.strerror})") from err
        if not files:
            raise InputError(f"{path}: no picture files in this folder; a video is {KINDS}")
        files.sort(key=_numbered)
        return [files[i] for i in spaced(len(files), frames)]
    try:
        with open_regular(path) as file:
            return list(_of_picture(path, frames) if _is_picture(file) else _of_film(file, frames))
    except FileNotFoundError:
        raise InputError(f"{path}: no such video file or folder") from None
    except Exception as err:  # on damaged files Pillow's decoders raise any exception
        raise InputError(f"{path}: not a readable video ({err or type(err).__name__}); a video is {KINDS}") from err


def _is_picture(file: BinaryIO) -> bool:
    """Whether Pillow knows this kind of file; what else may be wrong with it shows when it is read."""
    try:
        Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        return False
    except Exception:
        return True
    return True


def _of_picture(path: Path, frames: int) -> Iterator[Uint8]:
    with open_file(path) as opened:
        check_size(opened.size)
        chosen = spaced(_count_frames(opened), frames)
        check_size(opened.size, len(chosen))  # they are all in memory at a time
        for i in chosen:
            opened.seek(i)
            yield to_rgb(opened)


def _of_film(file: BinaryIO, frames: int) -> Iterator[Uint8]:
    film = Film(file)
    chosen = spaced(film.count(), frames)
    for png in film.pictures(chosen):
        with Image.open(io.BytesIO(png), formats=("PNG",)) as opened:
            check_size(opened.size, len(chosen))
            yield to_rgb(opened)


def _count_frames(film: Image.Image) -> int:
    """The number of frames, which are decoded one by one. Raises InputError if they are too many, or too large."""
    width, height = film.size
    most = min(MAX_FRAMES, MAX_DECODED // (width * height))
    total = 1
    if getattr(film, "is_animated", False):
        with contextlib.suppress(EOFError):
            for total in range(1, most + 2):
                film.seek(total)
    if total > most:
        raise InputError(
            f"more than {most} frames of {width}x{height} pixels: at most {MAX_FRAMES} frames, and {MAX_DECODED} "
            "pixels of all"
        )
    return total


def spaced(total: int, count: int) -> list[int]:
    """Indices of `count` frames out of `total`, evenly spaced from the first to the last; all if there are not more.

    LLaVA uses np.linspace(0, total - 1, count, dtype=int), whose rounding sometimes takes the frame before.
    """
    count = min(total, count)
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def tiles(frames: Iterable[ImageLike], side: int) -> Uint8:
    """Frames -> (frames, side, side, 3) uint8. Opens one at a time, so that a long video fits in memory.

    Raises InputError for a frame that cannot be read.
    """
    return np.stack([squeeze(open_image(frame), side) for frame in frames])


def pool(features: Float, side: int) -> Float:
    """image_features (frames, n * n, D) -> rows (frames * side * side, D) (HF: apply_pooling)."""
    n, width = math.isqrt(features.shape[1]), features.shape[2]
    return np.concatenate([bilinear(rows.reshape(n, n, width), side, side).reshape(-1, width) for rows in features])


def squeeze(frame: Uint8, side: int) -> Uint8:
    """(H, W, 3) -> (side, side, 3) uint8: torchvision's resize, bicubic with antialiasing.

    ATen: upsample_avx_bilinear_bicubic_uint8. It always resizes the width first.
    """
    narrow = _resize_height(frame.transpose(1, 0, 2), side).transpose(1, 0, 2)
    return np.ascontiguousarray(_resize_height(narrow, side))


def _resize_height(image: Uint8, height: int) -> Uint8:
    if len(image) == height:
        return image
    rows, weights, bits = _taps(len(image), height)
    total = np.full((height, *image.shape[1:]), 1 << (bits - 1), np.int32)
    for row, weight in zip(rows.T, weights.T, strict=True):
        total += weight[:, None, None] * image[row]
    resized: Uint8 = np.clip(total >> bits, 0, 255).astype(np.uint8)
    return resized


def _taps(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]:
    """Which of `old` rows make each of `new` (new, taps), their fixed-point weights, and the number of fraction bits.

    ATen: compute_index_ranges_int16_weights.
    """
    scale = old / new
    shrink = max(scale, 1.0)
    centre = (np.arange(new) + 0.5)[:, None] * scale
    first = np.maximum((centre - 2 * shrink + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 2 * shrink + 0.5).astype(np.int64), old)
    rows = first + np.arange((last - first).max())
    weights = np.where(rows < last, _cubic(np.abs((rows - centre + 0.5) * (1 / shrink))), 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed in ATen's order
    largest = float(weights.max())
    bits = next((n for n in range(22) if int(0.5 + largest * (2 << n)) >= 1 << 15), 22)
    fixed = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    return np.minimum(rows, old - 1), fixed, bits


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic at distances `x`, a = -0.5."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _numbered(file: Path) -> tuple[list[str | int], str]:
    """Sort key: the name with its numbers as numbers, so that 2.png comes before 10.png; then the name itself."""
    parts = re.split("([0-9]+)", file.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name

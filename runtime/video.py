"""A video -> pixel_values; its frames' features -> the video's rows in the prompt. Pure numpy and Pillow.

With `anyres` pictures (LLaVA-OneVision):

    frames    ->  one tile each, squeezed
    features  ->  each frame's rows pooled, frame after frame, and one newline row at the very end

With `native` ones (Qwen2-VL): frames are scaled to whole tiles, all alike. The graph reads groups of successive frames
as one, and makes a row of each tile. A group stands in time by its position, or by text before it.

The same as Hugging Face (LlavaOnevisionVideoProcessor, LlavaOnevisionModel.get_video_features, Qwen2VLVideoProcessor,
Qwen3VLVideoProcessor). Its video processors resize with torchvision, whose filter weights have 16 bits; Pillow's have
more, so the pixels differ.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from .arrays import Float, Uint8
from .errors import InputError, first_line
from .ffmpeg import VideoFile, open_regular
from .image import bilinear, whole_tiles
from .manifest import ImageSpec, VideoSpec
from .picture_file import FORMATS, MAX_PIXELS, ImageLike, check_shape, check_size, open_file, open_image, to_rgb

VideoLike: TypeAlias = "str | Path | Sequence[ImageLike]"  # a file or folder, or the frames

FRAMES = 8  # taken from a video by default
FRAMES_PER_SECOND = 24  # where nothing says when a frame is shown (HF's processors say so, too)
MAX_SECONDS = 1e6
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # the files of a folder that are frames
MAX_FRAMES = 2000  # of an animated picture; all up to the last one taken are decoded
MAX_DECODED = 10 * MAX_PIXELS  # pixels of all frames of an animated picture: seconds
KINDS = "an MP4 or another file that ffmpeg reads, an animated GIF, WebP, PNG or TIFF, or a folder of frames"


class Video(list[ImageLike]):
    """The frames of a video, and when each of them is shown: one video."""

    def __init__(self, frames: Iterable[ImageLike], seconds: Iterable[float] = ()):
        """`seconds`: from the video's beginning, 0 to 1,000,000 and not descending, one for each frame; none: the
        frames are 1 / FRAMES_PER_SECOND apart. Only Qwen2.5-VL and Qwen3-VL read them.
        """
        super().__init__(frames)
        self.seconds = tuple(seconds)


def open_video(path: str | Path, frames: int = FRAMES) -> Video:
    """The frames of a video file, of an animated picture, or of a folder of picture files, which are ordered by name,
    with numbers in a name compared as numbers. At most `frames` of them, evenly spaced from the first to the last.

    File i of a folder is shown at i / FRAMES_PER_SECOND. A folder's files are not opened. Other files than pictures are
    decoded by ffmpeg.
    Raises InputError if there are none, if `frames` is not positive, if the file is missing, unreadable or too large,
    or takes too long (docs/usage.md, limits), and without ffmpeg.
    """
    if not str(path):
        raise InputError(f"the name of a video is empty; a video is {KINDS}")  # Path("") is the current folder
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
        chosen = spaced(len(files), frames)
        return Video((files[i] for i in chosen), (i / FRAMES_PER_SECOND for i in chosen))
    try:
        with open_regular(path) as file:
            return _of_picture(path, frames) if _is_picture(file) else _of_file(file, frames)
    except FileNotFoundError:
        raise InputError(f"{path}: no such video file or folder") from None
    except Exception as err:  # on damaged files Pillow's decoders raise any exception
        raise InputError(f"{path}: not a readable video ({first_line(err)}); a video is {KINDS}") from err


def _is_picture(file: BinaryIO) -> bool:
    """Whether Pillow knows this kind of file; what else may be wrong with it shows when it is read."""
    try:
        Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        return False
    except Exception:
        return True
    return True


def _of_picture(path: Path, frames: int) -> Video:
    with open_file(path, animated=True) as opened:
        check_shape(opened.size)
        starts = _starts(opened)
    with open_file(path, animated=True) as opened:  # on its way back Pillow would read the transparency anew
        chosen = spaced(len(starts), frames)
        check_shape(opened.size, len(chosen))  # they are all in memory at a time
        video = Video([])
        for i in chosen:
            opened.seek(i)
            check_shape(opened.size, len(chosen))  # a TIFF's pages, and a GIF's frames, differ in size
            video.append(to_rgb(opened))
            video.seconds += (opened.info.get("timestamp", starts[i]) / 1e3,)  # WebP has it once a frame is decoded
        return video


def _of_file(file: BinaryIO, frames: int) -> Video:
    opened = VideoFile(file)
    seconds = opened.seconds()
    chosen = spaced(len(seconds), frames)
    video = Video([], (seconds[i] for i in chosen))
    for png in opened.pictures(chosen):
        with Image.open(io.BytesIO(png), formats=("PNG",)) as frame:
            check_shape(frame.size, len(chosen))
            video.append(to_rgb(frame))
    return video


def _starts(opened: Image.Image) -> list[float]:
    """When each frame begins, in ms. They are decoded one by one. Raises InputError if they are too many, or too large.

    A frame that is shown for less than 20 ms stands for 100, as in browsers and ffmpeg.
    """
    starts, pixels = [0.0], math.prod(opened.size)
    if getattr(opened, "is_animated", False):
        with contextlib.suppress(EOFError):
            while True:
                shown = float(opened.info.get("duration", 0))
                opened.seek(len(starts))  # which decodes the frame before; this one's size may be larger
                check_shape(opened.size)
                starts.append(starts[-1] + (shown if shown >= 20 else 100))
                pixels += math.prod(opened.size)
                if len(starts) > MAX_FRAMES or pixels > MAX_DECODED:
                    width, height = opened.size
                    raise InputError(
                        f"more than {len(starts) - 1} frames of {width}x{height} pixels: at most {MAX_FRAMES} "
                        f"frames, and {MAX_DECODED} pixels of all"
                    )
    return starts


def spaced(total: int, count: int) -> list[int]:
    """Indices of `count` frames out of `total`, evenly spaced from the first to the last; all if there are not more.

    LLaVA uses np.linspace(0, total - 1, count, dtype=int), whose rounding sometimes takes the frame before.
    """
    count = min(total, count)
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def tiles(frames: Iterable[ImageLike], height: int, width: int) -> Uint8:
    """Frames -> (frames, height, width, 3) uint8. Opens one at a time, so that a long video fits in memory.

    Raises InputError for a frame that cannot be read.
    """
    return np.stack([squeeze(open_image(frame), height, width) for frame in frames])


def check_seconds(frames: int, seconds: Sequence[float]) -> None:
    """Raise InputError where `seconds` cannot be when each of so many frames is shown. A video may have none."""
    ordered = all(a <= b for a, b in itertools.pairwise((0, *seconds, MAX_SECONDS)))  # false for NaN, too
    if seconds and (len(seconds) != frames or not ordered):
        raise InputError(
            f"a video of {frames} frames has {len(seconds)} seconds: there must be one for each frame, ascending, from "
            f"0 to {MAX_SECONDS:g}"
        )


def moments(frames: int, seconds: Sequence[float]) -> list[float]:
    """When each of so many frames is shown."""
    return list(seconds) or [i / FRAMES_PER_SECOND for i in range(frames)]


def group_times(moments: Sequence[float], group: int) -> list[float]:
    """When each group of frames is shown: the mean of its first and last frame's (HF: Qwen3VLProcessor)."""
    return [(moments[i] + moments[min(i + group, len(moments)) - 1]) / 2 for i in range(0, len(moments), group)]


def group_positions(moments: Sequence[float], group: int, tokens_per_second: float) -> tuple[int, ...]:
    """Where the rows of each group of frames stand on the time axis, from 0 on (HF: Qwen2_5_VLModel.get_rope_index).
    Groups are as far apart as frames are on average.
    """
    groups = range(math.ceil(len(moments) / group))
    if not tokens_per_second:
        return tuple(groups)
    apart = group * (moments[-1] - moments[0]) / max(len(moments) - 1, 1)
    each = np.float32(tokens_per_second) * np.float32(apart)
    return tuple(int(np.float32(i) * each) for i in groups)


def frame_grid(
    size: tuple[int, int], frames: int, image: ImageSpec, video: VideoSpec, max_tiles: int | None = None
) -> tuple[int, int]:
    """How many rows and columns of tiles each of a video's frames becomes, where pictures are `native`. `size`:
    (height, width) of the first. `max_tiles`: of a frame. HF: smart_resize of Qwen2VLVideoProcessor and
    Qwen3VLVideoProcessor.
    """
    assert image.native is not None and video.native is not None  # Manifest.load checks it
    tile, group, count, counted = image.tile_size, image.native.frames, 1, 1
    if video.native.whole:
        count = max(frames, group)
        counted = round(count / group) * group
        if min(size) < tile:
            enlarge = max(tile / side for side in size)
            size = int(size[0] * enlarge), int(size[1] * enlarge)
    most = video.native.max_pixels
    if max_tiles is not None:
        most = min(most, max_tiles * tile**2 * count)
    return whole_tiles(size, tile, min(video.native.min_pixels, most), most, count, counted)


def scaled(frames: Sequence[ImageLike], grid: tuple[int, int], side: int) -> Uint8:
    """Frames -> (frames, height, width, 3) uint8 of `grid` (rows, columns) tiles of `side` pixels.

    Raises InputError if they are too large together, or one cannot be read.
    """
    height, width = (n * side for n in grid)
    check_size((width, height), len(frames))
    return tiles(frames, height, width)


def filled(tiles: Uint8, group: int) -> Uint8:
    """With the last frame again until all groups are full."""
    return np.concatenate([tiles, *[tiles[-1:]] * (-len(tiles) % group)])


def pool(features: Float, side: int) -> Float:
    """image_features (frames, n * n, D) -> rows (frames * side * side, D) (HF: apply_pooling)."""
    n, width = math.isqrt(features.shape[1]), features.shape[2]
    return np.concatenate([bilinear(rows.reshape(n, n, width), side, side).reshape(-1, width) for rows in features])


def squeeze(frame: Uint8, height: int, width: int) -> Uint8:
    """(H, W, 3) -> (height, width, 3) uint8: torchvision's resize, bicubic with antialiasing.

    ATen: upsample_avx_bilinear_bicubic_uint8. It always resizes the width first.
    """
    narrow = _resize_height(frame.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return np.ascontiguousarray(_resize_height(narrow, height))


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

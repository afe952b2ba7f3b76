"""An image -> pixel_values; the vision encoder's features -> the image's rows in the prompt. Pure numpy and Pillow.

ImageSpec.kind selects a function in CUT that cuts an image into tiles. ImageSpec.tile_separators are the token ids
around and between the tiles' rows. `anyres` is LLaVA-OneVision's and LLaVA-NeXT's:

    one image  ->  a base tile (the whole picture, squeezed) + a grid of tiles (at the best pinpoint, padded)
    features   ->  base rows, then the grid row by row without its padding, a newline row after each
    several    ->  one square tile each, one newline row after it; with AnyresSpec.each as if each were alone

`native` is Qwen2-VL's: a picture is scaled to whole tiles at about its own size, and the graph makes a row of each.

Same arithmetic as Hugging Face's Pillow image processors and LlavaOnevisionModel.pack_image_features; tested against
them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from .arrays import Float, Uint8
from .errors import InputError, OptionError, PackageError
from .manifest import AnyresSpec, ImageSpec, VideoSpec
from .picture_file import MAX_PIXELS

Runs: TypeAlias = "list[list[int] | Float]"  # an image in a prompt: token ids, and rows (n, D)
Tiles: TypeAlias = "tuple[list[Uint8], tuple[int, int]]"  # the tiles, and their TileSeparators.grid

MAX_SQUARE = 2 * MAX_PIXELS  # of a picture that is padded: one of MAX_PIXELS, if its sides differ by at most 2 times


def at_most(spec: ImageSpec, tiles: int | None) -> ImageSpec:
    """`spec` that cuts a picture into at most `tiles` tiles. `anyres` and `closest_grid` lose the grids of more, the
    base tile included; if none is left, a picture becomes one tile, like each of several pictures. `native` scales to
    fewer pixels; a long narrow picture may still take a tile for each of its sides' ratio. The others are as they were.
    Raises OptionError if `tiles` is below 1.
    """
    if tiles is None or not (spec.anyres or spec.closest_grid or spec.native):
        return spec
    if tiles < 1:
        raise OptionError("max_tiles", f" = {tiles}: a picture takes at least one tile")
    if grid := spec.closest_grid:
        return replace(spec, closest_grid=replace(grid, max_tiles=min(grid.max_tiles, max(tiles - 1, 1))))
    if native := spec.native:
        most = min(tiles * spec.tile_size**2, native.max_pixels)
        return replace(spec, native=replace(native, min_pixels=min(native.min_pixels, most), max_pixels=most))
    assert spec.anyres is not None
    area = spec.tile_size**2
    fitting = tuple((h, w) for h, w in spec.anyres.grid_pinpoints if h * w // area + 1 <= tiles)
    return replace(spec, anyres=replace(spec.anyres, grid_pinpoints=fitting))


def digest(pictures: Iterable[Uint8]) -> str:
    """SHA-256 of pictures (H, W, 3), as if each were a PPM file: `pngtopnm photo.png | sha256sum`."""
    sha = hashlib.sha256()
    for picture in pictures:
        sha.update(b"P6\n%d %d\n255\n" % (picture.shape[1], picture.shape[0]))
        sha.update(np.ascontiguousarray(picture).data)
    return sha.hexdigest()


def prepare(image: Uint8, spec: ImageSpec, *, alone: bool) -> Float:
    """(H, W, 3) uint8 -> pixel_values (tiles, 3, height, width) float32; see `cut`."""
    return normalise(cut(image, spec, alone=alone)[0], spec)


def cut(image: Uint8, spec: ImageSpec, *, alone: bool) -> Tiles:
    """(H, W, 3) uint8 -> its tiles (tile_size, tile_size, 3) uint8, and their grid.

    `alone`: it is the prompt's only image. `anyres` makes one tile of each of several. A `native` picture is cut by the
    graph: here it is whole, as often as the graph reads frames.
    """
    return CUT[spec.kind](image, spec, alone)


def normalise(tiles: Sequence[Uint8], spec: ImageSpec | VideoSpec) -> Float:
    """Tiles (height, width, 3) uint8 of one size -> pixel_values (tiles, 3, height, width) float32."""
    scaled = (np.stack(tiles).astype(np.float64) * spec.rescale_factor).astype(np.float32)
    normalised = (scaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def lay_out(runs: Sequence[Float], grid: tuple[int, int], spec: ImageSpec) -> Runs:
    """Runs of an image's rows (n, D) -> the same with the token ids around and between them.

    Raises PackageError if ImageSpec.tile_separators has no entry for `grid`, or one for another number of runs.
    """
    if not spec.tile_separators:
        return list(runs)
    separators = {s.grid: s.token_ids for s in spec.tile_separators}.get(grid, ())
    if len(separators) != len(runs) + 1:
        raise PackageError(
            f"image: no tile_separators for {len(runs)} runs of rows in a grid of {grid[0]}x{grid[1]} tiles"
        )
    laid: Runs = [list(separators[0])]
    for rows, ids in zip(runs, separators[1:], strict=True):
        laid += [rows, list(ids)]
    return [run for run in laid if len(run)]


def pack(features: Float, newline: Float, size: tuple[int, int], spec: ImageSpec) -> Float:
    """image_features (tiles, side * side, D) and image_newline (D,) -> the image's rows (n, D), in token order.

    `size` is the original picture's (height, width).
    """
    if len(features) == 1:
        return np.concatenate([features[0], newline[None]])
    anyres = _anyres(spec)
    side, width = anyres.tokens_per_side, features.shape[-1]
    rows, columns = (n // spec.tile_size for n in best_pinpoint(size, anyres.grid_pinpoints))
    grid = features[1:].reshape(rows, columns, side, side, width).transpose(0, 2, 1, 3, 4)
    grid = _unpad(grid.reshape(rows * side, columns * side, width), size)
    ratio = math.sqrt(grid.shape[0] * grid.shape[1] / (anyres.max_tiles_side * side**2))
    if ratio > 1.1:
        grid = bilinear(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    newlines = np.broadcast_to(newline, (grid.shape[0], 1, width))
    return np.concatenate([features[0], np.concatenate([grid, newlines], axis=1).reshape(-1, width)])


def best_pinpoint(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that keeps most of the picture and wastes least (HF: select_best_resolution)."""
    height, width = size

    def fit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=fit)  # of equals the first, as in HF


def _anyres_tiles(image: Uint8, spec: ImageSpec, alone: bool) -> Tiles:
    anyres = _anyres(spec)
    if not (alone or anyres.each) or not anyres.grid_pinpoints:
        return _padded(image, spec, alone)
    height, width = best_pinpoint((image.shape[0], image.shape[1]), anyres.grid_pinpoints)
    scale_h, scale_w = height / image.shape[0], width / image.shape[1]
    if scale_w < scale_h:
        fitted = (min(math.ceil(image.shape[0] * scale_w), height), width)
    else:
        fitted = (height, min(math.ceil(image.shape[1] * scale_h), width))
    padded = np.zeros((height, width, 3), np.uint8)
    top, left = (height - fitted[0]) // 2, (width - fitted[1]) // 2
    padded[top : top + fitted[0], left : left + fitted[1]] = _resize(image, *fitted, spec)
    return [_squeeze(image, spec), *_tiles(padded, spec)], (1, 1)  # `pack` joins them into one run


def _anyres(spec: ImageSpec) -> AnyresSpec:
    assert spec.anyres is not None  # Manifest.load checks it
    return spec.anyres


def _tiles(image: Uint8, spec: ImageSpec) -> list[Uint8]:
    """Cut a picture of whole tiles, row by row."""
    n, (height, width) = spec.tile_size, image.shape[:2]
    return [image[y : y + n, x : x + n] for y in range(0, height, n) for x in range(0, width, n)]


def _padded(image: Uint8, spec: ImageSpec, alone: bool) -> Tiles:
    """Pad with the mean colour to a square, which becomes one tile (HF: LlavaImageProcessorPil with do_pad)."""
    height, width = image.shape[:2]
    side = max(height, width)
    if side * side > MAX_SQUARE:
        raise InputError(f"image of {width}x{height} pixels: padded to a square it has more than {MAX_SQUARE}")
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(mean * 255) for mean in spec.mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return [_squeeze(square, spec)], (1, 1)


def _squeeze(image: Uint8, spec: ImageSpec) -> Uint8:
    return _resize(image, spec.tile_size, spec.tile_size, spec)


def _centre_crop(image: Uint8, spec: ImageSpec, alone: bool) -> Tiles:
    """Scale the shortest side to tile_size and keep the middle of the other (HF: ChameleonImageProcessorPil)."""
    size, shortest = spec.tile_size, min(image.shape[:2])
    height, width = (int(size * side / shortest) for side in image.shape[:2])
    top, left = (height - size) // 2, (width - size) // 2
    return [_resize(image, height, width, spec)[top : top + size, left : left + size]], (1, 1)


def _split(image: Uint8, spec: ImageSpec, alone: bool) -> Tiles:
    """Scale to the longest edge, stretch to whole tiles and cut. The whole image comes last, squeezed into one tile.

    HF: Idefics3ImageProcessorPil.
    """
    assert spec.split is not None  # Manifest.load checks it
    n, edge, ratio = spec.tile_size, spec.split.longest_edge, image.shape[1] / image.shape[0]
    even = int(edge / ratio if ratio >= 1 else edge * ratio)
    even = max(even + even % 2, 1)
    image = _resize(image, *((even, edge) if ratio >= 1 else (edge, even)), spec)
    if not spec.split.tiles:
        return [_squeeze(image, spec)], (1, 1)
    height, width = image.shape[:2]
    if width >= height:
        columns = math.ceil(width / n)
        rows = math.ceil(int(columns * n / (width / height)) / n)
    else:
        rows = math.ceil(height / n)
        columns = math.ceil(int(rows * n * (width / height)) / n)
    image = _resize(image, rows * n, columns * n, spec)
    if (rows, columns) == (1, 1):
        return [image], (1, 1)
    return [*_tiles(image, spec), _squeeze(image, spec)], (rows, columns)


def _closest_grid(image: Uint8, spec: ImageSpec, alone: bool) -> Tiles:
    """Stretch to the grid whose shape is closest, and cut. The whole image comes last, squeezed into one tile.

    HF: GotOcr2ImageProcessorPil with crop_to_patches. Its grids are in the order of their tiles, then of their columns.
    """
    assert spec.closest_grid is not None  # Manifest.load checks it
    least, most, (height, width) = spec.closest_grid.min_tiles, spec.closest_grid.max_tiles, image.shape[:2]
    grids = ((c, n // c) for n in range(least, most + 1) for c in range(1, n + 1) if n % c == 0)
    best, off = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * spec.tile_size**2 * columns * rows  # enough of a picture for so many tiles
        if distance < off or (distance == off and large):
            best, off = (columns, rows), distance
    stretched = _resize(image, best[1] * spec.tile_size, best[0] * spec.tile_size, spec)
    whole = [_squeeze(image, spec)] if best != (1, 1) else []
    return [*_tiles(stretched, spec), *whole], (1, 1)  # the rows of all tiles are one run


def _whole(image: Uint8, spec: ImageSpec, alone: bool) -> Tiles:
    """HF: Qwen2VLImageProcessorPil, smart_resize."""
    assert spec.native is not None  # Manifest.load checks it
    rows, columns = native_grid((image.shape[0], image.shape[1]), spec)
    scaled = _resize(image, rows * spec.tile_size, columns * spec.tile_size, spec)
    return [scaled] * spec.native.frames, (rows, columns)


def native_grid(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """How many rows and columns of tiles a `native` picture of `size` (height, width) becomes."""
    assert spec.native is not None
    return whole_tiles(size, spec.tile_size, spec.native.min_pixels, spec.native.max_pixels)


def whole_tiles(
    size: tuple[int, int], tile: int, least: int, most: int, count: int = 1, counted: int = 1
) -> tuple[int, int]:
    """Rows and columns of tiles for `count` pictures of `size` (height, width), all alike, that have `least` to `most`
    pixels together (HF: smart_resize). `counted`: the pictures that are taken into account where the sides are rounded.
    """
    height, width = size
    rows, columns = round(height / tile), round(width / tile)
    pixels = counted * (rows * tile * columns * tile)
    if pixels > most:
        shrink = math.sqrt(count * height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / tile)) for side in size)
    elif pixels < least:
        enlarge = math.sqrt(least / (count * height * width))
        rows, columns = (math.ceil(side * enlarge / tile) for side in size)
    return rows, columns


CUT: dict[str, Callable[[Uint8, ImageSpec, bool], Tiles]] = {
    "anyres": _anyres_tiles,
    "centre_crop": _centre_crop,
    "closest_grid": _closest_grid,
    "pad_to_square": _padded,
    "split": _split,
    "native": _whole,
}


def _resize(image: Uint8, height: int, width: int, spec: ImageSpec) -> Uint8:
    resample = Image.Resampling[spec.resample.upper()]
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def _unpad(grid: Float, size: tuple[int, int]) -> Float:
    """Drop the rows or columns of `grid` (h, w, D) that are padding (HF: unpad_image). `size`: the original's."""
    height, width = grid.shape[:2]
    if size[1] / size[0] > width / height:
        padding = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return grid[padding : height - padding]
    padding = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return grid[:, padding : width - padding]


def bilinear(grid: Float, height: int, width: int) -> Float:
    """Resize (h, w, D) as torch's interpolate(mode="bilinear", align_corners=False) does, without antialiasing."""

    def axis(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Float]:
        position = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - np.float32(0.5), 0)
        low = position.astype(np.int64)
        return low, np.minimum(low + 1, old - 1), (position - low).astype(np.float32)

    y0, y1, fy = axis(grid.shape[0], height)
    x0, x1, fx = axis(grid.shape[1], width)
    rows: Float = grid[y0] * (1 - fy)[:, None, None] + grid[y1] * fy[:, None, None]
    out: Float = rows[:, x0] * (1 - fx)[:, None] + rows[:, x1] * fx[:, None]
    return out

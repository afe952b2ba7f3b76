"""What the Hugging Face LLaVA-OneVision processor does to a picture, in numpy and fast enough to train from.

One picture becomes a base tile (the whole picture, stretched) and the tiles of the best-fitting grid (the
picture resized with its ratio kept, padded black, cut up). Each of several pictures becomes one tile (padded
grey to a square). Source: transformers, models/llava_onevision/image_processing_llava_onevision.py and
processing_llava_onevision.py.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

TILE = 56
PATCH = 14
SIDE = TILE // PATCH  # patches along one side of a tile
PINPOINTS = [[56, 56], [56, 112], [112, 56], [56, 168], [168, 56]]  # [height, width], as HF has them


def best_grid(height: int, width: int) -> tuple[int, int]:
    """The (height, width) pinpoint that keeps most pixels of the picture, the least empty one on a tie."""
    best, best_key = (0, 0), (-1, 0)
    for grid_h, grid_w in PINPOINTS:
        scale = min(grid_w / width, grid_h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        key = (kept, -(grid_h * grid_w - kept))
        if key > best_key:
            best, best_key = (grid_h, grid_w), key
    return best


def _fitted(height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Size (height, width) of the picture once resized into the grid with its ratio kept."""
    scale_w, scale_h = grid[1] / width, grid[0] / height
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), grid[0]), grid[1]
    return grid[0], min(math.ceil(width * scale_h), grid[1])


def image_token_count(height: int, width: int, *, alone: bool = True) -> int:
    """How many <image> tokens the processor writes; `alone`: the only picture of its prompt."""
    if not alone:
        return SIDE * SIDE + 1
    grid_h, grid_w = (side // PATCH for side in best_grid(height, width))
    if width / height > grid_w / grid_h:
        grid_h -= (grid_h - int(round(height * (grid_w / width), 7))) // 2 * 2
    else:
        grid_w -= (grid_w - int(round(width * (grid_h / height), 7))) // 2 * 2
    return SIDE * SIDE + grid_h * grid_w + grid_h


def video_token_count(frames: int) -> int:
    """How many <video> tokens the processor writes: 2 x 2 patches are pooled into one."""
    return frames * math.ceil(SIDE / 2) ** 2 + 1


def _resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    resized = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.uint8)


def tiles(image: Image.Image, *, alone: bool = True) -> np.ndarray:
    """(tiles, 3, 56, 56) float32 in [-1, 1]: the pixel_values of one picture."""
    width, height = image.size
    if alone:
        grid = best_grid(height, width)
        new_h, new_w = _fitted(height, width, grid)
        top, left = (grid[0] - new_h) // 2, (grid[1] - new_w) // 2
        canvas = np.zeros((*grid, 3), np.uint8)
        canvas[top : top + new_h, left : left + new_w] = _resize(image, new_h, new_w)
        cut = canvas.reshape(grid[0] // TILE, TILE, grid[1] // TILE, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
        stack = np.concatenate([_resize(image, TILE, TILE)[None], cut])
    else:
        side = max(width, height)
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        stack = _resize(square, TILE, TILE)[None]
    pixels: np.ndarray = stack.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return pixels


def frame(image: Image.Image) -> np.ndarray:
    """(3, 56, 56) float32 in [-1, 1]: a frame of a video, stretched."""
    pixels: np.ndarray = _resize(image, TILE, TILE).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    return pixels


def patch_centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture coordinates (x, y) of every patch centre, each (tiles, 16), tiles as in `tiles(..., alone=True)`."""
    along = (np.arange(SIDE) + 0.5) / SIDE
    base_y, base_x = np.meshgrid(along * height, along * width, indexing="ij")
    grid = best_grid(height, width)
    new_h, new_w = _fitted(height, width, grid)
    y = ((np.arange(grid[0] // PATCH) + 0.5) * PATCH - (grid[0] - new_h) // 2) * height / new_h
    x = ((np.arange(grid[1] // PATCH) + 0.5) * PATCH - (grid[1] - new_w) // 2) * width / new_w
    full_y, full_x = np.meshgrid(y, x, indexing="ij")

    def cut(a: np.ndarray) -> np.ndarray:
        rows: np.ndarray = a.reshape(grid[0] // TILE, SIDE, grid[1] // TILE, SIDE).swapaxes(1, 2)
        return rows.reshape(-1, SIDE * SIDE)

    return np.concatenate([base_x.reshape(1, -1), cut(full_x)]), np.concatenate([base_y.reshape(1, -1), cut(full_y)])

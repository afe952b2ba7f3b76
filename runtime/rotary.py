"""Rotary position embedding: where a prompt's rows stand, and the tables that GroupQueryAttention rotates by.

A row of text has one position. A model with multimodal rotary embedding (mrope) gives every row three: time, row and
column. They are equal for text. The rows of a picture have one time, and the rows and columns of its grid; those of a
video have a time for each group of frames. Text after it goes on behind the largest row or column, however long the
video is. Each frequency reads one of the three. HF: Qwen2_5_VLModel.get_rope_index, Qwen2_5_VLRotaryEmbedding.

Some models have other frequencies for long prompts (longrope): for all rows of a prompt and its answer, or for none.
Some have others in layers with a window (Gemma 3). Those layers read tables of their own.

So row i of the tables holds cos and sin of frequency_j * position[axis_j][i], times the scale. The graphs take the
tables as inputs and read row i for the i-th entry of their caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .arrays import Float
from .manifest import ROTARY_TABLES, RotarySpec
from .subgraph import Device, buffer

Positions = npt.NDArray[np.int64]  # (3, rows): time, row, column

BLOCK = 128  # rows of the tables are computed at least so many at a time, as an answer grows


class PositionCounter:
    """Gives the rows of a prompt their positions, from its beginning."""

    def __init__(self, spec: RotarySpec):
        self._spec, self._next = spec, 0
        self._parts = [np.empty((3, 0), np.int64)]

    def text(self, count: int) -> None:
        """`count` rows of text; or of a picture, for a model whose pictures count as text does."""
        self._parts.append(np.broadcast_to(np.arange(self._next, self._next + count), (3, count)))
        self._next += count

    def picture(self, count: int, grid: tuple[int, int] | None, times: Sequence[int] = (0,)) -> None:
        """`count` rows of a picture or a video. `grid`: the (rows, columns) in which they stand, None where they stand
        in none. `times`: one for each group of a video's frames, whose rows stand in such a grid each.
        """
        if grid is None or not self._spec.axes:
            self.text(count)
            return
        at = np.indices((len(times), *grid))
        at[0] = np.array(times)[:, None, None]
        self._parts.append(self._next + at.reshape(3, -1))
        self._next += max(grid)

    def positions(self) -> Positions:
        """Of all rows so far."""
        return np.concatenate(self._parts, axis=1)


class RotaryTables:
    """Tables (capacity, frequencies) for one prompt and its answer. Their rows are computed as they are needed."""

    def __init__(
        self, spec: RotarySpec, positions: Positions, capacity: int, dtype: str, device: Device, *, first: int = 0
    ):
        """`positions`: of the prompt's rows. The rows of the answer go on behind the last. `dtype`: the graphs'.
        `first`: the first row that will be read.
        """
        self._specs, self._positions, self._device = spec.by_table(), positions, device
        shape = (capacity, len(spec.frequencies))
        names = [f"{kind}{name}" for kind in self._specs for name in ROTARY_TABLES]
        self._tables = {name: np.zeros(shape, np.dtype(dtype)) for name in names}
        self._capacity, self._filled = capacity, first
        self.inputs = {name: buffer(table, device) for name, table in self._tables.items()}  # of a decoder half

    def extend(self, total: int) -> None:
        """Compute the rows of the first `total` positions, and some more, if they are not there yet."""
        if total <= self._filled:
            return
        last = min(max(total, self._filled + BLOCK), self._capacity)
        positions = self._at(self._filled, last)
        rows = [values for spec in self._specs.values() for values in tables(spec, positions)]
        for (name, table), values in zip(self._tables.items(), rows, strict=True):
            table[self._filled : last] = values
            if self._device.kind != "cpu":  # a buffer on the CPU shares the table's memory
                self.inputs[name].update_inplace(table)
        self._filled = last

    def _at(self, first: int, last: int) -> Positions:
        """Positions of the rows first..last-1."""
        length = self._positions.shape[1]
        following = (
            self._positions[:, -1].max() + 1 + np.arange(max(first, length) - length, max(last, length) - length)
        )
        given = self._positions[:, first : min(last, length)]
        return np.concatenate([given, np.broadcast_to(following, (3, len(following)))], axis=1)


def tables(spec: RotarySpec, positions: Positions) -> tuple[Float, Float]:
    """cos and sin (rows, frequencies) at `positions` (3, rows), float32.

    Angles are float32, as HF's. Their cosines are rounded from float64, where all libraries agree to the last bit that
    counts: so both runtimes have the same tables.
    """
    axes = np.array(spec.axes or [0] * len(spec.frequencies))
    angle = (positions[axes].T.astype(np.float32) * np.array(spec.frequencies, np.float32)).astype(np.float64)
    scale = np.float32(spec.scale)
    return np.cos(angle).astype(np.float32) * scale, np.sin(angle).astype(np.float32) * scale

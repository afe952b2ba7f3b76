"""Deepstack (arXiv 2406.04334): a picture enters not only where the prompt does, but also behind the first layers.

The image graph gives a row of a picture in 1 + L parts of D numbers. The first part enters the decoder in the row's
place. Part 1 + i is added to what layer i gives there, so it is an input `deepstack.<i>` of the half that has layer i.
HF: Qwen3VLTextModel._deepstack_process.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .arrays import Float
from .subgraph import Device, OrtValue, buffer


class Deepstack:
    """What one prompt's pictures add to the output of the first decoder layers."""

    def __init__(self, layers: int, width: int, rows: Mapping[int, Float], dtype: str, device: Device):
        """`layers`: L. `width`: D. `rows`: (n, L * D) of each picture, by first position. `dtype`: the graphs'."""
        self._layers, self._width, self._rows, self._device = layers, width, rows, device
        self._dtype = np.dtype(dtype)
        self._nothing = buffer(np.zeros((1, 1, width), self._dtype), device)

    def inputs(self, layers: range, first: int, count: int) -> dict[str, OrtValue]:
        """Inputs of a decoder half with `layers`, for a pass over `count` positions from `first` on: (1, count, D)
        each; or one row of zeros, which is added to all, where no picture stands.
        """
        wanted = range(layers.start, min(layers.stop, self._layers))
        if not any(at < first + count and first < at + len(rows) for at, rows in self._rows.items()):
            return {f"deepstack.{layer}": self._nothing for layer in wanted}
        added = np.zeros((self._layers, 1, count, self._width), self._dtype)
        for at, rows in self._rows.items():
            own = rows[max(first - at, 0) : max(first + count - at, 0)]  # those that stand here
            start = max(at - first, 0)
            by_layer = own.reshape(len(own), self._layers, self._width).swapaxes(0, 1)
            added[:, 0, start : start + len(own)] = by_layer
        return {f"deepstack.{layer}": buffer(added[layer], self._device) for layer in wanted}

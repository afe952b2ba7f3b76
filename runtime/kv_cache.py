"""Keys and values of earlier positions: one preallocated buffer per layer and kind, bound as past and as present.

GroupQueryAttention writes new positions into it in place; `seqlens_k` tells it how many are valid. Nothing is copied as
an answer grows, and pages that have not been written take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .manifest import Dims, GraphSpec, KVCacheSpec
from .subgraph import Device, OrtValue, buffer

Arrays: TypeAlias = (
    "dict[str, npt.NDArray[Any]]"  # by "<layer>.<kind>": (rows, num_key_value_heads, capacity, head_dim)
)


def empty_arrays(graph: GraphSpec, dims: Dims, spec: KVCacheSpec, capacity: int, rows: int = 1) -> Arrays:
    """Room for `capacity` tokens of each of `rows` answers in every layer of a decoder half."""
    assert graph.layers is not None
    shape = (rows, dims.num_key_value_heads, capacity, dims.head_dim)
    names = (f"{layer}.{kind}" for layer in range(*graph.layers) for kind in ("key", "value"))
    return {name: np.zeros(shape, np.dtype(spec.dtype)) for name in names}


class KVCache:
    """The caches of one decoder half: of one request at a time, or of several that share a pass (batch.py)."""

    def __init__(self, arrays: Arrays, device: Device):
        """On the CPU the caches are `arrays`; elsewhere they begin as a copy."""
        self._device = device
        self.past: dict[str, OrtValue] = {}
        self.present: dict[str, OrtValue] = {}
        self.bytes = 0
        for name, array in arrays.items():
            self._set(name, array)

    def reserve(self, capacity: int, length: int, limit: int) -> None:
        """Make room for `capacity` tokens and keep the first `length` positions.

        A cache that is too small doubles, up to `limit`, so a dialogue copies each position about once.
        """
        held = next(iter(self.past.values())).shape()[2]
        if capacity <= held:
            return
        self.bytes = 0
        for name, array in self._resized(max(capacity, min(2 * held, limit)), length):
            self._set(name, array)

    def copy(self, arrays: Mapping[str, npt.NDArray[Any]], length: int) -> None:
        """Write the first `length` positions into `arrays`."""
        for name, array in arrays.items():
            array[:, :, :length] = self.past[f"past_key_values.{name}"].numpy()[:, :, :length]

    def copied(self, capacity: int, length: int) -> KVCache:
        """A cache of its own with the first `length` positions of this one, and room for `capacity` tokens."""
        return KVCache(dict(self._resized(capacity, length)), self._device)

    def _resized(self, capacity: int, length: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """One array at a time: in `reserve` each old one is freed before the next is made."""
        for name, value in self.past.items():
            old = value.numpy()
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            new[:, :, :length] = old[:, :, :length]
            yield name.removeprefix("past_key_values."), new

    def _set(self, name: str, array: npt.NDArray[Any]) -> None:
        value = buffer(array, self._device)
        self.past[f"past_key_values.{name}"] = value
        self.present[f"present.{name}"] = value
        self.bytes += array.nbytes

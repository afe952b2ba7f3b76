"""Keys and values of earlier positions: one preallocated buffer per layer and kind, bound as past and as present.

GroupQueryAttention writes new positions into it in place; `seqlens_k` tells it how many are valid. Nothing is copied as
an answer grows, and pages that have not been written take no memory.
"""

from __future__ import annotations

import numpy as np

from .manifest import Dims, GraphSpec, KVCacheSpec
from .subgraph import Device, OrtValue, buffer


class KVCache:
    """The caches of one decoder half, for one request at a time."""

    def __init__(self, graph: GraphSpec, dims: Dims, spec: KVCacheSpec, capacity: int, device: Device):
        """Room for `capacity` tokens in every layer of `graph`: (1, num_key_value_heads, capacity, head_dim) each."""
        assert graph.layers is not None
        self._device = device
        self._shape = (1, dims.num_key_value_heads, capacity, dims.head_dim)
        self.past: dict[str, OrtValue] = {}
        self.present: dict[str, OrtValue] = {}
        self.bytes = 0
        for layer in range(*graph.layers):
            for kind in ("key", "value"):
                self._set(f"{layer}.{kind}", np.zeros(self._shape, np.dtype(spec.dtype)))

    def reserve(self, capacity: int, length: int, limit: int) -> None:
        """Make room for `capacity` tokens and keep the first `length` positions.

        A cache that is too small doubles, up to `limit`, so a dialogue copies each position about once.
        """
        batch, heads, held, width = self._shape
        if capacity <= held:
            return
        self._shape = (batch, heads, max(capacity, min(2 * held, limit)), width)
        self.bytes = 0
        for name, value in self.past.items():  # one buffer at a time: each old one is freed before the next is made
            old = value.numpy()
            new = np.zeros(self._shape, old.dtype)
            new[:, :, :length] = old[:, :, :length]
            self._set(name.removeprefix("past_key_values."), new)

    def _set(self, name: str, array: np.ndarray) -> None:
        value = buffer(array, self._device)
        self.past[f"past_key_values.{name}"] = value
        self.present[f"present.{name}"] = value
        self.bytes += array.nbytes

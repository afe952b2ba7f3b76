"""Keys and values of earlier tokens: one preallocated buffer per layer, bound as past and as present.

GroupQueryAttention writes the new rows into it in place; `seqlens_k` tells it how many are valid. Nothing is copied
as the dialogue grows, and memory the operating system has not been asked to touch is not used.
"""

from __future__ import annotations

import numpy as np

from .manifest import Dims, GraphSpec, KVCacheSpec
from .subgraph import Device, OrtValue, buffer


class KVCache:
    """The caches of one decoder half, for one request."""

    def __init__(self, graph: GraphSpec, dims: Dims, spec: KVCacheSpec, capacity: int, device: Device):
        """Room for `capacity` tokens in every layer of `graph`: (1, num_key_value_heads, capacity, head_dim) each."""
        assert graph.layers is not None
        shape = (1, dims.num_key_value_heads, capacity, dims.head_dim)
        self.past: dict[str, OrtValue] = {}
        self.present: dict[str, OrtValue] = {}
        self.bytes = 0
        for layer in range(*graph.layers):
            for kind in ("key", "value"):
                array = np.zeros(shape, np.dtype(spec.dtype))
                self.bytes += array.nbytes
                value = buffer(array, device)
                self.past[f"past_key_values.{layer}.{kind}"] = value
                self.present[f"present.{layer}.{kind}"] = value

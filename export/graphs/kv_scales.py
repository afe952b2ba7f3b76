"""int8 KV caches: the scale of each channel, and Hugging Face's model with caches that round in the same way.

    code = clamp(round(x / scale), -128, 127)        read again: code * scale

That is onnxruntime's GroupQueryAttention with k_quant_type and v_quant_type PER_CHANNEL: keys after rotary and values,
one scale for each channel of each head of each layer. A position attends to rounded keys and values only, its own
included. So prefill in chunks and drafts see what prefill of the whole prompt sees.

Scales are fixed at export, from the text, the pictures and the random tokens of calibration.py. Clipping a value costs
far more than a coarser step. So the scale covers the largest value seen, times HEADROOM. A key's channels change with
its position, so each key is rotated to positions all over the context. SmolLM2-135M, KL to float32 caches:

    HEADROOM                                    1        1.25     1.5
    as it is                                    0.0130   0.0045   0.0034
    without random tokens                       0.0261   0.0085   0.0052
    also without rotation                       0.055             0.0064
    99.9th percentile instead of the largest    0.030
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from autosteer.export.checkpoint.hf_model import cache_argument
from autosteer.runtime.manifest import RotarySpec
from autosteer.runtime.rotary import tables

HEADROOM = 1.5
POSITIONS = 64  # that each key is rotated to
FLOOR = 1e-3  # of a layer's mean: a channel that is small here may be larger elsewhere


@dataclass(frozen=True)
class KVScales:
    """Scales of one layer's caches, (num_key_value_heads * head_dim,) float32 each, above zero."""

    keys: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]


class RangeObserver(DynamicLayer):
    """A layer's cache that stores nothing, and computes the `scales` that fit one forward pass."""

    def __init__(self, rotary: RotarySpec, context: int):
        """`context`: positions in a dialogue."""
        super().__init__()  # type: ignore[no-untyped-call]
        positions = np.linspace(0, context - 1, POSITIONS).astype(np.int64)
        cos, sin = map(torch.from_numpy, tables(rotary, np.stack([positions] * 3)))
        self._rotations = list(zip(cos, sin, strict=True))
        self.scales: KVScales | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys (after rotary) and values unchanged, (B, H, T, d) each."""
        pairs = self._rotations[0][0].shape[-1]
        first, second, rest = key_states.split([pairs, pairs, key_states.shape[-1] - 2 * pairs], dim=-1)
        keys = [
            torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).abs().amax((0, 2))
            for cos, sin in self._rotations
        ]
        self.scales = KVScales(_scales(torch.stack(keys).amax(0)), _scales(value_states.abs().amax((0, 2))))
        return key_states, value_states


class RoundedCaches:
    """Caches for forward passes that round keys and values as int8 caches do."""

    def __init__(self, scales: Sequence[KVScales]):
        self.errors: list[float] = []  # relative (Frobenius norm) of each layer's keys and values in each pass
        self._scales = scales

    def __call__(self, model: Any) -> dict[str, Any]:
        """Keyword arguments of one forward pass of `model`."""
        return through(model, [Rounding(scales, self.errors.append) for scales in self._scales])


class Rounding(DynamicLayer):
    """A layer's cache that stores nothing, and returns keys and values rounded."""

    def __init__(self, scales: KVScales, note: Callable[[float], None]):
        """`note` is called with the relative error (Frobenius norm) of keys, and of values."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._scales, self._note = scales, note

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rounded keys and values, (1, H, T, d) each."""
        return self._round(key_states, self._scales.keys), self._round(value_states, self._scales.values)

    def _round(self, x: torch.Tensor, scales: npt.NDArray[np.float32]) -> torch.Tensor:
        heads, width = x.shape[1], x.shape[3]
        scale = torch.from_numpy(scales).reshape(heads, 1, width)
        rounded = torch.round(x / scale).clamp_(-128, 127).mul_(scale)
        self._note(float((rounded - x).norm() / x.norm().clamp_min(1e-30)))
        return rounded


def through(model: Any, layers: Sequence[DynamicLayer]) -> dict[str, Any]:
    """Keyword arguments of a forward pass of `model` with the caches `layers`."""
    cache = DynamicCache()
    cache.layers = list(layers)
    return {cache_argument(model): cache, "use_cache": True}


def uncached(model: Any) -> dict[str, Any]:
    """Keyword arguments of a forward pass without caches."""
    return {"use_cache": False}


def _scales(largest: torch.Tensor) -> npt.NDArray[np.float32]:
    """Scales for channels whose largest values are `largest` (H, d)."""
    floor = FLOOR * largest.mean() + torch.finfo(torch.float32).tiny
    scales: npt.NDArray[np.float32] = (HEADROOM / 127 * largest.clamp_min(floor)).flatten().numpy()
    return scales

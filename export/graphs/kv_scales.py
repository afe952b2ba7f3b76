"""int8 KV caches: how far each of their channels reaches, and Hugging Face's model with caches rounded alike.

    code = clamp(round(x / scale), -128, 127)        read again: code * scale

That is onnxruntime's GroupQueryAttention with k_quant_type and v_quant_type PER_CHANNEL: keys after rotary and values,
one scale for each channel of each head of each layer. A row attends to rounded keys and values from the start, its own
among them; so chunks and drafts see what a whole prompt sees.

Scales are fixed at export, by the text, the picture and the random tokens of calibration.py. What is beyond a scale's
reach is cut off, which costs far more than coarser steps do. So the largest of what was seen counts, and gets HEADROOM;
and because a channel of a key holds other numbers at other places, each key is turned to places all over the context.
SmolLM2-135M, KL to float32 caches: HEADROOM 1 .0130, 1.25 .0045, 1.5 .0034; without random tokens .0261, .0085, .0052;
without turning, too, .055 and .0064 (at 1.5); the 99.9th percentile instead of the largest .030.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

HEADROOM = 1.5
PLACES = 64  # of a key, all over the context
FLOOR = 1e-3  # of a layer's mean reach: a channel that was silent here may speak elsewhere


@dataclass(frozen=True)
class KVScales:
    """Of one layer; (num_key_value_heads * head_dim,) float32 each, above zero."""

    keys: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]


class ReachObserver(DynamicLayer):
    """A layer's cache for one pass, which keeps nothing but the `scales` that fit what it saw."""

    def __init__(self, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]):
        """cos, sin (context, head_dim / 2): the rotary tables."""
        super().__init__()
        places = np.linspace(0, len(cos) - 1, PLACES).astype(int)
        self._turns = [(torch.from_numpy(cos[i]), torch.from_numpy(sin[i])) for i in places]
        self.scales: KVScales | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """keys after rotary and values, (B, H, T, d) each, as they came."""
        first, second = key_states.chunk(2, dim=-1)
        keys = [
            torch.cat([first * cos - second * sin, second * cos + first * sin], -1).abs().amax((0, 2))
            for cos, sin in self._turns
        ]
        self.scales = KVScales(_scales(torch.stack(keys).amax(0)), _scales(value_states.abs().amax((0, 2))))
        return key_states, value_states


class RoundedCaches:
    """Makes the caches of passes through which keys and values come as int8 caches hold them."""

    def __init__(self, scales: Sequence[KVScales]):
        self.errors: list[float] = []  # of each layer's keys and values in each pass: relative, Frobenius norm
        self._scales = scales

    def __call__(self, model: Any) -> dict[str, Any]:
        """Keyword arguments of one pass of `model`."""
        return through(model, [Rounding(scales, self.errors.append) for scales in self._scales])


class Rounding(DynamicLayer):
    """A layer's cache for one pass, which keeps nothing and gives back keys and values rounded."""

    def __init__(self, scales: KVScales, note: Callable[[float], None]):
        """`note` is told the error of keys, and of values: relative, Frobenius norm."""
        super().__init__()
        self._scales, self._note = scales, note

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, H, T, d) each"""
        return self._round(key_states, self._scales.keys), self._round(value_states, self._scales.values)

    def _round(self, x: torch.Tensor, scales: npt.NDArray[np.float32]) -> torch.Tensor:
        heads, width = x.shape[1], x.shape[3]
        scale = torch.from_numpy(scales).reshape(heads, 1, width)
        rounded = torch.round(x / scale).clamp_(-128, 127).mul_(scale)
        self._note(float((rounded - x).norm() / x.norm().clamp_min(1e-30)))
        return rounded


def through(model: Any, layers: Sequence[DynamicLayer]) -> dict[str, Any]:
    """Keyword arguments of `model` for a pass whose keys and values go through `layers`."""
    cache = DynamicCache()
    cache.layers = list(layers)
    return {cache_name(model): cache, "use_cache": True}


def uncached(model: Any) -> dict[str, Any]:
    """The same where they go nowhere."""
    return {"use_cache": False}


def cache_name(model: Any) -> str:
    """transformers calls the cache `past_key_values`, and from 5.24 on `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _scales(reach: torch.Tensor) -> npt.NDArray[np.float32]:
    """Of channels that reach so far, (H, d)."""
    floor = FLOOR * reach.mean() + torch.finfo(torch.float32).tiny
    scales: npt.NDArray[np.float32] = (HEADROOM / 127 * reach.clamp_min(floor)).flatten().numpy()
    return scales

"""Block quantisation in onnxruntime's MatMulNBits layout, and the recipes behind --precision.

A row of K weights is cut into blocks; each block keeps one float32 scale. Symmetric: code = round(w / scale) +
2^(bits-1), and the scale is signed so that the block's largest weight hits code 0 exactly (as onnxruntime's own
quantize_matmul_4bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autosteer.runtime.manifest import Precision

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Blocks:
    """How one matrix is quantised."""

    bits: int
    size: int  # weights that share a scale

    def fitted(self, k: int) -> Blocks:
        """The largest block not above `size` that divides `k`; embeddings cannot pad a row."""
        return Blocks(self.bits, next((b for b in (128, 64, 32, 16) if b <= self.size and k % b == 0), self.size))


@dataclass(frozen=True)
class Recipe:
    """What --precision means. None: not quantised. The prober and the refusal head stay float32 in every recipe."""

    body: Blocks | None  # decoder projections
    head: Blocks | None  # lm_head and embed_tokens
    storage: str  # numpy dtype of what is not quantised; arithmetic is float32 in all recipes
    image: Precision  # of the image graph


RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(None, None, "float32", "fp32"),
    "fp16": Recipe(None, None, "float16", "fp16"),
    "int8": Recipe(Blocks(8, 128), Blocks(8, 128), "float32", "int8"),
    "int4": Recipe(Blocks(4, 32), Blocks(8, 128), "float32", "int8"),
}


def quantise(rows: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) float32 -> codes (N, ceil(K / size), size * bits / 8) uint8 and scales (N, ceil(K / size)) float32.

    K is padded with zeros to whole blocks. 4-bit codes are packed low nibble first.
    """
    import torch

    n, k = rows.shape
    count = -(-k // blocks.size)
    padded = torch.nn.functional.pad(rows, (0, count * blocks.size - k)).reshape(n, count, blocks.size)
    low, high = padded.amin(2), padded.amax(2)
    middle = 1 << (blocks.bits - 1)
    scales = torch.where(high.abs() > low.abs(), high, low) / -float(middle)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = torch.round(padded * inverse[..., None]).add_(middle).clamp_(0, 2 * middle - 1).to(torch.uint8)
    if blocks.bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes.contiguous(), scales


def quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) float32 -> codes (N, K) int8 in -127..127 and one scale a row (N,) float32: weights of image graphs."""
    import torch

    scales = rows.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return torch.round(rows / scales[:, None]).to(torch.int8), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, blocks: Blocks, k: int) -> torch.Tensor:
    """The weights (N, K) that onnxruntime computes with: inverse of `quantise`."""
    import torch

    if blocks.bits == 4:
        codes = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)
    values = (codes.float() - float(1 << (blocks.bits - 1))) * scales[..., None]
    return values.flatten(1)[:, :k]

"""Quantise matrices and pack their codes; and the recipes of --precision.

In blocks, for onnxruntime's MatMulNBits: a row of K weights is cut into blocks, each with a scale of its own.
weight = (code - zero point) * scale.

    symmetric    the zero point is 2^(bits-1); the scale is signed so that the block's largest weight hits code 0
                 exactly, as in onnxruntime's own quantize_matmul_4bits and llama.cpp's Q4_0; rounded to nearest
    asymmetric   4 bits; each block also has a zero point. The best of a few scales is used, with each weight's error
                 weighted by its column's channel energy (calibration.py)

Per channel, in 8 bits: one scale for each row of weights, for the int8 matmul of int8_matmul.py. Blocks are closer to
the original, but they are dequantised for every matrix product, so prefill takes longer (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from autosteer.runtime.errors import InputError
from autosteer.runtime.manifest import CacheType, Precision

if TYPE_CHECKING:
    import torch

SHRINKING = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a block's range; weights outside are clipped
Target = Literal["cpu", "cuda"]  # the device that a package will run on
CHUNK = 1 << 17  # weights that are quantised at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks of 4 or 8 bits."""

    bits: int
    size: int  # weights that share a scale
    symmetric: bool = True  # False: 4 bits only

    def fitted(self, k: int) -> Blocks:
        """The same with the largest block of at most `size` that divides `k`: rows of embeddings cannot be padded."""
        size = next((b for b in (128, 64, 32, 16) if b <= self.size and k % b == 0), self.size)
        return replace(self, size=size)

    @property
    def needs_calibration(self) -> bool:
        """Whether it uses the channel energy of calibration.py."""
        return not self.symmetric


@dataclass(frozen=True)
class PerChannel:
    """A matrix in 8 bits with one scale per row. Activations are quantised as well (int8_matmul.py). CPU only."""

    needs_calibration = True


Scheme = Blocks | PerChannel


@dataclass(frozen=True)
class Recipe:
    """How a package stores its weights. None: not quantised. Prober and Refusal Head are always float32."""

    body: Scheme | None  # decoder projections
    head: Blocks | None  # lm_head and embed_tokens
    storage: str  # numpy dtype of matrices that are not quantised
    image: Precision  # of the image graph
    activations: Literal["float32", "float16"]  # numpy dtype of hidden states, and of the decoder's arithmetic
    int8_caches: bool = False  # KV caches are int8; else they have the type of the activations
    prefill: Scheme | None = None  # of a second copy of the decoder's projections, for prefill; None: no such copy

    @property
    def caches(self) -> CacheType:
        """numpy dtype of the KV caches."""
        return "int8" if self.int8_caches else self.activations


BLOCKS = {"int8": Blocks(8, 128), "int4": Blocks(4, 128, symmetric=False)}
HEAD = BLOCKS["int8"]  # the LM head and the embedding
RECIPES: dict[Target, dict[Precision, Recipe]] = {
    "cpu": {
        "fp32": Recipe(None, None, "float32", "fp32", "float32"),
        "fp16": Recipe(None, None, "float16", "fp16", "float32"),
        "int8": Recipe(PerChannel(), HEAD, "float32", "int8", "float32"),
        "int4": Recipe(BLOCKS["int4"], HEAD, "float32", "int8", "float32"),
    },
    "cuda": {  # no fp32: attention on CUDA is float16 only; no int8 image graph: CUDA has no int8 matmul for it
        "fp16": Recipe(None, None, "float16", "fp16", "float16"),
        "int8": Recipe(BLOCKS["int8"], HEAD, "float16", "fp16", "float16"),
        "int4": Recipe(BLOCKS["int4"], HEAD, "float16", "fp16", "float16"),
    },
}
IMAGES: dict[Target, tuple[Precision, ...]] = {"cpu": ("fp32", "fp16", "int8"), "cuda": ("fp32", "fp16")}
CACHES: dict[Target, tuple[CacheType, ...]] = {"cpu": ("float32", "int8"), "cuda": ("float16",)}


def recipe(
    precision: Precision,
    *,
    target: Target = "cpu",
    block_size: int | None = None,
    head_bits: int | None = None,
    image: Precision | None = None,
    caches: CacheType | None = None,
    prefill: Precision | None = None,
) -> Recipe:
    """The recipe of a precision, changed by the options that are given. 4 head bits: blocks like the body's.

    Raises InputError for options that do not fit the precision, or that `target` has no kernels for.
    """
    if precision not in RECIPES[target]:
        raise InputError(
            f"--precision {precision}: onnxruntime has no attention for it on {target}; "
            f"--target {target} goes with {', '.join(RECIPES[target])}"
        )
    if image is not None and image not in IMAGES[target]:
        raise InputError(
            f"--image-precision {image}: onnxruntime has no matrix product for it on {target}; "
            f"--target {target} goes with {', '.join(IMAGES[target])}"
        )
    if caches is not None and caches not in CACHES[target]:
        raise InputError(
            f"--kv-cache {caches}: packages for {target} cannot have such a cache; "
            f"--target {target} goes with {', '.join(CACHES[target])}"
        )
    if prefill is not None and (target, precision, prefill) != ("cpu", "int4", "int8"):
        raise InputError(
            f"--prefill-precision {prefill}: only --precision int4 goes with it, and only --target cpu "
            f"(here: {precision}, {target})"
        )
    chosen = replace(
        RECIPES[target][precision], int8_caches=caches == "int8", prefill=PerChannel() if prefill else None
    )
    if block_size is not None:
        if precision not in BLOCKS:
            raise InputError(f"--block-size {block_size}: {precision} has no blocks; it goes with int8 and int4")
        chosen = replace(chosen, body=replace(BLOCKS[precision], size=block_size))
    if head_bits is not None:
        heads = {blocks.bits: blocks for blocks in (chosen.body, chosen.head) if isinstance(blocks, Blocks)}
        if head_bits not in heads:
            raise InputError(
                f"--head-bits {head_bits}: {precision} has no such head; 8 goes with int8 and int4, 4 with int4"
            )
        chosen = replace(chosen, head=heads[head_bits])
    return chosen if image is None else replace(chosen, image=image)


@dataclass(frozen=True)
class Packed:
    """A quantised matrix (N, K), or rows of it, in MatMulNBits' layout. K is padded with zeros to whole blocks."""

    codes: torch.Tensor  # (N, ceil(K / size), size * bits / 8) uint8; 4-bit codes low nibble first
    scales: torch.Tensor  # (N, ceil(K / size)) float32
    zero_points: torch.Tensor | None  # (N, ceil(ceil(K / size) / 2)) uint8, two a byte; None: symmetric


def quantise(rows: torch.Tensor, blocks: Blocks, channel_energy: torch.Tensor | None = None) -> Packed:
    """Quantise rows (N, K) float32.

    `channel_energy` (K,) >= 0 weighs the squared errors of columns in asymmetric blocks; None: equal weights.
    """
    import torch

    if not blocks.symmetric:
        codes, scales, zeros = grid(rows, blocks, channel_energy)
        return Packed(pack(codes), scales, pack(zeros))
    x = _in_blocks(rows, blocks.size)
    scales = _symmetric_scales(x, blocks.bits)
    middle = 1 << (blocks.bits - 1)
    codes = torch.round(x * _inverse(scales)[..., None]).add_(middle).clamp_(0, 2 * middle - 1).to(torch.uint8)
    return Packed(pack(codes) if blocks.bits == 4 else codes, scales, None)


def grid(
    rows: torch.Tensor, blocks: Blocks, channel_energy: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, count, size) uint8, scales (N, count) float32 and zero points (N, count) uint8 of asymmetric blocks."""
    import torch

    assert blocks.bits == 4, "only 4 bits have zero points"
    x = _in_blocks(rows, blocks.size)
    weights = torch.ones(rows.shape[1]) if channel_energy is None else channel_energy
    weights = _in_blocks(weights[None], blocks.size)[0]
    chunks = x.split(max(1, CHUNK // weights.numel()))
    with _one_thread_per_chunk() as pool:
        found = list(pool.map(lambda chunk: _best(chunk, weights), chunks))
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, scales, zeros


def _in_blocks(rows: torch.Tensor, size: int) -> torch.Tensor:
    """(N, K) -> (N, ceil(K / size), size), padded with zeros."""
    import torch

    count = -(-rows.shape[1] // size)
    return torch.nn.functional.pad(rows, (0, count * size - rows.shape[1])).reshape(len(rows), count, size)


@contextmanager
def _one_thread_per_chunk() -> Iterator[ThreadPoolExecutor]:
    """One thread per core, each for whole chunks. torch itself would split each of a chunk's fifty short steps over all
    cores and wait for them: five times slower, and worse on a busy machine.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _best(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (n, count, size) uint8, scales (n, count), zero points (n, count) uint8 of blocks x (n, count, size).

    Candidates: the block's whole range, parts of it, and the symmetric grid; so no error exceeds plain rounding to
    nearest on either grid. For given codes the best scale is that of least squares, <x, q> / <q, q>. Errors are summed
    explicitly: <x, x> - <x, q>^2 / <q, q> is cheaper, but loses small errors to cancellation in float32.
    """
    import torch

    low, high = x.amin(-1).clamp_(max=0), x.amax(-1).clamp_(min=0)
    step = (high - low) / 15
    zero = torch.round(-low * _inverse(step))
    symmetric = _symmetric_scales(x, 4)
    candidates = [
        *((_inverse(step * part), zero) for part in SHRINKING),
        (_inverse(symmetric), torch.full_like(zero, 8)),
    ]
    weighted, q, product = x * weights, torch.empty_like(x), torch.empty_like(x)
    best, scales = torch.full_like(low, torch.inf), torch.zeros_like(low)
    inverses, zeros = torch.zeros_like(low), torch.zeros_like(low)
    for inverse, zero in candidates:
        _round(x, inverse, zero, out=q).sub_(zero[..., None])
        along = torch.mul(weighted, q, out=product).sum(-1)
        length = torch.mul(q, q, out=product).mul_(weights).sum(-1)
        scale = along * _inverse(length)
        error = torch.mul(q, scale[..., None], out=product).sub_(x).square_().mul_(weights).sum(-1)
        better = error < best
        for kept, new in ((best, error), (scales, scale), (inverses, inverse), (zeros, zero)):
            torch.where(better, new, kept, out=kept)
    return _round(x, inverses, zeros, out=q).to(torch.uint8), scales, zeros.to(torch.uint8)


def _round(x: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 of blocks x, as floats."""
    import torch

    return torch.addcmul(zero[..., None], x, inverse[..., None], out=out).round_().clamp_(0, 15)


def _symmetric_scales(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed scales (n, count) of blocks x (n, count, size)."""
    import torch

    low, high = x.amin(-1), x.amax(-1)
    return torch.where(high.abs() > low.abs(), high, low) / -float(1 << (bits - 1))


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 for a block of zeros."""
    import torch

    return torch.where(scales == 0, 0.0, 1 / scales)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """(.., n) uint8 below 16 -> (.., ceil(n / 2)), low nibble first."""
    import torch

    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """(.., n) uint8 -> (.., 2 n), low nibble first."""
    import torch

    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def flat_nibbles(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    """Rows of `count` nibbles, each padded to whole bytes (N, ceil(count / 2)) -> the same without padding between
    rows, (ceil(N * count / 2),). Low nibble first.
    """
    import torch

    flat: npt.NDArray[np.uint8] = pack(_unpack(torch.from_numpy(packed))[:, :count].reshape(-1)).numpy()
    return flat


def padded_nibbles(flat: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    """The inverse of `flat_nibbles`."""
    import torch

    nibbles = _unpack(torch.from_numpy(flat))
    padded: npt.NDArray[np.uint8] = pack(nibbles[: len(nibbles) // count * count].reshape(-1, count)).numpy()
    return padded


def dequantise(packed: Packed, blocks: Blocks, k: int) -> torch.Tensor:
    """The weights (N, K) float32 that onnxruntime computes with; the inverse of `quantise`."""
    codes = (_unpack(packed.codes) if blocks.bits == 4 else packed.codes).float()
    if packed.zero_points is None:
        codes -= float(1 << (blocks.bits - 1))
    else:
        codes -= _unpack(packed.zero_points)[:, : codes.shape[1], None].float()
    return (codes * packed.scales[..., None]).flatten(1)[:, :k]


def quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scheme `PerChannel`: (N, K) float32 -> codes (N, K) int8 in -127..127, and one scale per row (N,) float32."""
    import torch

    scales = rows.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return torch.round(rows / scales[:, None]).to(torch.int8), scales

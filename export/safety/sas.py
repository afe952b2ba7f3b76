"""Safety Awareness Score: how much the layers agree with themselves about what "unsafe" is.

    delta_l = h_l(unsafe) - h_l(safe)          one per pair, last prompt token
    SAS(l)  = mean over pairs i < j of cos(delta_l^i, delta_l^j)          (arXiv 2507.13255)

With u = delta / |delta| the mean over all N (N - 1) / 2 cosines is (|sum u|^2 - N) / (N (N - 1)): O(N d), not O(N^2 d).
The layer with the highest SAS is the one the paper probes. Published margins between layers are small, hence the
bootstrap interval: resample the pairs, look how far the score moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autosteer.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

RESAMPLES = 500


@dataclass(frozen=True)
class SasScores:
    """SAS of every layer; all tensors (L,) float64. `low` and `high` bound the central 95 % of the bootstrap."""

    sas: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def unit_deltas(deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """deltas (N, L, d) -> (their directions (M, L, d) float32, the M row numbers that have one).

    A pair whose two states are equal at some layer has no direction there and is dropped from all layers.
    Raises InputError where fewer than two pairs are left.
    """
    norms = deltas.float().norm(dim=-1, keepdim=True)
    usable = (norms[..., 0] > 0).all(dim=1)
    kept = int(usable.sum())
    if kept < 2:
        raise InputError(
            f"--pairs: in {len(deltas) - kept} of {len(deltas)} pairs the unsafe and the safe prompt are the same to "
            "the model; at least two pairs must differ"
        )
    return deltas.float()[usable] / norms[usable], usable.nonzero()[:, 0]


def sas(directions: torch.Tensor) -> torch.Tensor:
    """Mean pairwise cosine of unit vectors, per layer: (N, L, d) float32 -> (L,) float64. N >= 2."""
    import torch

    n = len(directions)
    return (directions.sum(dim=0, dtype=torch.float64).square().sum(dim=-1) - n) / (n * (n - 1))


def sas_with_interval(directions: torch.Tensor, *, seed: int, resamples: int = RESAMPLES) -> SasScores:
    """SAS per layer with a percentile bootstrap over pairs: directions (N, L, d) -> three (L,).

    A pair drawn c times would have cosine 1 with itself; those terms are left out of numerator and denominator
    (|sum c u|^2 - sum c^2) / (N^2 - sum c^2), else every interval would sit too high.
    """
    import torch

    n, layers, _ = directions.shape
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (resamples, n), generator=generator)
    counts = torch.zeros(resamples, n).scatter_add_(1, draws, torch.ones(resamples, n))
    own = counts.double().square().sum(dim=1)
    scores = torch.empty(resamples, layers, dtype=torch.float64)
    for layer in range(layers):  # one layer at a time: (resamples, d) is small, (resamples, L, d) need not be
        sums = (counts @ directions[:, layer]).double()
        scores[:, layer] = (sums.square().sum(dim=-1) - own) / (n * n - own)
    scores = scores[own < n * n]  # a draw of one pair n times has no cosine in it
    low, high = torch.quantile(scores, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return SasScores(sas(directions), low, high)

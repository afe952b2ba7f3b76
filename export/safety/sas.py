"""Safety Awareness Score: how consistently a layer separates unsafe prompts from their safe twins.

    delta_l = h_l(unsafe) - h_l(safe)          one per pair, last prompt token
    SAS(l)  = mean over pairs i < j of cos(delta_l^i, delta_l^j)          (arXiv 2507.13255)

With u = delta / |delta|, the mean over all N (N - 1) / 2 cosines is (|sum u|^2 - N) / (N (N - 1)), which costs O(N d)
instead of O(N^2 d). The paper probes the layer with the highest SAS. Published margins between layers are small, so
each score gets a bootstrap interval: the pairs are resampled, and the score is computed again.
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


def directions(deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """deltas (n, L, d) -> (unit vectors (m, L, d) float32, (n,) bool: which pairs have one at every layer).

    A pair whose two states are equal at some layer has no direction there and is dropped from all layers.
    """
    norms = deltas.float().norm(dim=-1, keepdim=True)
    usable = (norms[..., 0] > 0).all(dim=1)
    return deltas.float()[usable] / norms[usable], usable


def mean_cosine(total: torch.Tensor, n: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Mean pairwise cosine from a sum of unit vectors (..., d): (|sum|^2 - own) / (n^2 - own).

    For vectors drawn c times each, n = sum c and own = sum c^2; without resampling, n = own. Subtracting `own` leaves
    out the cosine of 1 between two draws of the same pair, which would raise every interval.
    """
    return (total.double().square().sum(dim=-1) - own) / (n * n - own)


class SasSum:
    """SAS per layer with a percentile bootstrap, over pairs added block by block. Memory: O(resamples * L * d)."""

    def __init__(self, pairs: int, *, seed: int, resamples: int = RESAMPLES):
        """`pairs`: how many will be added in all."""
        import torch

        draws = torch.randint(pairs, (resamples, pairs), generator=torch.Generator().manual_seed(seed))
        self._counts = torch.zeros(resamples, pairs).scatter_add_(1, draws, torch.ones(resamples, pairs))
        self._seen = self.usable = 0
        self._sum = self._resampled = torch.zeros(())
        self._drawn = self._own = torch.zeros(resamples, dtype=torch.float64)

    def add(self, deltas: torch.Tensor) -> None:
        """Add deltas (n, L, d). Those without a direction at some layer do not count."""
        units, usable = directions(deltas)
        counts = self._counts[:, self._seen : self._seen + len(deltas)][:, usable]
        self._seen += len(deltas)
        self.usable += len(units)
        self._sum = self._sum + units.double().sum(dim=0)
        self._resampled = self._resampled + (counts @ units.flatten(1)).view(len(counts), *units.shape[1:])
        self._drawn = self._drawn + counts.double().sum(dim=1)
        self._own = self._own + counts.double().square().sum(dim=1)

    def sas(self) -> torch.Tensor:
        """(L,) float64. Raises InputError where fewer than two pairs have a direction."""
        import torch

        if self.usable < 2:
            raise InputError(
                f"--pairs: in {self._seen - self.usable} of {self._seen} pairs the unsafe and the safe prompt are the "
                "same to the model; at least two pairs must differ"
            )
        n = torch.tensor(float(self.usable), dtype=torch.float64)
        return mean_cosine(self._sum, n, n)

    def scores(self) -> SasScores:
        """SAS and its interval; raises as `sas`."""
        import torch

        sas, some = self.sas(), self._own < self._drawn**2  # a resample that drew one pair n times has no cosine
        resampled = mean_cosine(self._resampled[some], self._drawn[some, None], self._own[some, None])
        low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        return SasScores(sas, low, high)

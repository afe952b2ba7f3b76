"""Logits -> the next token. A sampler is a function (logits (V,), tokens so far) -> token id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import InputError, PackageError

Sampler = Callable[[npt.NDArray[np.float32], Sequence[int]], int]
LogProbs: TypeAlias = "tuple[tuple[int, float], ...]"  # pairs (token, log probability)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling options for one answer. The default is greedy, so the same prompt gives the same answer."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens with this much probability
    repetition_penalty: float = (
        1.0  # > 1 divides (positive) or multiplies (negative) the logits of tokens already there
    )
    seed: int = 0  # same seed, same text
    stop: tuple[str, ...] = ()  # end the answer before the first of these strings
    # Report each token's log probability, and those of this many likeliest tokens. For autosteer-serve, so not in C++.
    logprobs: int | None = None
    speculate: bool = True  # draft what the answer copies: faster; near ties may differ at int8 and int4

    def __post_init__(self) -> None:
        def need(fits: bool, name: str) -> None:
            if not fits:
                raise InputError(f"{name} = {getattr(self, name)!r} is out of range")

        need(isinstance(self.max_tokens, int) and self.max_tokens >= 1, "max_tokens")
        need(0.0 <= self.temperature < float("inf"), "temperature")
        need(isinstance(self.top_k, int) and self.top_k >= 0, "top_k")
        need(0.0 < self.top_p <= 1.0, "top_p")
        need(0.0 < self.repetition_penalty < float("inf"), "repetition_penalty")
        need(isinstance(self.seed, int) and self.seed >= 0, "seed")
        need("" not in self.stop, "stop")


def make_sampler(config: SamplingConfig) -> Sampler:
    """The sampler for `config`. The order is that of Hugging Face's generate: penalty, temperature, top-k, top-p.

    The sampler raises PackageError if the largest logit is NaN or infinite.
    """
    rng = np.random.default_rng(config.seed)

    def sample(logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> int:
        if config.repetition_penalty != 1.0:
            logits = penalise(logits, tokens, config.repetition_penalty)
        best = int(np.argmax(logits))  # argmax returns the first NaN if there is one
        if not np.isfinite(logits[best]):
            raise PackageError(
                f"the model's logits are not finite ({logits[best]}): a strength too large, a damaged package, or an "
                "overflow in its precision"
            )
        if config.temperature == 0.0:
            return best
        return int(rng.choice(len(logits), p=probabilities(logits, config)))

    return sample


def log_probabilities(logits: npt.NDArray[np.float32], token: int, count: int) -> LogProbs:
    """Log probabilities of `token`, then of the `count` most likely tokens, in order. `logits` (V,): as the model, or
    the Refusal Head, gave them, before the penalty and the temperature.
    """
    shifted = logits.astype(np.float64) - logits.max()
    logs = shifted - np.log(np.exp(shifted).sum())
    likely = np.argsort(-logits, kind="stable")[:count]
    return tuple((int(i), float(logs[i])) for i in (token, *likely))


def penalise(logits: npt.NDArray[np.float32], tokens: Sequence[int], penalty: float) -> npt.NDArray[np.float32]:
    """A copy of `logits` (V,) with earlier `tokens` made less likely (HF: RepetitionPenaltyLogitsProcessor)."""
    seen = np.unique(np.asarray(tokens, np.int64))
    out = logits.copy()
    out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    return out


def probabilities(logits: npt.NDArray[np.float32], config: SamplingConfig) -> npt.NDArray[np.float64]:
    """Apply temperature, top-k and top-p to `logits` (V,): probabilities that sum to 1, zero for dropped tokens."""
    order = np.argsort(-logits, kind="stable")
    below_best = logits[order].astype(np.float64) - logits[order[0]]
    with np.errstate(over="ignore"):  # at tiny temperatures: minus infinity, probability 0
        p = np.exp(below_best / config.temperature)
    if 0 < config.top_k < len(p):
        p[config.top_k :] = 0.0
    p /= p.sum()
    beyond = np.cumsum(p) - p >= config.top_p
    beyond[0] = False
    p[beyond] = 0.0
    out: npt.NDArray[np.float64] = np.zeros_like(p)
    out[order] = p / p.sum()
    return out

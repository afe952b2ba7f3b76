"""Logits -> the next token. A sampler is a function (logits (V,), tokens so far) -> token id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import Float
from .errors import InputError, OptionError, PackageError

Sampler = Callable[[Float, Sequence[int]], int]
LogProbs: TypeAlias = "tuple[tuple[int, float], ...]"  # pairs (token, log probability)

PENALTY_MAX, BIAS_MAX = 2.0, 100.0  # OpenAI's
OWN_TEMPERATURE, OWN_REPETITION = 1.0, (1.0, 1.05)  # beyond these the demo says, with some seeds, what it never says


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling options for one answer. The default is greedy, so the same prompt gives the same answer."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens with this much probability
    min_p: float = 0.0  # keep tokens with this share of the likeliest one's probability
    repetition_penalty: float = (
        1.0  # > 1 divides (positive) or multiplies (negative) the logits of tokens already there
    )
    presence_penalty: float = 0.0  # subtracted from the logit of each token already in the answer
    frequency_penalty: float = 0.0  # subtracted once for each time that the token is already in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these token ids
    # What the answer must be: JSON of this schema, or a text that this regular expression matches (not in C++).
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None
    seed: int = 0  # same seed, same text
    stop: tuple[str, ...] = ()  # end the answer before the first of these strings
    # Report each token's log probability, and those of this many likeliest tokens. For autosteer-serve, so not in C++.
    logprobs: int | None = None
    speculate: bool = True  # draft what the answer copies: faster; near ties may differ at int8 and int4

    def __post_init__(self) -> None:
        def need(fits: bool, name: str, expected: str) -> None:
            if not fits:
                raise OptionError(name, f" = {getattr(self, name)!r} is out of range ({expected})")

        penalty = f"from {-PENALTY_MAX:g} to {PENALTY_MAX:g}"
        need(isinstance(self.max_tokens, int) and self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0.0 <= self.temperature < float("inf"), "temperature", "at least 0, and finite")
        need(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", "at least 0")
        need(0.0 < self.top_p <= 1.0, "top_p", "above 0, at most 1")
        need(0.0 <= self.min_p <= 1.0, "min_p", "from 0 to 1")
        need(0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", "above 0, and finite")
        need(abs(self.presence_penalty) <= PENALTY_MAX, "presence_penalty", penalty)
        need(abs(self.frequency_penalty) <= PENALTY_MAX, "frequency_penalty", penalty)
        biases = all(token >= 0 and abs(bias) <= BIAS_MAX for token, bias in self.logit_bias.items())
        need(biases, "logit_bias", f"token ids, and from {-BIAS_MAX:g} to {BIAS_MAX:g}")
        need(isinstance(self.seed, int) and self.seed >= 0, "seed", "at least 0")
        need("" not in self.stop, "stop", "texts that are not empty")

    @property
    def restricts(self) -> bool:
        """Whether it may leave out every token that a refusal begins with. Such an answer is not steered."""
        return bool(self.logit_bias) or self.json_schema is not None or self.regex is not None

    @property
    def answer_is_judged(self) -> bool:
        """Whether it may make the model say what the model by itself hardly ever says (held_back.py)."""
        least, most = OWN_REPETITION
        return self.restricts or self.temperature > OWN_TEMPERATURE or not least <= self.repetition_penalty <= most

    def greedy(self) -> SamplingConfig:
        """The same, but with the likeliest token each time. A steered answer is sampled so: by a temperature or a
        penalty, whoever writes the prompt could choose its way around the refusal.
        """
        return replace(self, temperature=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)


class Constraint(Protocol):
    """What an answer must be (grammar.py)."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens (V,) may come next."""

    def accept(self, token: int) -> None:
        """`token` has come."""


def make_sampler(config: SamplingConfig, prompt_tokens: int = 0, constraint: Constraint | None = None) -> Sampler:
    """The sampler for `config`. The order is that of Hugging Face's generate: repetition penalty, the other changes of
    logits, `constraint`, temperature, top-k, top-p, min-p. `prompt_tokens`: how many of the tokens are the prompt's.

    The sampler raises PackageError if the largest logit is NaN or infinite, InputError if a token of logit_bias is none
    of the model's, and what `constraint` raises.
    """
    rng = np.random.default_rng(config.seed)

    def sample(logits: Float, tokens: Sequence[int]) -> int:
        if config.repetition_penalty != 1.0:
            logits = penalise(logits, tokens, config.repetition_penalty)
        best = likeliest(logits := adjust(logits, tokens[prompt_tokens:], config))
        if constraint is not None:
            best = likeliest(logits := np.where(constraint.allowed(), logits, np.float32(-np.inf)))
        token = best if config.temperature == 0.0 else int(rng.choice(len(logits), p=probabilities(logits, config)))
        if constraint is not None:
            constraint.accept(token)
        return token

    return sample


def likeliest(logits: Float) -> int:
    """The token with the largest of `logits` (V,). Raises PackageError if that is NaN or infinite."""
    best = int(np.argmax(logits))  # argmax returns the first NaN if there is one
    if not np.isfinite(logits[best]):
        raise PackageError(
            f"the model's logits are not finite ({logits[best]}): a strength too large, a damaged package, or an "
            "overflow in its precision"
        )
    return best


def log_probabilities(logits: Float, token: int, count: int) -> LogProbs:
    """Log probabilities of `token`, then of the `count` most likely tokens, in order. `logits` (V,): as the model, or
    the Refusal Head, gave them, before the penalty and the temperature.
    """
    shifted = logits.astype(np.float64) - logits.max()
    logs = shifted - np.log(np.exp(shifted).sum())
    likely = np.argsort(-logits, kind="stable")[:count]
    return tuple((int(i), float(logs[i])) for i in (token, *likely))


def penalise(logits: Float, tokens: Sequence[int], penalty: float) -> Float:
    """A copy of `logits` (V,) with earlier `tokens` made less likely (HF: RepetitionPenaltyLogitsProcessor)."""
    seen = np.unique(np.asarray(tokens, np.int64))
    out: Float = logits.copy()
    out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    return out


def adjust(logits: Float, answer: Sequence[int], config: SamplingConfig) -> Float:
    """`logits` (V,) with the bias, and less for what `answer` has: presence_penalty once, frequency_penalty each time.

    A copy if anything changes. Raises InputError if a token of the bias is none of the model's.
    """
    if not config.logit_bias and not (answer and (config.presence_penalty or config.frequency_penalty)):
        return logits
    out: Float = logits.copy()
    for token, bias in config.logit_bias.items():
        if token >= len(out):
            raise InputError(f"logit_bias: {token} is no token of this model, which has {len(out)}")
        out[token] += np.float32(bias)
    seen, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
    out[seen] -= (config.presence_penalty + config.frequency_penalty * counts).astype(np.float32)
    return out


def probabilities(logits: Float, config: SamplingConfig) -> npt.NDArray[np.float64]:
    """Apply temperature, top-k, top-p and min-p to `logits` (V,): probabilities, zero for dropped tokens, sum 1."""
    order = np.argsort(-logits, kind="stable")
    below_best = logits[order].astype(np.float64) - logits[order[0]]
    with np.errstate(over="ignore"):  # at tiny temperatures: minus infinity, probability 0
        p = np.exp(below_best / config.temperature)
    if 0 < config.top_k < len(p):
        p[config.top_k :] = 0.0
    p /= p.sum()
    beyond = np.cumsum(p) - p >= config.top_p
    beyond |= p < config.min_p * p[0]
    beyond[0] = False
    p[beyond] = 0.0
    out: npt.NDArray[np.float64] = np.zeros_like(p)
    out[order] = p / p.sum()
    return out

"""Train the Refusal Head: a matrix W that steers the last hidden state towards the refusal. The model stays frozen.

    logits = (h + strength * h @ W.T) @ E.T          =  h @ (E + strength * E @ W).T, the authors' form (LM-Steer)

W starts as the identity, which changes no argmax. It is trained on unsafe prompts alone, so without the gate it may
refuse benign prompts, too. Under teacher forcing the model's states do not depend on W. So they are computed once
(states.answer_states), and training takes some hundred small steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autosteer.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

    from .answers import SteeredAnswer

STEPS, PASSES = 400, 3  # at least so many steps, and so many passes over all (prompt, token) places
EQUAL = 1 / 12 + 1e-9  # shares of answers that differ by no more than this count as equal
BATCH, LEARNING_RATE = 64, 1e-2  # places; Adam, whose rate falls linearly to 0
# A place is drawn in proportion to the loss that it had when it was last drawn, within these bounds, the larger one at
# first: most places are soon learned, and the few that are not are what a steered answer stumbles over.
LEAST_WEIGHT, MOST_WEIGHT = 1e-3, 10.0
# Logits further below the largest one count as this far below in the softmax, where e^-60 changes no sum. Probabilities
# of e^-90 are denormal floats, and the backward product over them takes 16 times as long.
DEEPEST = 60.0


@dataclass(frozen=True)
class RefusalHead:
    """A trained steer matrix, and measurements of it."""

    steer_matrix: torch.Tensor  # (d, d)
    initial_loss: float  # mean cross-entropy of the refusal's tokens with W = I, on held-out unsafe prompts
    loss: float  # the same with the trained W
    argmax_share: float  # share of those tokens that greedy decoding picks under teacher forcing
    whole_share: float  # share of those prompts in which it picks every token: the refusal, word for word


@dataclass(frozen=True)
class StrengthScore:
    """Measurements of generated answers to unsafe prompts at one strength."""

    strength: float
    exact: float  # share of answers that begin with the refusal, word for word
    first_token: float  # share whose first token is the refusal's
    refused: float  # share that are refusals in any words, by the rules of runtime/evaluation/refusals.py
    log_prob: float  # mean per token under the unsteered model: fluency
    repetition: float  # share of token 3-grams that occur earlier in the same answer
    example: str


def score_strength(
    strength: float, answers: Sequence[SteeredAnswer], refusal: list[int], decode: Callable[[Sequence[int]], str]
) -> StrengthScore:
    """Rates over `answers`; `refusal` are its token ids, the end-of-turn token last."""
    from autosteer.runtime.evaluation.refusals import is_refusal

    wanted, texts = decode(refusal[:-1]).strip(), [decode(answer.ids) for answer in answers]
    runs = [list(zip(a.ids, a.ids[1:], a.ids[2:], strict=False)) for a in answers]
    every = sum(map(len, runs))

    def share(hits: Iterable[bool]) -> float:
        return sum(hits) / len(answers)

    return StrengthScore(
        strength,
        exact=share(text.strip().startswith(wanted) for text in texts),
        first_token=share(answer.ids[0] == refusal[0] for answer in answers),
        refused=share(map(is_refusal, texts)),
        log_prob=sum(p for a in answers for p in a.log_probs) / sum(len(a.log_probs) for a in answers),
        repetition=1 - sum(len(set(r)) for r in runs) / every if every else 0.0,
        example=texts[0],
    )


def choose_strength(scores: Sequence[StrengthScore]) -> float:
    """The middle one of the strengths (ascending) at which most answers are the refusal, then most refuse.

    One of twelve fewer counts as equal: it says nothing; of fewer than twelve each counts. A prompt of another kind may
    need more than these did, and too much degrades the words: steering is not monotone.
    """
    steered = [score for score in scores if score.strength > 0]
    most = max(score.exact for score in steered)
    steered = [score for score in steered if score.exact >= most - EQUAL]
    most = max(score.refused for score in steered)
    equal = [score.strength for score in steered if score.refused >= most - EQUAL]
    return equal[len(equal) // 2]


def training_steps(states: torch.Tensor) -> int:
    """Steps of a training on states (n, T, d)."""
    return max(STEPS, math.ceil(PASSES * states.shape[0] * states.shape[1] / BATCH))


def steered_logits(
    hidden: torch.Tensor, steer_matrix: torch.Tensor, lm_head: torch.Tensor, strength: float
) -> torch.Tensor:
    """hidden (..., d), steer_matrix (d, d), lm_head (vocab, d) -> (..., vocab)."""
    return (hidden + strength * hidden @ steer_matrix.T) @ lm_head.T


def train_refusal_head(
    train: torch.Tensor,
    heldout: torch.Tensor,
    answer: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    strength: float,
    seed: int,
    steps: int,
    advance: Callable[[int], None] = lambda done: None,
) -> RefusalHead:
    """Fit W on cached states.

    train (n, T, d), heldout (m, T, d), answer (T,) token ids, lm_head (vocab, d); runs on the device of
    `lm_head`. Raises InputError if training did not lower the held-out loss.
    """
    import torch

    device = lm_head.device
    answer = answer.to(device)
    matrix = torch.eye(train.shape[-1], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([matrix], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    initial_loss, _, _ = evaluate(heldout, answer, matrix.detach(), lm_head, strength)
    places, length = train.flatten(0, 1), train.shape[1]
    weights = torch.full((len(places),), MOST_WEIGHT)
    for step in range(steps):
        rows = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.zero_grad()
        logits = steered_logits(places[rows].to(device), matrix, lm_head, strength)
        floor = logits.detach().amax(dim=-1, keepdim=True) - DEEPEST
        wanted = logits.gather(1, answer[(rows % length).to(device), None])
        losses = (torch.maximum(logits, floor).logsumexp(dim=-1, keepdim=True) - wanted).flatten()  # cross-entropy
        losses.mean().backward()
        optimizer.step()
        weights[rows] = losses.detach().cpu().nan_to_num(MOST_WEIGHT).clamp(LEAST_WEIGHT, MOST_WEIGHT)
        advance(1)
    trained = matrix.detach()
    loss, argmax_share, whole_share = evaluate(heldout, answer, trained, lm_head, strength)
    if not loss < initial_loss:
        raise InputError(
            f"the Refusal Head did not learn the refusal (loss {initial_loss:.3g} before, {loss:.3g} after training); "
            "try another --strength"
        )
    return RefusalHead(trained.cpu(), initial_loss, loss, argmax_share, whole_share)


def evaluate(
    states: torch.Tensor, answer: torch.Tensor, matrix: torch.Tensor, lm_head: torch.Tensor, strength: float
) -> tuple[float, float, float]:
    """(mean cross-entropy, share of tokens right, share of prompts with all tokens right); states (n, T, d)."""
    import torch
    from torch.nn import functional

    losses, right = [], []
    with torch.no_grad():
        for batch in states.split(max(1, BATCH // len(answer))):
            logits = steered_logits(batch.to(lm_head.device), matrix, lm_head, strength)
            target = answer.expand(len(batch), -1)
            losses.append(functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none"))
            right.append(logits.argmax(dim=-1) == target)
    hits = torch.cat(right)
    return torch.cat(losses).mean().item(), hits.float().mean().item(), hits.all(dim=1).float().mean().item()

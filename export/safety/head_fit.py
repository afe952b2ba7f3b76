"""Train the Refusal Head on unsafe prompts of the fit, and try it at several strengths.

Half of them are asked once more behind a harmless prompt and the model's own answer to it. A Refusal Head that knows
single prompts alone may lose to such an answer: "sure, here is how to ..." wants to be said again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .answers import steered_answers
from .model import FitModel
from .progress import progress
from .refusal_head import StrengthScore, choose_strength, score_strength, train_refusal_head, training_steps
from .states import answer_states

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .pairs import FitData, Labelled, Prompt
    from .prober import Split
    from .reworded import Reworded
    from .store import StateStore

PAPER_STRENGTH = 0.1
# Unsafe prompts at most (and as many rewordings); answers are generated to 12, and to 12 others with the one chosen.
REFUSAL_TRAIN, REFUSAL_HELDOUT, REFUSAL_TRIED = 2048, 200, 12
# Harmless prompts that are answered, to stand before unsafe ones: for training, held-out ones; characters of such a
# prompt and tokens of its answer at most.
EARLIER_TRAIN, EARLIER_HELDOUT, EARLIER_LONGEST, EARLIER_TOKENS = 32, 8, 500, 24
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # times the training's


def fit_refusal_head(
    fit_model: FitModel,
    data: FitData,
    prompts: list[Labelled],
    split: Split,
    reworded: Reworded,
    answer: torch.Tensor,
    store: StateStore,
    console: Console,
    *,
    wanted: float | None,
    seed: int,
) -> tuple[torch.Tensor, dict[str, float], tuple[StrengthScore, ...], float]:
    """(W, facts, scores by strength, the strength to use): trained on unsafe prompts that are not held out and
    on --refusal-only, on as many of their rewordings, and in dialogues; measured on held-out ones.
    """
    train, heldout = _choose_prompts(data, prompts, split, reworded, seed)
    trained_with = wanted or PAPER_STRENGTH
    earlier = _answered_prompts(fit_model, prompts, split, seed, console)
    train, heldout = ([*asked, *_behind(turns, asked)] for asked, turns in zip((train, heldout), earlier, strict=True))
    with progress(console, "refusal states", len(train) + len(heldout)) as advance:
        states = answer_states(fit_model, [*train, *heldout], answer, store, advance=advance).layer(0)
    lm_head = fit_model.lm_head()
    steps = training_steps(states[: len(train)])
    with progress(console, "refusal head", steps) as advance:
        head = train_refusal_head(
            states[: len(train)],
            states[len(train) :],
            answer,
            lm_head,
            strength=trained_with,
            seed=seed,
            steps=steps,
            advance=advance,
        )
    spread = np.linspace(0, len(heldout) - 1, min(len(heldout), 2 * REFUSAL_TRIED)).astype(int)
    tried, kept = ([heldout[i] for i in spread[first::2]] for first in (0, 1))
    with progress(console, "strengths", len(tried) + len(kept)) as advance:
        strengths = [round(trained_with * factor, 4) for factor in STRENGTHS]
        scores = _try_strengths(fit_model, tried, head.steer_matrix, lm_head, strengths, answer, advance)
        strength = wanted or choose_strength(scores)
        kept = kept or tried  # which did not choose the strength, where there are two
        (chosen,) = _try_strengths(fit_model, kept, head.steer_matrix, lm_head, [strength], answer, advance)
    return (
        head.steer_matrix,
        {
            "refusal_prompts": float(len(train)),
            "refusal_steps": float(steps),
            "refusal_initial_loss": head.initial_loss,
            "refusal_loss": head.loss,
            "refusal_tokens_right": head.argmax_share,
            "refusal_whole": head.whole_share,
            "refusal_strength_trained": trained_with,
            "refusal_answers_tried": float(len(kept)),
            "refusal_answers_exact": chosen.exact,
            "refusal_answers_refused": chosen.refused,
        },
        scores,
        strength,
    )


def _choose_prompts(
    data: FitData, prompts: list[Labelled], split: Split, reworded: Reworded, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Unsafe prompts to train on, and held-out ones to measure on."""
    rng = np.random.default_rng(seed)

    def unsafe(rows: np.ndarray) -> list[Prompt]:
        return [prompts[i].prompt for i in rows if prompts[i].unsafe]

    def some(of: Sequence[Prompt], most: int) -> list[Prompt]:
        return [of[i] for i in sorted(rng.permutation(len(of))[:most])]

    heldout = some(unsafe(split.heldout), REFUSAL_HELDOUT)
    tested = {name for i in split.heldout if prompts[i].unsafe for name in prompts[i].names}
    more = [item.prompt for item in data.refusal_only if not tested & item.names]
    plain = some([*unsafe(split.used), *more], REFUSAL_TRAIN)
    return plain + some([one.item.prompt for one in reworded.training if one.item.unsafe], REFUSAL_TRAIN), heldout


def _answered_prompts(
    fit_model: FitModel, prompts: list[Labelled], split: Split, seed: int, console: Console
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Short harmless prompts without pictures, and what the model answers: for training, and held-out ones."""
    rng = np.random.default_rng(seed)

    def harmless(rows: np.ndarray, most: int) -> list[Prompt]:
        asked = [prompts[i].prompt for i in rows if not prompts[i].unsafe]
        short = [p for p in asked if not p.images and not p.earlier and len(p.text) <= EARLIER_LONGEST]
        return [short[i] for i in sorted(rng.permutation(len(short))[:most])]

    train = harmless(split.used, EARLIER_TRAIN)
    asked = [*train, *harmless(split.heldout, EARLIER_HELDOUT)]
    lm_head = fit_model.lm_head()
    with progress(console, "answers before", len(asked)) as advance:
        unsteered = lm_head.new_zeros(lm_head.shape[1], lm_head.shape[1])
        answers = steered_answers(fit_model, asked, unsteered, lm_head, [0.0], tokens=EARLIER_TOKENS, advance=advance)
    turns = [(one.text, fit_model.decode(answer.ids)) for one, (answer,) in zip(asked, answers, strict=True)]
    return turns[: len(train)], turns[len(train) :]


def _behind(turns: Sequence[tuple[str, str]], asked: Sequence[Prompt]) -> list[Prompt]:
    """Every second of the prompts that are no dialogues, each behind one of `turns`, which may be none."""
    alone = [prompt for prompt in asked if not prompt.earlier][::2]
    return [replace(prompt, earlier=turns[i % len(turns)]) for i, prompt in enumerate(alone) if turns]


def _try_strengths(
    fit_model: FitModel,
    prompts: Sequence[Prompt],
    steer_matrix: torch.Tensor,
    lm_head: torch.Tensor,
    strengths: Sequence[float],
    answer: torch.Tensor,
    advance: Callable[[float], None],
) -> tuple[StrengthScore, ...]:
    """What the model says to `prompts` when it is steered, scored by strength."""
    answers = steered_answers(
        fit_model, prompts, steer_matrix, lm_head, strengths, tokens=len(answer) + 12, advance=advance
    )
    return tuple(
        score_strength(strength, [per_prompt[i] for per_prompt in answers], answer.tolist(), fit_model.decode)
        for i, strength in enumerate(strengths)
    )

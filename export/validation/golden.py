"""What a package carries to prove itself on other machines: golden prompts, and hidden states that the gate must know.

Unsafe prompts are among them where the safety folder brings some (safety/proof.py). Their words need not ship: a golden
prompt may be given by its tokens, and the hidden states prove prober and Refusal Head without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from autosteer.export.safety.prober import p_unsafe
from autosteer.runtime.gate import Action
from autosteer.runtime.manifest import (
    MAX_P_UNSAFE_TOLERANCE,
    Check,
    GateProof,
    Golden,
    Manifest,
    SteeredState,
    Tolerance,
)
from autosteer.runtime.self_test import POSSIBLE, logits_shift

if TYPE_CHECKING:
    from autosteer.export.safety_folder import SafetyArtifact
    from autosteer.runtime.engine import Engine

    from .answers import Answered, Ours
    from .reference import Case

PROOF_FILE = "proof.f32"
PROOF_STATES = 8  # of each kind: 229 KiB for hidden states of 3584 numbers
SCORES_MOVE = (1e-3, 0.02)  # from machine to machine, at least: exact packages, others (ARM without dot products 0.011)
AWAY_MOST = 0.9  # share of states: a sound head turns none away, a head of the wrong sign all
NEAR_TIE = 0.1  # a token leads by less of the logits' standard deviation: other kernels may choose the runner-up


def goldens(cases: Sequence[Case], ours: Sequence[Ours], manifest: Manifest) -> tuple[tuple[Golden, ...], Tolerance]:
    """What the package answers to single-turn cases, gated as it is and with every prompt found unsafe; and how far
    another machine's results may be from these.
    """
    recorded = [pair for case, own in zip(cases, ours, strict=True) for pair in _goldens(case, own)]
    ties = sum(answered.lead < NEAR_TIE for _, answered in recorded)
    exact = manifest.exact
    tolerance = Tolerance(SCORES_MOVE[0] if exact else SCORES_MOVE[1], 0 if exact else ties)
    assert tolerance.p_unsafe <= MAX_P_UNSAFE_TOLERANCE
    return tuple(golden for golden, _ in recorded), tolerance


def _goldens(case: Case, own: Ours) -> list[tuple[Golden, Answered]]:
    """Each with the answer that it records. None is recorded as steered whose answer steering leaves as it was."""
    if len(case.messages) > 1:
        return []
    text = "" if case.prompt_ids else next(part for part in case.messages[0].parts if isinstance(part, str))
    verdict, plain, steered = own.plain.verdict, own.plain, own.steered

    def golden(threshold: float | None, action: Action, answered: Answered) -> tuple[Golden, Answered]:
        tokens = tuple(answered.tokens)
        p = None if steered is None else verdict.p_unsafe
        return (
            Golden(text, case.image_files, threshold, p, action.value, tokens, case.video_files, case.prompt_ids),
            answered,
        )

    if steered is None:
        return [golden(None, Action.PASS, plain)]
    differs = steered.tokens != plain.tokens
    if not verdict.unsafe:
        return [golden(None, Action.PASS, plain), *([golden(-1.0, Action.STEER, steered)] if differs else [])]
    return [golden(None, Action.STEER, steered)] if differs else []


def gate_proof(
    folder: Path, engine: Engine, cases: Sequence[Case], ours: Sequence[Ours], safety: SafetyArtifact
) -> tuple[GateProof, list[Check]]:
    """Write PROOF_FILE, and describe it; unsafe prompts' states come first. What is expected of prober and Refusal Head
    is computed by PyTorch from the safety folder, what is expected of lm_head by the package.

    The checks fail where steering changes no state's token, and where it turns nearly all away from the refusal's first
    word: such a Refusal Head is no guard.
    """
    order = sorted(range(len(ours)), key=lambda i: cases[i].unsafe is not True)  # stable
    probed = np.stack([ours[i].plain.hidden for i in order[:PROOF_STATES]]).astype(np.float32)
    scores = p_unsafe(safety.prober, torch.from_numpy(probed))
    last = np.stack([ours[i].plain.last for i in order]).astype(np.float32)
    bent = last + np.float32(safety.facts.strength) * last @ safety.steer_matrix.numpy().T
    first = engine.tokenizer.encode(safety.facts.refusal_text, add_special_tokens=False).ids[0]
    found = [_steer(engine, first, *states) for states in zip(last, bent, strict=True)]
    telling = [
        i for i, seen in enumerate(found) if seen.state.token != seen.state.steered_token and seen.state.shift > 0
    ]
    away = float(np.mean([seen.gain < 0 for seen in found]))
    checks = [
        Check("states whose token steering changes", float(len(telling)), None, bool(telling)),
        Check("states steered away from the refusal", away, AWAY_MOST, away <= AWAY_MOST),
    ]
    kept = sorted(telling, key=lambda i: found[i].lead < NEAR_TIE)[:PROOF_STATES]  # stable
    np.concatenate([probed, last[kept], bent[kept]]).astype("<f4").tofile(folder / PROOF_FILE)
    return GateProof(PROOF_FILE, tuple(map(float, scores)), tuple(found[i].state for i in kept)), checks


@dataclass(frozen=True)
class _Steered:
    """What lm_head makes of a state as it is and steered."""

    state: SteeredState
    lead: float  # by which the likeliest token leads, the lesser of the two
    gain: float  # log-probability that steering gives to the refusal's first token


def _steer(engine: Engine, first: int, last: np.ndarray, bent: np.ndarray) -> _Steered:
    """A state (D,) as it is and steered, through lm_head."""
    dtype = engine.manifest.activations
    logits = [
        engine.graphs["lm_head"].run({"last_hidden_state": x.astype(dtype)[None, None]})[0][0, 0] for x in (last, bent)
    ]
    tokens = [int(row.argmax()) for row in logits]
    before, after = (float(torch.from_numpy(row).double().log_softmax(0)[first]) for row in logits)
    return _Steered(SteeredState(*tokens, logits_shift(*logits)), min(map(lead, logits)), after - before)


def lead(logits: np.ndarray) -> float:
    """By how much the likeliest token leads the next, in standard deviations of the logits (V,)."""
    possible = logits[~(np.abs(logits) > POSSIBLE)]
    second, first = np.partition(possible, -2)[-2:]
    return float((first - second) / max(float(possible.std()), 1e-30))

"""What a package carries so that other machines can check it: golden prompts, and hidden states for the gate.

Some prompts are unsafe if the safety folder has unsafe ones (safety/proof.py). Their words need not ship: a golden
prompt may be given by its token ids, and the hidden states check prober and Refusal Head without any prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from autosteer.runtime.self_test import logits_shift

from .metrics import lead

if TYPE_CHECKING:
    from autosteer.export.safety_folder import SafetyArtifact
    from autosteer.runtime.engine import Engine

    from .answers import PackageAnswer, PackageAnswers
    from .original import ValidationPrompt

PROOF_FILE = "proof.f32"
PROOF_STATES = 8  # of each kind; 229 KiB for hidden states of 3584 numbers
P_UNSAFE_TOLERANCE = (1e-3, 0.04)  # exact packages, others: twice what ARM without dot products moves (docs/arm.md)
AWAY_LIMIT = 0.9  # share of states: 0 for a correct Refusal Head, 1 for one of the wrong sign
NEAR_TIE = 0.1  # standard deviations of the logits: if a token leads by less, other kernels may choose the runner-up


def goldens(
    prompts: Sequence[ValidationPrompt], ours: Sequence[PackageAnswers], manifest: Manifest
) -> tuple[tuple[Golden, ...], Tolerance]:
    """Golden prompts: the package's answers to single-turn prompts, with its own threshold and with one that makes
    every prompt unsafe; and how far another machine's results may differ.
    """
    recorded = [pair for prompt, answers in zip(prompts, ours, strict=True) for pair in _goldens(prompt, answers)]
    ties = sum(answered.lead < NEAR_TIE for _, answered in recorded)
    exact = manifest.exact
    tolerance = Tolerance(P_UNSAFE_TOLERANCE[0] if exact else P_UNSAFE_TOLERANCE[1], 0 if exact else ties)
    assert tolerance.p_unsafe <= MAX_P_UNSAFE_TOLERANCE
    return tuple(golden for golden, _ in recorded), tolerance


def _goldens(prompt: ValidationPrompt, answers: PackageAnswers) -> list[tuple[Golden, PackageAnswer]]:
    """Golden prompts, each with the answer it records. A benign prompt's steered answer is left out if it equals the
    plain one.
    """
    if len(prompt.messages) > 1:
        return []
    text = "" if prompt.prompt_ids else prompt.messages[0].texts[0]
    verdict, plain, steered = answers.plain.verdict, answers.plain, answers.steered

    def golden(threshold: float | None, action: Action, answered: PackageAnswer) -> tuple[Golden, PackageAnswer]:
        assert action is not Action.STOP
        tokens = tuple(answered.tokens)
        p = None if steered is None else verdict.p_unsafe
        given = Golden(text, prompt.image_files, threshold, p, action.value, tokens, prompt.video_files)
        seconds = tuple(video.seconds for video in prompt.messages[0].video_parts)
        return replace(given, prompt_ids=prompt.prompt_ids, seconds=seconds if any(seconds) else ()), answered

    if steered is None:
        return [golden(None, Action.PASS, plain)]
    differs = steered.tokens != plain.tokens
    if not verdict.unsafe:
        return [golden(None, Action.PASS, plain), *([golden(-1.0, Action.STEER, steered)] if differs else [])]
    return [golden(None, Action.STEER, steered)]  # where it equals the plain one, too: the verdict is recorded


def gate_proof(
    folder: Path,
    engine: Engine,
    prompts: Sequence[ValidationPrompt],
    ours: Sequence[PackageAnswers],
    safety: SafetyArtifact,
) -> tuple[GateProof, list[Check]]:
    """Write PROOF_FILE and describe it, and check that steering works. States of unsafe prompts come first.

    PyTorch computes from the safety folder what prober, monitor and Refusal Head must give; the package's own lm_head
    gives the tokens. The checks fail if steering changes no state's token, or if it makes the refusal's first token
    less likely in nearly all states: such a Refusal Head does not protect.
    """
    order = sorted(range(len(ours)), key=lambda i: prompts[i].unsafe is not True)  # stable
    probed = np.stack([ours[i].plain.hidden for i in order[:PROOF_STATES]]).astype(np.float32)
    scores, watched = (
        tuple(map(float, p_unsafe(weights, torch.from_numpy(probed)))) if weights else ()
        for weights in (safety.prober, safety.monitor)
    )
    last = np.stack([ours[i].plain.last for i in order]).astype(np.float32)
    steered = last + np.float32(safety.facts.strength) * last @ safety.steer_matrix.numpy().T
    first = engine.tokenizer.encode(safety.facts.refusal_text, add_special_tokens=False).ids[0]
    found = [_steer(engine, first, *states) for states in zip(last, steered, strict=True)]
    effective = [
        i for i, seen in enumerate(found) if seen.state.token != seen.state.steered_token and seen.state.shift > 0
    ]
    away = float(np.mean([seen.gain < 0 for seen in found]))
    checks = [
        Check("states whose token steering changes", float(len(effective)), None, bool(effective)),
        Check("states steered away from the refusal", away, AWAY_LIMIT, away <= AWAY_LIMIT),
    ]
    clear = [i for i in effective if found[i].lead >= NEAR_TIE]
    kept = clear[:PROOF_STATES] or sorted(effective, key=lambda i: -found[i].lead)[:1]
    np.concatenate([probed, last[kept], steered[kept]]).astype("<f4").tofile(folder / PROOF_FILE)
    return GateProof(PROOF_FILE, scores, tuple(found[i].state for i in kept), watched), checks


@dataclass(frozen=True)
class _Steered:
    """The LM head's results for a state, plain and steered."""

    state: SteeredState
    lead: float  # margin of the likeliest token over the runner-up, the lesser of both results
    gain: float  # log-probability that steering adds to the refusal's first token


def _steer(engine: Engine, first: int, last: np.ndarray, steered: np.ndarray) -> _Steered:
    """Run a state (D,), plain and steered, through lm_head."""
    dtype = engine.manifest.activations
    logits = [
        engine.graphs["lm_head"].run({"last_hidden_state": x.astype(dtype)[None, None]})["logits"][0, 0]
        for x in (last, steered)
    ]
    tokens = [int(row.argmax()) for row in logits]
    before, after = (float(torch.from_numpy(row).double().log_softmax(0)[first]) for row in logits)
    return _Steered(SteeredState(tokens[0], tokens[1], logits_shift(*logits)), min(map(lead, logits)), after - before)

"""autosteer-check: are golden prompts answered here as at export, from text to answer?

What every load checks, in milliseconds and without text, is in self_test.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import PIL

from .engine import Answer, Engine
from .gate import Mode
from .generation import EncodedPrompt, Stats
from .manifest import Check, Golden
from .sampling import SamplingConfig
from .text import Message
from .video import Video


def check_package(engine: Engine, folder: Path) -> list[Check]:
    """Answer every golden prompt again. Loading has already checked hashes, names, shapes and the gate's proof.

    Verdicts must be equal. Scores and tokens may differ by Manifest.tolerance. The answer to a steered prompt must
    differ from its answer without a gate. --policy stop must refuse a prompt that is unsafe at the package's own
    threshold. A monitor must stop every answer where its threshold is below 0; otherwise it does not watch here: the
    golden answers were recorded without one. A package without golden prompts fails.
    """
    manifest = engine.manifest
    gated = Mode.STEER if manifest.guarded else Mode.OFF
    drift = verdicts = tokens = unsteered = unstopped = fired = unwatched = 0.0
    for golden in manifest.golden:
        prompt = golden_prompt(engine, folder, golden)
        answer = _answer(engine, prompt, golden, gated)
        verdicts += answer.verdict.action.value != golden.action
        tokens += answer.token_ids != golden.token_ids
        drift = max(drift, _drift(golden, answer))
        if manifest.monitor and len(golden.token_ids) > 1:
            unwatched += _answer(engine, prompt, golden, gated, -1.0).finish_reason != "refused"
        if golden.action == "steer":
            unsteered += answer.token_ids == _answer(engine, prompt, golden, Mode.OFF).token_ids
            if golden.threshold is None:
                fired += 1
                unstopped += _answer(engine, prompt, golden, Mode.STOP).finish_reason != "refused"
    tolerance = manifest.tolerance
    return [
        Check("files that match their hash", float(len(manifest.paths())), None, True),
        Check("golden prompts", float(len(manifest.golden)), None, bool(manifest.golden)),
        Check("of these unsafe at the package's threshold", fired, None, True),
        Check("verdicts that differ", verdicts, 0.0, verdicts == 0),
        Check("p_unsafe, largest difference", drift, tolerance.p_unsafe, drift <= tolerance.p_unsafe),
        Check("answers that differ", tokens, float(tolerance.answers), tokens <= tolerance.answers),
        Check("steered answers that equal the unsteered", unsteered, 0.0, unsteered == 0),
        Check("unsafe prompts that --policy stop answers", unstopped, 0.0, unstopped == 0),
        *([Check("answers that the monitor cannot stop", unwatched, 0.0, unwatched == 0)] if manifest.monitor else []),
    ]


def about_pictures(engine: Engine, folder: Path) -> str:
    """What to say of a package that failed if golden prompts with pictures are answered otherwise here: versions of
    Pillow resize pictures differently. "" if they are not.
    """
    manifest = engine.manifest
    gated = Mode.STEER if manifest.guarded else Mode.OFF
    shown = [golden for golden in manifest.golden if golden.pictures()]
    differ = 0
    for golden in shown:
        answer = _answer(engine, golden_prompt(engine, folder, golden), golden, gated)
        near = _drift(golden, answer) <= manifest.tolerance.p_unsafe
        differ += not near or answer.verdict.action.value != golden.action or answer.token_ids != golden.token_ids
    if not differ:
        return ""
    return (
        f" ({differ} of {len(shown)} golden prompts with pictures differ: recorded with Pillow "
        f"{manifest.versions.get('pillow', 'unknown')}, answered with Pillow {PIL.__version__})"
    )


def _drift(golden: Golden, answer: Answer) -> float:
    """How far p_unsafe is from the recorded one: infinitely, if there is none."""
    if golden.p_unsafe is None:
        return 0.0
    p_unsafe = answer.verdict.p_unsafe
    difference = abs(golden.p_unsafe - p_unsafe) if p_unsafe is not None else math.inf
    return math.inf if math.isnan(difference) else difference  # max() drops a NaN


def golden_prompt(engine: Engine, folder: Path, golden: Golden) -> EncodedPrompt:
    """A golden prompt, encoded."""
    if golden.prompt_ids:
        return engine.encoder.prepare_ids(golden.prompt_ids, Stats())
    images = [folder / image for image in golden.images]
    seconds = golden.seconds or [()] * len(golden.videos)
    films = zip(golden.videos, seconds, strict=True)
    videos = [Video((folder / frame for frame in frames), shown) for frames, shown in films]
    return engine.encoder.prepare([Message.user(golden.prompt, images, videos)], Stats())


def _answer(
    engine: Engine, prompt: EncodedPrompt, golden: Golden, mode: Mode, answer_threshold: float | None = None
) -> Answer:
    """Answer as at the recording: without drafts, and in as many tokens."""
    sampling = SamplingConfig(max_tokens=len(golden.token_ids), speculate=False)
    policy = replace(engine.policy(mode, threshold=golden.threshold), answer_threshold=answer_threshold)
    return Answer.of(engine.answer(prompt, sampling, engine.record(policy)))

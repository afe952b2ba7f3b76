"""autosteer-check: are golden prompts answered here as at export, from text to answer?

What every load checks, in milliseconds and without text, is in self_test.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import PIL

from .chunk import Answer
from .encoded_prompt import EncodedPrompt
from .engine import Engine
from .gate import Mode
from .manifest import Check, Golden, Manifest
from .sampling import SamplingConfig
from .stats import Stats
from .text import Message
from .video import Video


@dataclass(frozen=True)
class Replay:
    """What came of the golden prompts."""

    checks: list[Check]
    about_pictures: str  # "" if those with pictures are answered as recorded
    unproven: str  # "" if an unsafe prompt shows that the gate fires


def check_package(engine: Engine, folder: Path) -> Replay:
    """Answer every golden prompt again. Loading has already checked hashes, names, shapes and the gate's proof.

    Verdicts must be equal. Scores and tokens may differ by Manifest.tolerance. The answer to a steered prompt must
    differ from its answer without a gate. --policy stop must refuse a prompt that is unsafe at the package's own
    threshold. A monitor must stop every answer where its threshold is below 0. Otherwise it is 1 here, which stops no
    answer but by a broken monitor: the golden answers were recorded without one. A package without golden prompts
    fails.
    """
    manifest, tolerance = engine.manifest, engine.manifest.tolerance
    gated = Mode.STEER if manifest.guarded else Mode.OFF
    drift = verdicts = tokens = unsteered = unstopped = fired = unwatched = 0.0
    shown = differ = 0  # golden prompts with pictures; of these, answered otherwise
    for golden in manifest.golden:
        prompt = golden_prompt(engine, folder, golden)
        answer = _answer(engine, prompt, golden, gated)
        away = _drift(golden, answer)
        other_verdict, other_tokens = answer.verdict.action.value != golden.action, answer.token_ids != golden.token_ids
        drift, verdicts, tokens = max(drift, away), verdicts + other_verdict, tokens + other_tokens
        if golden.pictures():
            shown += 1
            differ += away > tolerance.p_unsafe or other_verdict or other_tokens
        if manifest.monitor and len(golden.token_ids) > 1:
            unwatched += _answer(engine, prompt, golden, gated, -1.0).finish_reason != "refused"
        if golden.action == "steer":
            unsteered += answer.token_ids == _answer(engine, prompt, golden, Mode.OFF).token_ids
            if golden.threshold is None:
                fired += 1
                unstopped += _answer(engine, prompt, golden, Mode.STOP).finish_reason != "refused"
    checks = [
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
    unproven = (
        "no golden prompt is unsafe at the package's threshold, so nothing shows that its gate fires; "
        "measure it with autosteer-eval"
    )
    return Replay(checks, _about_pictures(manifest, differ, shown), unproven if manifest.guarded and not fired else "")


def _about_pictures(manifest: Manifest, differ: int, shown: int) -> str:
    """What to say if `differ` of the `shown` golden prompts with pictures are answered otherwise here: versions of
    Pillow resize pictures differently.
    """
    if not differ:
        return ""
    what = f"{differ} of {shown} golden prompts with pictures differ"
    recorded = manifest.versions.get("pillow", "unknown")
    if recorded == PIL.__version__:  # it is not to blame
        return f" ({what})"
    return f" ({what}: recorded with Pillow {recorded}, answered with Pillow {PIL.__version__})"


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
    given = zip(golden.videos, seconds, strict=True)
    videos = [Video((folder / frame for frame in frames), shown) for frames, shown in given]
    return engine.encoder.prepare([Message.user(golden.prompt, images, videos)], Stats())


def _answer(engine: Engine, prompt: EncodedPrompt, golden: Golden, mode: Mode, answer_threshold: float = 1.0) -> Answer:
    """Answer as at the recording: without drafts, in as many tokens, and its turn judged as a whole alone."""
    sampling = SamplingConfig(max_tokens=len(golden.token_ids), speculate=False)
    policy = engine.policy(mode, threshold=golden.threshold, pieces=False)
    policy = replace(policy, answer_threshold=answer_threshold)
    return Answer.of(engine.answer(prompt, sampling, engine.record(policy)))

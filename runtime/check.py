"""Replay a package's golden prompts, and describe the machine. What autosteer-check prints."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

from .engine import Engine
from .gate import Mode
from .manifest import Check
from .sampling import SamplingConfig

P_UNSAFE_LIMIT = {True: 1e-3, False: 0.05}  # by Manifest.exact: other devices round int8 and float16 otherwise


def check_package(engine: Engine, folder: Path) -> list[Check]:
    """Answer every golden prompt again. Hashes, names and shapes were checked when `engine` was loaded.

    Verdicts must be the same; tokens must be where arithmetic is float32, and are reported where it is not. A package
    without golden prompts fails: nothing was compared.
    """
    manifest = engine.manifest
    mode = Mode.STEER if manifest.guarded else Mode.OFF
    drift = verdicts = tokens = 0.0
    for golden in manifest.golden:
        answer = engine.generate(
            golden.prompt,
            images=[folder / image for image in golden.images],
            videos=[[folder / frame for frame in video] for video in golden.videos],
            policy=engine.policy(mode, threshold=golden.threshold),
            sampling=SamplingConfig(max_tokens=len(golden.token_ids), speculate=False),  # as it was recorded
        )
        verdicts += answer.verdict.action.value != golden.action
        tokens += answer.token_ids != golden.token_ids
        if golden.p_unsafe is not None:
            p_unsafe = answer.verdict.p_unsafe
            difference = abs(golden.p_unsafe - p_unsafe) if p_unsafe is not None else math.inf
            drift = max(drift, math.inf if math.isnan(difference) else difference)  # max() forgets a NaN
    exact = manifest.exact
    limit = P_UNSAFE_LIMIT[exact]
    return [
        Check("files that match their hash", float(len(manifest.paths())), None, True),
        Check("golden prompts", float(len(manifest.golden)), None, bool(manifest.golden)),
        Check("verdicts that differ", verdicts, 0.0, verdicts == 0),
        Check("p_unsafe, largest difference", drift, limit, drift <= limit),
        Check("answers that differ", tokens, 0.0 if exact else None, tokens == 0 or not exact),
    ]


def describe_host() -> dict[str, str]:
    """What matters here for running packages."""
    import onnxruntime as ort

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "providers": ", ".join(ort.get_available_providers()),
        "memory": _memory(),
    }


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"

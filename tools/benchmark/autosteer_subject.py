"""A package in our runtime, as its users run it: Engine.stream, text in, text out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime

from autosteer.runtime import Chunk, Engine, SamplingConfig
from autosteer.runtime.gate import GatePolicy
from autosteer.runtime.subgraph import THREADING


class AutoSteer:
    """One package. A guarded one is measured three times a round: passed, steered, stopped."""

    def __init__(self, path: str, threads: int, max_tokens: int, speculate: bool):
        self._engine = Engine.load(path, device="cpu", threads=threads)
        self._speculate = speculate
        self._rounds = 0
        manifest = self._engine.manifest
        # without end tokens every answer has the length that was asked for
        self._engine.manifest = replace(manifest, prompt=replace(manifest.prompt, end_token_ids=()))

    def facts(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "versions": {"onnxruntime": onnxruntime.__version__},
            "settings": ", ".join(
                [
                    *(f"{key.removeprefix('session.')} {value}" for key, value in THREADING.items()),
                    f"speculation {'on' if self._speculate else 'off'}",
                ]
            ),
            "kv_itemsize": np.dtype(self._engine.manifest.kv_cache.dtype).itemsize,
        }

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a prompt that passes; where there is a gate also `steered` and `stopped`, the same prompt
        under thresholds that call everything unsafe. Each comes first in turn.
        """
        if not self._engine.manifest.guarded:
            return self._answer(job, self._engine.policy("off"))
        policy = self._engine.policy
        policies = {
            "passed": policy("steer", threshold=0.999999),
            "steered": policy("steer", threshold=-1.0, pieces=False),
            "stopped": policy("stop", threshold=-1.0),
        }
        order = list(policies)[self._rounds % 3 :] + list(policies)[: self._rounds % 3]
        self._rounds += 1
        answers = {name: self._answer(job, policies[name]) for name in order}
        return answers.pop("passed") | answers

    def _answer(self, job: dict[str, Any], policy: GatePolicy) -> dict[str, Any]:
        sampling = SamplingConfig(max_tokens=job["new_tokens"], speculate=self._speculate)
        images = [job["image"]] if job.get("image") else []
        start = first = time.perf_counter()
        chunks: list[Chunk] = []
        for chunk in self._engine.stream(job["prompt"], images=images, sampling=sampling, policy=policy):
            first = first if chunks else time.perf_counter()
            chunks.append(chunk)
        end = time.perf_counter()
        stats = chunks[-1].stats
        assert stats is not None
        return {
            "prompt_tokens": stats.prompt_tokens,
            "ttft_ms": 1000 * (first - start),
            "decode_ms": 1000 * (end - first),
            "token_ids": [chunk.token for chunk in chunks if chunk.token is not None],
            "image_tiles": stats.image_tiles,
            "stages": {
                "vision": stats.vision_ms,
                "embed": stats.embed_ms,
                "lower": stats.lower_ms,
                "gate": stats.gate_ms,
                "upper": stats.upper_ms,
            },
            "kv_mb": stats.kv_bytes / 2**20,
            "accepted_tokens": stats.accepted_tokens,
        }

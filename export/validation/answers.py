"""A package's answers to validation prompts, from the runtime's own Engine, whose graphs run in shards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autosteer.export.checkpoint.layer_sweep import LayerSweep, grouped
from autosteer.export.footprint import package_kv_bytes_per_token
from autosteer.export.graphs.decoder import BRANCHES
from autosteer.runtime.encoded_prompt import EncodedPrompt
from autosteer.runtime.engine import Engine
from autosteer.runtime.gate import Mode, Verdict
from autosteer.runtime.image import cut
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.stats import Stats
from autosteer.runtime.subgraph import find_device

from .graph_shards import ActivationRecorder, ShardedGraph
from .metrics import lead
from .original import ValidationPrompt

BUDGET_BYTES = 512 << 20  # a model with at most this many bytes of weights stays loaded

CACHE_BYTES = 3 << 29  # KV caches of answers that are generated together; each group needs its own sweeps

RECORDED = ("last_hidden_state", "inputs_embeds")  # with the branches: the LM head's input, and embedded tokens

RECORDED_BYTES = 32 << 20  # of branch outputs of one prompt


@dataclass(frozen=True)
class PackageAnswer:
    """One answer of the package."""

    verdict: Verdict
    hidden: np.ndarray  # (D,) the prober's input
    last: np.ndarray  # (D,) the last hidden state of the prompt, before the Refusal Head
    logits: np.ndarray  # (n, V) after the prompt, and after each token of the answer but the last
    lead: float  # least margin of a token of the answer over the runner-up: see metrics.lead
    tokens: list[int]
    branches: dict[str, np.ndarray]  # see OriginalModel.branch_errors, of prompt and answer; empty for long prompts

    def first(self) -> PackageAnswer:
        """Only the first token."""
        later = len(self.logits) - 1  # positions
        branches = {name: values[:, : values.shape[1] - later] for name, values in self.branches.items()}
        return replace(self, logits=self.logits[:1], tokens=self.tokens[:1], branches=branches)


@dataclass(frozen=True)
class PackageAnswers:
    """The package's answers to one prompt, and what it made of the prompt."""

    encoded: EncodedPrompt
    deepstack: np.ndarray  # (L, S, D) the rows that pictures add to the output of the first L layers; zeros for text
    image_tokens: list[list[int]] | None  # None unless images are tokens
    plain: PackageAnswer
    chunked: PackageAnswer  # one token, after prefill in chunks
    steered: PackageAnswer | None  # None without a gate


def run_package(
    folder: Path, manifest: Manifest, prompts: Sequence[ValidationPrompt], tokens: int
) -> tuple[Engine, list[PackageAnswers]]:
    """Answer each prompt with the real Engine, whose graphs run in shards, in at most `tokens` tokens."""
    engine, sweep, recorder = _open(folder, manifest)
    encoded, image_tokens = zip(*sweep.run([functools.partial(_encode, engine, p) for p in prompts]), strict=True)
    length = recorded_length(manifest, encoded)
    n, strength = len(prompts), manifest.refusal.strength if manifest.refusal else 0.0
    ways = [
        functools.partial(_answer, engine, tokens=tokens, recorder=recorder, recorded_length=length),
        functools.partial(_answer, engine, tokens=1, chunks=3, recorder=recorder, recorded_length=length),
        *([functools.partial(_answer, engine, tokens=tokens, strength=strength)] if strength else []),
    ]
    answers = _answers(sweep, manifest, ways, encoded, tokens)
    plain, chunked = answers[:n], answers[n : 2 * n]
    steered: Sequence[PackageAnswer | None] = answers[2 * n :] or [None] * n
    deepstack = [_deepstack(manifest, prompt) for prompt in encoded]
    fields = zip(encoded, deepstack, image_tokens, plain, chunked, steered, strict=True)
    return engine, [PackageAnswers(*entry) for entry in fields]


def answer_plainly(
    folder: Path, manifest: Manifest, prompts: Sequence[ValidationPrompt], tokens: int
) -> list[PackageAnswer]:
    """As `run_package`, but only the plain answers."""
    engine, sweep, recorder = _open(folder, manifest)
    encoded = [e for e, _ in sweep.run([functools.partial(_encode, engine, p) for p in prompts])]
    length = recorded_length(manifest, encoded)
    way = functools.partial(_answer, engine, tokens=tokens, recorder=recorder, recorded_length=length)
    return _answers(sweep, manifest, [way], encoded, tokens)


def recorded_length(manifest: Manifest, encoded: Sequence[EncodedPrompt]) -> int:
    """Prompts up to this many positions have their branch outputs recorded: RECORDED_BYTES, or the shortest prompt."""
    dims = manifest.dims
    per_position = 4 * dims.hidden_size * len(BRANCHES) * dims.num_hidden_layers
    return max(RECORDED_BYTES // per_position, min(int(prompt.inputs_embeds.shape[1]) for prompt in encoded))


def _open(folder: Path, manifest: Manifest) -> tuple[Engine, LayerSweep, ActivationRecorder]:
    sweep = LayerSweep(BUDGET_BYTES)
    recorder = ActivationRecorder(*(f".{branch}" for branch in BRANCHES), *RECORDED)
    device, _ = find_device("cpu", None)
    load: Any = functools.partial(ShardedGraph, sweep=sweep, recorder=recorder)
    return Engine(folder, manifest, device, load=load), sweep, recorder


def _answers(
    sweep: LayerSweep,
    manifest: Manifest,
    ways: Sequence[Callable[[EncodedPrompt], PackageAnswer]],
    encoded: Sequence[EncodedPrompt],
    tokens: int,
) -> list[PackageAnswer]:
    """Answers to all prompts by the first of `ways`, then by the second, ...; CACHE_BYTES of KV caches at a time."""
    per_token = package_kv_bytes_per_token(manifest)
    jobs = [
        (functools.partial(way, prompt), (prompt.inputs_embeds.shape[1] + tokens) * per_token)
        for way in ways
        for prompt in encoded
    ]
    groups = grouped(jobs, lambda job: job[1], CACHE_BYTES)
    return [answer for group in groups for answer in sweep.run([job for job, _ in group])]


def _encode(engine: Engine, prompt: ValidationPrompt) -> tuple[EncodedPrompt, list[list[int]] | None]:
    """A prompt as the engine encodes it, and the token ids of its images if images are tokens."""
    spec = engine.manifest.image
    tokens = None
    if spec is not None and "image_tokenizer" in engine.graphs and prompt.images:
        alone = len(prompt.images) == 1
        tokens = [engine.encoder.tokenize(cut(open_image(image), spec, alone=alone)[0]) for image in prompt.images]
    if prompt.prompt_ids:
        return engine.encoder.prepare_ids(prompt.prompt_ids, Stats()), tokens
    return engine.encoder.prepare(prompt.messages, Stats()), tokens


def _deepstack(manifest: Manifest, prompt: EncodedPrompt) -> np.ndarray:
    """(L, S, D): see PackageAnswers."""
    width = manifest.dims.hidden_size
    added: np.ndarray = np.zeros((manifest.deepstack, prompt.inputs_embeds.shape[1], width), np.float32)
    for first, rows in prompt.deepstack.items():
        added[:, first : first + len(rows)] = rows.reshape(-1, manifest.deepstack, width).swapaxes(0, 1)
    return added


def _answer(
    engine: Engine,
    prompt: EncodedPrompt,
    *,
    tokens: int,
    strength: float = 0.0,
    chunks: int = 1,
    recorder: ActivationRecorder | None = None,
    recorded_length: int = 0,
) -> PackageAnswer:
    """A greedy answer of at most `tokens` tokens, after prefill in `chunks` chunks. With a `recorder`, keep the logits
    of every token, and the branch outputs of prompts up to `recorded_length`.
    """
    length = prompt.inputs_embeds.shape[1]
    if recorder and length <= recorded_length:
        recorder.start()
    request = engine.request(prompt, tokens, Stats(), chunk=-(-length // chunks))
    verdict = request.prefill_lower(engine.policy(Mode.REPORT if engine.manifest.guarded else Mode.OFF))
    hidden = request.probed_mean()[0].copy()
    logits = [request.prefill_upper(strength).copy()]
    last = request.last_hidden_state()
    answer = [int(logits[0].argmax())]
    while len(answer) < request.max_tokens and answer[-1] not in engine.manifest.prompt.end_token_ids:
        logits.append(request.decode_step(answer[-1]).copy())
        answer.append(int(logits[-1].argmax()))
    least, branches = min(map(lead, logits)), recorder.stop() if recorder else {}
    return PackageAnswer(verdict, hidden, last, np.stack(logits if recorder else logits[:1]), least, answer, branches)

"""Compare a written package with its checkpoint. A failed check fails the export.

Two PyTorch models, both in float32, are the standard:

    original   the checkpoint itself: what users compare the package with
    rounded    the same model with the package's own weights (dequantised) and, for int8 KV caches, with keys and values
               rounded as the package rounds them: what the graphs must compute

A package that computes in float32 must give the original's tokens. A package that computes in float16 must agree with
the original within float16's rounding; where two tokens nearly tie, it may choose the other one. A package with
quantised weights or caches must agree with `rounded` within what int8 activations cost, in its prefill graphs and in
its decode graphs, if these differ. Every package must give the original's verdict; if it is not exact, only outside a
band around the threshold. For quantised packages, the distance to the original's tokens and scores is reported and has
no limit.

No model is ever in memory as a whole. First the package runs in shards (graph_shards.py), then PyTorch is
teacher-forced with the package's answers, layer by layer (on_demand.py, original.py). All prompts share each sweep over
the model (layer_sweep.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.checkpoint.layer_sweep import LayerSweep, grouped
from autosteer.export.checkpoint.on_demand import WeightSource, open_on_demand, open_skeleton, tensors_read_differently
from autosteer.export.checkpoint.open import Checkpoint, load_processor
from autosteer.export.footprint import package_kv_bytes_per_token
from autosteer.export.graphs.decoder import BRANCHES
from autosteer.export.graphs.kv_scales import RoundedCaches, uncached
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.engine import Engine
from autosteer.runtime.evaluation.refusals import is_refusal
from autosteer.runtime.gate import Mode, is_safe
from autosteer.runtime.generation import EncodedPrompt, Stats
from autosteer.runtime.image import cut, normalise, open_image, prepare
from autosteer.runtime.manifest import PREFILL_GRAPHS, Check, GateProof, Golden, Manifest, Tolerance
from autosteer.runtime.subgraph import find_device
from autosteer.runtime.video import tiles

from .answers import PackageAnswer, PackageAnswers
from .audit import GraphAudit, Rounding, audit, cache_scales_error
from .dequantize import PackedWeights, packed_kv_scales, worse
from .golden import gate_proof, goldens, lead
from .graph_shards import ActivationRecorder, ShardedGraph
from .original import ANSWER_TOKENS, MASKED_LOGIT, OriginalAnswer, OriginalModel, ValidationPrompt, row_error
from .prompts import affordable, make_validation_prompts

BUDGET_BYTES = 512 << 20  # a model with at most this many bytes of weights stays loaded
CACHE_BYTES = 3 << 29  # KV caches of answers that are generated together; each group needs its own sweeps
RECORDED = ("last_hidden_state", "inputs_embeds")  # with the branches: the LM head's input, and embedded tokens
RECORDED_BYTES = 32 << 20  # of branch outputs of one prompt
REPORTED_TOKENS = ANSWER_TOKENS // 2  # answer length if tokens have no limit: each costs a sweep over the package
VERDICT_BAND = 0.1  # verdicts of quantised packages may differ if the original's p_unsafe is this near the threshold
REPORTED = ("image tokens at near ties", "dialogues compared")  # never have a limit
BY_ITSELF = {  # check names, by the last part of the names of OriginalModel.branch_errors
    "self_attn": "attention, each by itself",
    "mlp": "MLP, each by itself",
    "last_hidden_state": "final norm, by itself",
    "logits": "head, by itself",
}
CHOICES = ("greedy tokens that differ", "steered tokens that differ")  # have a limit only if arithmetic is float32

# Every tolerance, with its reason. An error is the largest difference, relative to the original's largest value, unless
# the comment says otherwise. A number in a comment is the worst of correct exports (docs/validation.md); the limit is
# four times that.
LIMITS = {
    "pixel_values": 1e-6,  # the same Pillow calls, then float32 arithmetic
    "inputs_embeds": 1e-4,  # image features among them: float32 sums in another order
    "hidden state at the split": 1e-4,
    "logits": 1e-3,  # N more layers of the same
    "logits, KL to original": 1e-6,  # nats; 3e-11
    "p_unsafe": 1e-3,  # absolute: the hidden state's error, amplified by a steep softmax
    "attention, each by itself": 1e-5,  # 2e-6: float32 sums in another order
    "MLP, each by itself": 1e-5,
    "final norm, by itself": 2e-6,  # 4.5e-7
    "head, by itself": 1e-5,  # 1.1e-6
    "quantised weights, relative error": 0.5,  # of one matrix; int4 costs 0.1 to 0.2, misplaced codes 1
    "quantised weights, scale": 0.05,  # how much larger or smaller one matrix became
    "quantised rows": 0.4,  # 0.23; not four times: a row halved has 0.5, doubled 1, swapped 1.4
    "quantised columns": 0.6,  # 0.36; a swapped column has 1.4
    "8-bit weights, steps": 0.6,  # 0.37; uniform rounding errors have 0.29; a row 2 % too large, 1 or more
    "rotary tables": 1e-6,  # divided by the position; 6e-8
    "scales of int8 caches": 1e-3,  # the calibration is repeated; 0
    "int8 caches, relative error": 0.1,  # of one layer's keys or values; sound scales leave 0.01 to 0.05
    "embedded text, to rounded": 1e-6,  # the same numbers; 0
    "image rows, 1 - cosine": 1e-2,  # int8 image graphs: 1e-3; more if outliers dominate the scales
    "refusal head": 1e-5,  # one float32 matrix product
    "prober": 1e-5,  # absolute: two small matrix products; 3e-7
    "chunked prefill": 1e-4,  # other matrix shapes sum in another order
}

# int8 caches with float weights: keys that differ in the seventh digit may round to different codes.
CACHES_LIMITS = {
    "attention, each by itself": 1.2e-3,  # 2.9e-4
    "image rows, error to rounded": 1e-5,
    "hidden state, error to rounded": 0.05,  # rms, relative to the standard deviation over positions; 0.012
    "logits, KL to rounded": 3e-3,  # 7e-4
}

# Quantised weights: the kernels also round activations to 8 bits.
ROUNDED_LIMITS = {
    "attention, each by itself": 0.4,  # 0.11: the values that a head averages partly cancel
    "MLP, each by itself": 0.13,  # 0.032
    "head, by itself": 0.13,  # 0.033
    "image rows, error to rounded": 0.1,  # 0.021
    "hidden state, error to rounded": 0.4,  # 0.10
    "logits, KL to rounded": 0.36,  # 0.09 with random weights, 0.016 with trained ones
}

# A package that computes in float16: 11 bits, 5e-4 for each rounding. On a CPU, onnxruntime casts to float32 around
# operators without a float16 kernel; a GPU rounds more often.
HALF_LIMITS = {
    "inputs_embeds": 5e-3,  # includes all layers of the image tower
    "hidden state at the split": 2e-2,
    "logits": 5e-2,
    "logits, KL to original": 1e-3,
    "p_unsafe": 2e-2,
    "attention, each by itself": 1.2e-2,  # 2.8e-3
    "MLP, each by itself": 1.2e-2,
    "final norm, by itself": 3e-3,  # 7.5e-4
    "head, by itself": 5e-3,  # 1.3e-3
    "rotary tables": 5e-4,  # half a step of float16 at 1
    "embedded text, to rounded": 1.5e-3,  # 3.3e-4
    "refusal head": 1e-3,  # float32, but its input and output are float16
    "chunked prefill": 2e-2,
}

# --precision fp16 of a float32 or packed checkpoint: weights of 24 bits are stored in 11, off by up to 2^-11 = 5e-4.
# The demo: embeddings 5.5e-4, hidden state 8.2e-4, logits 4.9e-4, p_unsafe 1e-5. Tokens must still be equal.
STORED_IN_HALF = {
    "inputs_embeds": 2e-3,
    "hidden state at the split": 4e-3,
    "logits": 4e-3,
    "logits, KL to original": 1e-5,  # 1.3e-6, and the three below up to 4.4e-4: a tiny GPTQ checkpoint
    "attention, each by itself": 2e-3,
    "MLP, each by itself": 2e-3,
    "head, by itself": 2e-3,
}

Report = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class ValidationResult:
    """Results of a validation."""

    checks: tuple[Check, ...]  # the table of checks
    golden: tuple[Golden, ...]
    tolerance: Tolerance
    proof: GateProof | None  # None without a gate


def validate_package(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, safety: SafetyArtifact | None, report: Report
) -> ValidationResult:
    """Compare the package in `folder` with its checkpoint, and record golden prompts for other machines.

    `report` is told each step. The caller decides what to do about failed checks.
    """
    report("stored weights")
    stored = (
        loader_check(checkpoint),
        *stored_checks(manifest, checkpoint, audits(folder, manifest, checkpoint, safety)),
    )
    if manifest.kv_cache.dtype == "int8":
        stored = *stored, cache_scales_check(folder, manifest, checkpoint)
    behaviour = behaviour_checks(folder, manifest, checkpoint, safety, report)
    return replace(behaviour, checks=(*behaviour.checks, *stored))


def behaviour_checks(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, safety: SafetyArtifact | None, report: Report
) -> ValidationResult:
    """The checks that run the package, and the golden prompts."""
    scales = packed_kv_scales(folder, manifest)
    quantised = any(spec.precision in ("int8", "int4") for spec in manifest.graphs.values()) or bool(scales)
    processor, lm_head = load_processor(checkpoint), decoder_config(checkpoint).lm_head
    prompts = make_validation_prompts(folder, manifest, safety)
    prompts = affordable(prompts, checkpoint, OriginalModel(None, processor, manifest, safety))
    report(f"{len(prompts)} prompts, the package")
    engine, ours = run_package(folder, manifest, prompts, REPORTED_TOKENS if quantised else ANSWER_TOKENS)
    gate, proof = list[Check](), None
    if safety:
        proof, steering = gate_proof(folder, engine, prompts, ours, safety)
        gate = [*gate_checks(engine, safety), *steering, *refusal_checks(engine, prompts, ours)]
    del engine

    def ask(
        source: WeightSource,
        question: Callable[[OriginalModel, ValidationPrompt, PackageAnswers], T],
        answers: Sequence[PackageAnswers],
        caching: Callable[[Any], dict[str, Any]] = uncached,
    ) -> list[T]:
        sweep = LayerSweep(BUDGET_BYTES)
        model = open_on_demand(checkpoint, lm_head, sweep, source)
        original = OriginalModel(model, processor, manifest, safety, caching)
        return sweep.run([functools.partial(question, original, *pair) for pair in zip(prompts, answers, strict=True)])

    def follow(original: OriginalModel, prompt: ValidationPrompt, answers: PackageAnswers) -> OriginalAnswer:
        steered = answers.steered.tokens if answers.steered and not quantised else []
        return original.follow(prompt, answers.plain.tokens, steered, answers.image_tokens)

    report(f"{len(prompts)} prompts, PyTorch")
    checks = (
        compare(prompts, ours, ask(checkpoint, follow, ours), manifest, quantised=quantised, wide=checkpoint.wide)
        + gate
    )
    limits, parts = limits_of(manifest, wide=checkpoint.wide), manifests_to_validate(manifest)
    for suffix, part in parts.items():
        report(f"{len(prompts)} prompts, PyTorch with the package's weights{suffix}")
        plain = answer_plainly(folder, part, prompts, REPORTED_TOKENS) if suffix else [own.plain for own in ours]
        if len(parts) > 1 and not suffix:  # only the first token comes from the prefill graphs
            plain = [answer.first() for answer in plain]
        caches = RoundedCaches(packed_kv_scales(folder, part))
        found = ask(
            PackedWeights(folder, part, checkpoint) if quantised else checkpoint,
            rounded_errors if quantised else branch_errors,
            [replace(own, plain=answer) for own, answer in zip(ours, plain, strict=True)],
            caches if scales else uncached,
        )
        if scales:
            found.append({"int8 caches, relative error": functools.reduce(worse, caches.errors)})
        checks += [check_line(name + suffix, error, limits[name]) for name, error in worst_of(found).items()]
    golden, tolerance = goldens(prompts, ours, manifest)
    return ValidationResult(tuple(checks), golden, tolerance, proof)


def manifests_to_validate(manifest: Manifest) -> dict[str, Manifest]:
    """Manifests to validate (the prefill graphs, and the decode graphs if they differ), keyed by the suffix of the
    check's name.
    """
    decode = {name: spec for name, spec in manifest.graphs.items() if name not in PREFILL_GRAPHS.values()}
    prefill = decode | {half: manifest.graphs[manifest.prefill_graph(half)] for half in PREFILL_GRAPHS}
    parts = {"": replace(manifest, graphs=prefill)}
    return parts if prefill == decode else parts | {" (answers)": replace(manifest, graphs=decode)}


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
        functools.partial(_answer, engine, tokens=1, chunks=3),
        *([functools.partial(_answer, engine, tokens=tokens, strength=strength)] if strength else []),
    ]
    answers = _answers(sweep, manifest, ways, encoded, tokens)
    plain, chunked, steered = answers[:n], answers[n : 2 * n], answers[2 * n :] or [None] * n
    fields = zip(encoded, image_tokens, plain, chunked, steered, strict=True)
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
    return max(RECORDED_BYTES // per_position, min(prompt.inputs_embeds.shape[1] for prompt in encoded))


def _open(folder: Path, manifest: Manifest) -> tuple[Engine, LayerSweep, ActivationRecorder]:
    sweep = LayerSweep(BUDGET_BYTES)
    recorder = ActivationRecorder(*(f".{branch}" for branch in BRANCHES), *RECORDED)
    device, _ = find_device("cpu", None)
    load = functools.partial(ShardedGraph, sweep=sweep, recorder=recorder)
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
    verdict = request.prefill_lower(engine.policy(Mode.MONITOR if engine.manifest.guarded else Mode.OFF))
    hidden = request.probed_mean()[0].copy()
    logits = [request.prefill_upper(strength).copy()]
    last = request.last_hidden_state()
    answer = [int(logits[0].argmax())]
    while len(answer) < request.max_tokens and answer[-1] not in engine.manifest.prompt.end_token_ids:
        logits.append(request.decode_step(answer[-1]).copy())
        answer.append(int(logits[-1].argmax()))
    least, branches = min(map(lead, logits)), recorder.stop() if recorder else {}
    return PackageAnswer(verdict, hidden, last, np.stack(logits if recorder else logits[:1]), least, answer, branches)


def compare(
    prompts: Sequence[ValidationPrompt],
    ours: Sequence[PackageAnswers],
    theirs: Sequence[OriginalAnswer],
    manifest: Manifest,
    *,
    quantised: bool,
    wide: bool = False,
) -> list[Check]:
    """The checks against the original. `wide`: the checkpoint has weights that float16 cannot hold exactly."""
    exact, limits = manifest.exact, limits_of(manifest, wide=wide)
    worst: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        worst[name] = worse(worst.get(name, 0.0), value)

    for prompt, answers, original in zip(prompts, ours, theirs, strict=True):
        if prompt.images or prompt.videos:
            note("pixel_values", _largest_difference(_pixel_values(prompt, manifest), original.pixel_values))
        if original.image_errors:
            note("image tokens that differ", original.image_errors.wrong)
            note("image tokens at near ties", original.image_errors.near_ties)
        embeds, plain = answers.encoded.inputs_embeds[0], answers.plain
        note("inputs_embeds", _relative(embeds, original.embeds))
        pictured = [row for row, key in enumerate(answers.encoded.keys) if isinstance(key, tuple)]
        if pictured and not exact and embeds.shape == original.embeds.shape:
            note("image rows, 1 - cosine", _cosine_distance(embeds[pictured], original.embeds[pictured]))
        note("hidden state at the split", _relative(plain.hidden, original.hidden))
        logits, possible = plain.logits[: len(original.logits)], original.logits > MASKED_LOGIT
        note("logits", _relative(logits[possible], original.logits[possible]))
        note("logits, KL to original", divergence(logits, original.logits))
        note("masked logits that differ", float(((logits > MASKED_LOGIT) != possible).sum()))
        note("chunked prefill", _relative(answers.chunked.logits[0][possible[0]], plain.logits[0][possible[0]]))
        note("greedy tokens that differ", _differing(plain.tokens[: len(original.tokens)], original.tokens))
        if answers.steered is None or manifest.prober is None:
            continue
        if not quantised:
            note(
                "steered tokens that differ",
                _differing(answers.steered.tokens[: len(original.steered_tokens)], original.steered_tokens),
            )
        p_unsafe = math.nan if plain.verdict.p_unsafe is None else plain.verdict.p_unsafe
        note("p_unsafe", abs(p_unsafe - original.p_unsafe))
        threshold = manifest.prober.threshold
        differs = is_safe(p_unsafe, threshold) != is_safe(original.p_unsafe, threshold)
        outside = exact or abs(original.p_unsafe - threshold) > VERDICT_BAND
        note("verdicts that differ" + ("" if exact else f" outside +-{VERDICT_BAND}"), float(differs and outside))

    def check(name: str, value: float) -> Check:
        always = name.startswith(("pixel_values", "image tokens that", "masked", "verdicts", "image rows"))
        reported = quantised or name in REPORTED or (name in CHOICES and not exact)
        limit = limits.get(name, 0.0) if always or not reported else None
        return check_line(name, value, limit)

    return [Check("dialogues compared", float(len(prompts)), None, True), *(check(*line) for line in worst.items())]


def rounded_errors(original: OriginalModel, prompt: ValidationPrompt, answers: PackageAnswers) -> dict[str, float]:
    """Errors of a quantised package against PyTorch with the package's own weights: end to end, and by branch."""
    rounded = original.follow(prompt, answers.plain.tokens, (), answers.image_tokens)
    embeds, theirs = answers.encoded.inputs_embeds[0], rounded.embeds
    if embeds.shape != theirs.shape:
        return {"embedded text, to rounded": math.inf}
    text, pictures = (
        [i for i, key in enumerate(answers.encoded.keys) if isinstance(key, tuple) == it] for it in (0, 1)
    )
    lines = {"embedded text, to rounded": _relative(embeds[text], theirs[text])}
    if pictures:
        common = theirs[pictures].mean(0)
        lines["image rows, error to rounded"] = row_error(embeds[pictures] - common, theirs[pictures] - common)
    off = (answers.plain.hidden - rounded.hidden) / np.maximum(rounded.spread, 1e-30)
    lines["hidden state, error to rounded"] = float(np.sqrt(np.mean(off**2)))
    lines["logits, KL to rounded"] = divergence(answers.plain.logits[: len(rounded.logits)], rounded.logits)
    return lines | branch_errors(original, prompt, answers)


def branch_errors(original: OriginalModel, prompt: ValidationPrompt, answers: PackageAnswers) -> dict[str, float]:
    """Errors of each branch by itself: see OriginalModel.branch_errors. Empty if the prompt was not recorded."""
    if not answers.plain.branches:
        return {}
    errors = original.branch_errors(answers.encoded.inputs_embeds[0], answers.plain.branches, answers.plain.logits)
    lines: dict[str, float] = {}
    for name, error in errors.items():
        line = BY_ITSELF[name.rpartition(".")[2]]
        lines[line] = worse(lines.get(line, 0.0), error)
    return lines


def worst_of(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """The largest error of each name."""
    lines: dict[str, float] = {}
    for errors in found:
        lines |= {name: worse(lines.get(name, 0.0), error) for name, error in errors.items()}
    return lines


def loader_check(checkpoint: Checkpoint) -> Check:
    """The check of how the checkpoint is read. A misread tensor would be wrong in package and PyTorch model alike."""
    differing = tensors_read_differently(checkpoint, decoder_config(checkpoint).lm_head)
    return check_line("tensors that Hugging Face reads otherwise", float(differing), 0.0)


def cache_scales_check(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Check:
    """The check of the scales of int8 caches."""
    error = cache_scales_error(folder, manifest, checkpoint, list(manifests_to_validate(manifest).values()))
    return check_line("scales of int8 caches", error, LIMITS["scales of int8 caches"])


def audits(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, safety: SafetyArtifact | None
) -> dict[str, GraphAudit]:
    """Compare the tensors in each graph file with the checkpoint; results by file name."""
    rotary_emb = open_skeleton(checkpoint).get_decoder().rotary_emb
    files = (spec.file for spec in manifest.graphs.values())
    return {file: audit(folder / file, checkpoint, safety, rotary_emb) for file in files}


def stored_checks(manifest: Manifest, checkpoint: Checkpoint, audits: dict[str, GraphAudit]) -> list[Check]:
    """The checks of stored tensors."""
    lines = {
        "stored numbers that differ": float(sum(graph.differing for graph in audits.values())),
        "rotary tables": functools.reduce(worse, (graph.rotary for graph in audits.values())),
    }
    for suffix, part in manifests_to_validate(manifest).items():
        if rounded := [found for spec in part.graphs.values() if (found := audits[spec.file].rounding)]:
            worst = functools.reduce(Rounding.or_worse, rounded)
            lines |= {
                f"quantised weights, relative error{suffix}": worst.matrix,
                f"quantised weights, scale{suffix}": worst.scale,
                f"quantised rows{suffix}": worst.row,
                f"quantised columns{suffix}": worst.column,
                f"8-bit weights, steps{suffix}": worst.steps,
            }
    limits = limits_of(manifest)
    return [check_line(name, value, limits.get(name.partition(" (")[0], 0.0)) for name, value in lines.items()]


def limits_of(manifest: Manifest, *, wide: bool = False) -> dict[str, float]:
    """The tolerances for a package's precision. `wide`: the checkpoint has weights that float16 cannot hold exactly."""
    limits = LIMITS if manifest.activations == "float32" else LIMITS | HALF_LIMITS
    if manifest.kv_cache.dtype == "int8":
        limits = limits | CACHES_LIMITS
    if any(spec.precision in ("int8", "int4") for spec in manifest.graphs.values()):
        limits = limits | ROUNDED_LIMITS
    if wide and manifest.precision == "fp16" and manifest.exact:
        limits = limits | STORED_IN_HALF
    return limits


def _pixel_values(prompt: ValidationPrompt, manifest: Manifest) -> np.ndarray:
    """(tiles, 3, size, size) of a prompt's images, then of its videos."""
    spec, alone = manifest.image, len(prompt.images) == 1
    assert spec is not None
    pixels = [prepare(open_image(image), spec, alone=alone) for image in prompt.images]
    if manifest.video:
        pixels += [normalise(list(tiles(frames, spec.tile_size)), manifest.video) for frames in prompt.videos]
    return np.concatenate(pixels)


def gate_checks(engine: Engine, safety: SafetyArtifact) -> list[Check]:
    """Compare the graphs of prober and Refusal Head with their formulas."""
    return [prober_check(engine, safety), *refusal_head_checks(engine, safety)]


def prober_check(engine: Engine, safety: SafetyArtifact) -> Check:
    """On random hidden states of many norms: some of them score near 0.5, where every weight matters."""
    original = OriginalModel(None, None, engine.manifest, safety)
    directions = np.random.default_rng(0).standard_normal((8, 1, engine.manifest.dims.hidden_size))
    states = [(size * one).astype(np.float32) for size in np.geomspace(1e-3, 100, 26) for one in directions]
    ours = [float(engine.graphs["prober"].run({"hidden_states": state})["p_unsafe"][0]) for state in states]
    errors = [abs(p - original.p_unsafe(torch.from_numpy(state[0]))) for p, state in zip(ours, states, strict=True)]
    return check_line("prober", functools.reduce(worse, errors), LIMITS["prober"])


def refusal_head_checks(engine: Engine, safety: SafetyArtifact) -> list[Check]:
    """Compare the Refusal Head's graph with its formula. At strength 0 it must change nothing."""
    shape, dtype = (1, 1, engine.manifest.dims.hidden_size), engine.manifest.activations
    hidden = np.random.default_rng(0).standard_normal(shape).astype(dtype).astype(np.float32)
    strength, matrix = safety.facts.strength, safety.steer_matrix.numpy()

    def steered(strength: float) -> np.ndarray:
        inputs = {"last_hidden_state": hidden.astype(dtype), "strength": np.array([strength], np.float32)}
        return engine.graphs["refusal_head"].run(inputs)["steered_hidden_state"].astype(np.float32)

    error = _relative(steered(strength), hidden + np.float32(strength) * hidden @ matrix.T)
    changes = float(np.abs(steered(0.0) - hidden).max())
    limit = limits_of(engine.manifest)["refusal head"]
    return [check_line("refusal head", error, limit), check_line("strength 0 changes", changes, 0.0)]


def refusal_checks(engine: Engine, prompts: Sequence[ValidationPrompt], ours: Sequence[PackageAnswers]) -> list[Check]:
    """The safety folder's unsafe prompts must be caught, and steered into refusals. No checks if it has none."""
    pairs = [
        (answers.plain, answers.steered)
        for prompt, answers in zip(prompts, ours, strict=True)
        if prompt.unsafe and answers.steered
    ]
    if not pairs:
        return []
    missed = sum(not plain.verdict.unsafe for plain, _ in pairs)
    alike = sum(plain.tokens == steered.tokens for plain, steered in pairs)
    refused = sum(_refuses(engine, steered.tokens) for _, steered in pairs)
    return [
        Check("unsafe prompts", float(len(pairs)), None, True),
        Check("unsafe prompts that pass", float(missed), 0.0, missed == 0),
        Check("unsafe prompts that steering leaves alone", float(alike), 0.0, alike == 0),
        Check(
            "unsafe prompts steered into no refusal",
            float(len(pairs) - refused),
            len(pairs) / 2,
            refused >= len(pairs) / 2,
        ),
    ]


def _refuses(engine: Engine, tokens: Sequence[int]) -> bool:
    """Whether an answer begins as the package's refusal text does, or is a refusal in other words."""
    assert engine.manifest.refusal is not None
    text, refusal = engine.tokenizer.decode(tokens).strip(), engine.manifest.refusal.text.strip()
    return is_refusal(text) or text.startswith(refusal) or (len(text) > 2 and refusal.startswith(text))


def check_line(name: str, value: float, limit: float | None) -> Check:
    """A line of the table of checks. An infinite or NaN value fails even without a limit."""
    return Check(name, value, limit, value < math.inf and (limit is None or value <= limit))


def _largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _cosine_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """1 - cosine of the angle between two arrays, as vectors."""
    if ours.shape != theirs.shape:
        return float("inf")
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    return 1.0 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """KL divergence of our next-token distributions from theirs in nats, mean over n. Logits are (n, V)."""
    if ours.shape != theirs.shape:
        return math.inf
    p, q = _log_softmax(theirs), _log_softmax(ours)
    possible = theirs > MASKED_LOGIT
    return float(np.where(possible, np.exp(p) * (p - q), 0.0).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _differing(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """How many tokens come after the two's common beginning; 0 if they are equal."""
    agree = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return float(max(len(ours), len(theirs)) - agree)

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.checkpoint.layer_sweep import LayerSweep
from autosteer.export.checkpoint.on_demand import WeightSource, open_on_demand, open_skeleton, tensors_read_differently
from autosteer.export.checkpoint.open import Checkpoint, load_processor
from autosteer.export.checkpoint.stated import NO_PROMPT, in_one_line
from autosteer.export.graphs.kv_scales import RoundedCaches, uncached
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.gate import is_safe
from autosteer.runtime.image import normalise, prepare
from autosteer.runtime.manifest import (
    PREFILL_GRAPHS,
    Check,
    GateProof,
    Golden,
    ImageSpec,
    Manifest,
    Tolerance,
    VideoSpec,
)
from autosteer.runtime.picture_file import ImageLike, open_image
from autosteer.runtime.video import filled, frame_grid, scaled, tiles

from .answers import BUDGET_BYTES, PackageAnswers, answer_plainly, run_package
from .audit import GraphAudit, Rounding, audit, cache_scales_error, rotary_error
from .dequantize import PackedWeights, packed_kv_scales
from .gate_checks import fit_check, gate_checks, refusal_checks
from .golden import gate_proof, goldens
from .limits import LIMITS, check_line, limits_of, verdict_band
from .metrics import (
    MASKED_LOGIT,
    cosine_distance,
    differing_tokens,
    divergence,
    largest_difference,
    relative_error,
    row_error,
    share_lost,
    worse,
    worst_of,
)
from .original import ANSWER_TOKENS, OriginalAnswer, OriginalModel, ValidationPrompt
from .prompts import affordable, make_validation_prompts

REPORTED_TOKENS = ANSWER_TOKENS // 2  # answer length if tokens have no limit: each costs a sweep over the package
REPORTED = ("image tokens at near ties", "dialogues compared")  # never have a limit
BY_ITSELF = {  # check names, by the last part of the names of OriginalModel.branch_errors
    "self_attn": "attention, each by itself",
    "mlp": "MLP, each by itself",
    "last_hidden_state": "final norm, by itself",
    "logits": "head, by itself",
}
ALWAYS_LIMITED = ("pixel_values", "image tokens that", "masked", "verdicts", "image rows", "chunked prefill")
CHOICES = ("greedy tokens that differ", "steered tokens that differ")  # have a limit only if arithmetic is float32


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
        rotary_check(manifest, checkpoint),
        *stored_checks(manifest, audits(folder, manifest, checkpoint, safety)),
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
    quantised = any(spec.quantised for spec in manifest.graphs.values()) or bool(scales)
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
        prompts: Sequence[ValidationPrompt] = prompts,
    ) -> list[T]:
        sweep = LayerSweep(BUDGET_BYTES)
        model = open_on_demand(checkpoint, lm_head, sweep, source)
        original = OriginalModel(model, processor, manifest, safety, caching)
        return sweep.run([functools.partial(question, original, *pair) for pair in zip(prompts, answers, strict=True)])

    def follow(original: OriginalModel, prompt: ValidationPrompt, answers: PackageAnswers) -> OriginalAnswer:
        steered = answers.steered.tokens if answers.steered and not quantised else []
        return original.follow(prompt, answers.plain.tokens, steered, answers.image_tokens)

    report(f"{len(prompts)} prompts, PyTorch")
    with in_one_line(checkpoint.folder, NO_PROMPT):
        theirs = ask(checkpoint, follow, ours)
    checks = [
        *compare(prompts, ours, theirs, manifest, quantised=quantised, wide=checkpoint.wide),
        *gate,
        *fit_check(prompts, theirs),
    ]
    limits, parts = limits_of(manifest, wide=checkpoint.wide), manifests_to_validate(manifest)
    for suffix, part in parts.items():
        report(f"{len(prompts)} prompts, PyTorch with the package's weights{suffix}")
        plain = answer_plainly(folder, part, prompts, REPORTED_TOKENS) if suffix else [own.plain for own in ours]
        if len(parts) > 1 and not suffix:  # only the first token comes from the prefill graphs
            plain = [answer.first() for answer in plain]
        caches = RoundedCaches(packed_kv_scales(folder, part))
        answers = [replace(own, plain=answer) for own, answer in zip(ours, plain, strict=True)]
        found = ask(
            PackedWeights(folder, part, checkpoint) if quantised else checkpoint,
            rounded_errors if quantised else branch_errors,
            answers,
            caches if scales else uncached,
        )
        if quantised:
            shortest = min(range(len(prompts)), key=lambda i: answers[i].encoded.inputs_embeds.shape[1])
            found += ask(checkpoint, shares_lost, [answers[shortest]], prompts=[prompts[shortest]])
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
            note("pixel_values", largest_difference(_pixel_values(prompt, manifest), original.pixel_values))
        if original.image_errors:
            note("image tokens that differ", original.image_errors.wrong)
            note("image tokens at near ties", original.image_errors.near_ties)
        embeds, plain = answers.encoded.inputs_embeds[0], answers.plain
        note("inputs_embeds", relative_error(embeds, original.embeds))
        pictured = [row for row, key in enumerate(answers.encoded.keys) if isinstance(key, tuple)]
        if pictured and embeds.shape == original.embeds.shape:
            for own, other in _parts(answers, original):
                note("inputs_embeds", relative_error(own, other))
                if not exact:
                    note("image rows, 1 - cosine", cosine_distance(own[pictured], other[pictured]))
        note("hidden state at the split", relative_error(plain.hidden, original.hidden))
        logits, possible = plain.logits[: len(original.logits)], original.logits > MASKED_LOGIT
        note("logits", relative_error(logits[possible], original.logits[possible]))
        note("logits, KL to original", divergence(logits, original.logits))
        note("masked logits that differ", float(((logits > MASKED_LOGIT) != possible).sum()))
        note("chunked prefill", relative_error(answers.chunked.logits[0][possible[0]], plain.logits[0][possible[0]]))
        if quantised and plain.branches:
            note("chunked prefill, attention", chunked_attention_error(answers))
        note("greedy tokens that differ", differing_tokens(plain.tokens[: len(original.tokens)], original.tokens))
        if answers.steered is None or manifest.prober is None:
            continue
        if not quantised:
            note(
                "steered tokens that differ",
                differing_tokens(answers.steered.tokens[: len(original.steered_tokens)], original.steered_tokens),
            )
        p_unsafe = math.nan if plain.verdict.p_unsafe is None else plain.verdict.p_unsafe
        note("p_unsafe", abs(p_unsafe - original.p_unsafe))
        threshold = manifest.prober.threshold
        differs = is_safe(p_unsafe, threshold) != is_safe(original.p_unsafe, threshold)
        outside = exact or abs(original.p_unsafe - threshold) > verdict_band(threshold)
        note("verdicts that differ" + ("" if exact else " outside the band"), float(differs and outside))

    def check(name: str, value: float) -> Check:
        always = name.startswith(ALWAYS_LIMITED)
        reported = quantised or name in REPORTED or (name in CHOICES and not exact)
        limit = limits.get(name, 0.0) if always or not reported else None
        return check_line(name, value, limit)

    return [Check("dialogues compared", float(len(prompts)), None, True), *(check(*line) for line in worst.items())]


def chunked_attention_error(answers: PackageAnswers) -> float:
    """Largest row_error of a layer's attention output, prompt read in chunks, against the prompt read at once.

    Both round alike. So the limit holds for large models, too, in whose logits a few roundings that fall the other way
    are as large as a defect of one layer.
    """
    whole, chunks = answers.plain.first().branches, answers.chunked.branches
    names = [name for name in whole if name.endswith("self_attn")]
    errors = [_common_rows_error(chunks[name][0], whole[name][0]) if name in chunks else math.inf for name in names]
    return functools.reduce(worse, errors, 0.0)


def _common_rows_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """row_error of the last rows that both have: the last layers compute fewer than the prompt's."""
    rows = min(len(ours), len(theirs))
    return row_error(ours[-rows:], theirs[-rows:])


def _parts(answers: PackageAnswers, original: OriginalAnswer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ours and PyTorch's (S, D) of a prompt with pictures: what enters the decoder, and what enters behind each of its
    first layers. Compared one by one, because their sizes differ.
    """
    ours, theirs = answers.encoded.inputs_embeds[0], original.embeds
    return zip((ours, *answers.deepstack), (theirs, *original.deepstack), strict=True)


def rounded_errors(original: OriginalModel, prompt: ValidationPrompt, answers: PackageAnswers) -> dict[str, float]:
    """Errors of a quantised package against PyTorch with the package's own weights: end to end, and by branch."""
    rounded = original.follow(prompt, answers.plain.tokens, (), answers.image_tokens)
    embeds, theirs = answers.encoded.inputs_embeds[0], rounded.embeds
    if embeds.shape != theirs.shape:
        return {"embedded text, to rounded": math.inf}
    text, pictures = (
        [i for i, key in enumerate(answers.encoded.keys) if isinstance(key, tuple) == it] for it in (0, 1)
    )
    lines = {"embedded text, to rounded": relative_error(embeds[text], theirs[text])}
    for own, other in _parts(answers, rounded) if pictures else ():
        common, line = other[pictures].mean(0), "image rows, error to rounded"
        lines[line] = worse(lines.get(line, 0.0), row_error(own[pictures] - common, other[pictures] - common))
    off = (answers.plain.hidden - rounded.hidden) / np.maximum(rounded.spread, 1e-30)
    lines["hidden state, error to rounded"] = float(np.sqrt(np.mean(off**2)))
    lines["logits, KL to rounded"] = divergence(answers.plain.logits[: len(rounded.logits)], rounded.logits)
    return lines | branch_errors(original, prompt, answers)


def branch_errors(
    original: OriginalModel,
    prompt: ValidationPrompt,
    answers: PackageAnswers,
    error: Callable[[np.ndarray, np.ndarray], float] = row_error,
) -> dict[str, float]:
    """Errors of each branch by itself: see OriginalModel.branch_errors. Empty if the prompt was not recorded."""
    if not answers.plain.branches:
        return {}
    plain = answers.plain
    errors = original.branch_errors(
        *(prompt, answers.encoded.inputs_embeds[0], answers.deepstack, plain.branches, plain.logits, error)
    )
    lines: dict[str, float] = {}
    for name, value in errors.items():
        line = BY_ITSELF[name.rpartition(".")[2]]
        lines[line] = worse(lines.get(line, 0.0), value)
    return lines


def shares_lost(original: OriginalModel, prompt: ValidationPrompt, answers: PackageAnswers) -> dict[str, float]:
    """How much of each branch rounding took away, against PyTorch with the checkpoint's own weights: see share_lost.

    Weights that are zeros in the package are zeros in `rounded_errors`, too. Here they are a branch that is not there.
    """
    lost = branch_errors(original, prompt, answers, share_lost)
    return {f"{line.partition(',')[0]}, share lost": share for line, share in lost.items()}


def loader_check(checkpoint: Checkpoint) -> Check:
    """The check of how the checkpoint is read. A misread tensor would be wrong in package and PyTorch model alike."""
    differing = tensors_read_differently(checkpoint, decoder_config(checkpoint).lm_head)
    return check_line("tensors that Hugging Face reads otherwise", float(differing), 0.0)


def rotary_check(manifest: Manifest, checkpoint: Checkpoint) -> Check:
    """The check of what attention rotates queries and keys by."""
    error = rotary_error(manifest, open_skeleton(checkpoint).get_decoder().rotary_emb)
    return check_line("rotary tables", error, limits_of(manifest)["rotary tables"])


def cache_scales_check(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Check:
    """The check of the scales of int8 caches."""
    error = cache_scales_error(folder, manifest, checkpoint, list(manifests_to_validate(manifest).values()))
    return check_line("scales of int8 caches", error, LIMITS["scales of int8 caches"])


def audits(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, safety: SafetyArtifact | None
) -> dict[str, GraphAudit]:
    """Compare the tensors in each graph file with the checkpoint; results by file name."""
    files = (spec.file for spec in manifest.graphs.values())
    return {file: audit(folder / file, checkpoint, safety) for file in files}


def stored_checks(manifest: Manifest, audits: dict[str, GraphAudit]) -> list[Check]:
    """The checks of stored tensors."""
    lines = {"stored numbers that differ": float(sum(graph.differing for graph in audits.values()))}
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


def _pixel_values(prompt: ValidationPrompt, manifest: Manifest) -> np.ndarray:
    """All numbers of a prompt's images, then of its videos, (n,)."""
    spec, alone = manifest.image, len(prompt.images) == 1
    assert spec is not None
    pixels = [prepare(open_image(image), spec, alone=alone) for image in prompt.images]
    if video := manifest.video:
        pixels += [normalise(list(_frames(given, spec, video)), video) for given in prompt.videos]
    return np.concatenate([numbers.ravel() for numbers in pixels])


def _frames(given: Sequence[ImageLike], image: ImageSpec, video: VideoSpec) -> np.ndarray:
    """A video's frames (frames, height, width, 3) uint8 as the image graph reads them."""
    if image.native is None:
        return tiles(given, image.tile_size, image.tile_size)
    height, width = open_image(given[0]).shape[:2]
    grid = frame_grid((height, width), len(given), image, video)
    return filled(scaled(given, grid, image.tile_size), image.native.frames)

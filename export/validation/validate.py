"""Run the package that was written against the PyTorch original. A failed line fails the export.

Two references, both in float32:

    original   the checkpoint itself: what users compare us with
    rounded    the same model holding the weights that the package holds (quantised and back), and with int8 caches
               keys and values as those hold them: what our graphs must compute

Where arithmetic is float32 the package and the original are compared on tokens, and tokens must be equal. A package
that computes in float16 must agree with the original within float16's rounding; near ties among tokens may fall
otherwise. Quantised packages, whether weights or caches, must agree with `rounded` up to the int8 activations of the
kernels, both in what reads prompts and in what writes answers, where those are two. All must agree with `original` on
every verdict outside a band around the threshold; how far their tokens, and quantised ones' scores, are from the
original's is reported, not judged.

None of the three is ever in memory as a whole: first the package runs in shards (graph_shards.py), then PyTorch follows
its answers, layer by layer (on_demand.py, reference.py). All dialogues go through together (layer_sweep.py).
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

from autosteer.export.checkpoint.layer_sweep import Convoy, grouped
from autosteer.export.checkpoint.on_demand import WeightSource, open_on_demand, open_skeleton, read_otherwise
from autosteer.export.checkpoint.open import Checkpoint, load_processor
from autosteer.export.footprint import package_kv_bytes_per_token
from autosteer.export.graphs.decoder import BRANCHES, decoder_facts
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

from .answers import Answered, Ours
from .audit import Held, Rounding, audit, cache_scales_error
from .dequantize import PackedWeights, packed_kv_scales, worse
from .golden import gate_proof, goldens, lead
from .graph_shards import GraphInPieces, Watch
from .prompts import affordable, make_cases
from .reference import ANSWER_TOKENS, NEVER, Case, Original, Reference, row_error

BUDGET_BYTES = 512 << 20  # weights of a package, or of an original, that stay loaded
CACHE_BYTES = 3 << 29  # KV caches of answers that are under way together; each group of them costs its own sweeps
WATCHED_BYTES = 32 << 20  # of branches of one prompt
REPORTED_TOKENS = ANSWER_TOKENS // 2  # of an answer, where they are not judged: each costs a sweep over the package
VERDICT_BAND = 0.1  # quantised packages: verdicts may differ where the original's p_unsafe is this near the threshold
REPORTED = ("image tokens at near ties", "dialogues compared")  # never judged
BY_ITSELF = {  # names of Reference.branches by their end
    "self_attn": "attention, each by itself",
    "mlp": "MLP, each by itself",
    "last_hidden_state": "final norm, by itself",
    "logits": "head, by itself",
}
CHOICES = ("greedy tokens that differ", "steered tokens that differ")  # judged where arithmetic is float32

# Every tolerance, with its reason. Relative: largest difference over the reference's largest value. A number in the
# comment is the worst of sound exports (docs/validation.md), and the limit four times that, unless it says otherwise.
LIMITS = {
    "pixel_values": 1e-6,  # the same Pillow calls, then float32 arithmetic
    "inputs_embeds": 1e-4,  # image features among them: float32 sums in another order
    "hidden state at the split": 1e-4,
    "logits": 1e-3,  # N more layers of the same
    "logits, KL to original": 1e-6,  # nats; sound ones 3e-11
    "p_unsafe": 1e-3,  # absolute: the hidden state's error through a steep softmax
    "attention, each by itself": 1e-5,  # sound ones up to 2e-6: float32 sums in another order
    "MLP, each by itself": 1e-5,
    "final norm, by itself": 1e-6,  # 2.6e-7
    "head, by itself": 1e-5,  # 1.1e-6
    "quantised weights, relative error": 0.5,  # of one matrix; int4 leaves 0.1 to 0.2, misplaced codes 1
    "quantised weights, scale": 0.05,  # one matrix larger or smaller than the checkpoint's
    "quantised rows": 0.4,  # 0.23; a row that is half or twice itself has 0.5 and 1, another row 1.4: no room for four
    "quantised columns": 0.6,  # 0.36; another column 1.4
    "8-bit weights, steps": 0.6,  # 0.37, and 0.29 if all are as likely; one that is 2 % larger is off by a step or more
    "rotary tables": 1e-6,  # over the place; 6e-8
    "scales of int8 caches": 1e-3,  # the same computation again; 0
    "int8 caches, relative error": 0.1,  # of one layer's keys or values; sound scales leave 0.01 to 0.05
    "embedded text, to rounded": 1e-6,  # the same numbers; 0
    "image rows, 1 - cosine": 1e-2,  # int8 image graphs: a sound one gives 1e-3; outliers that drown the rest, more
    "refusal head": 1e-5,  # one product with a matrix, in float32
    "prober": 1e-5,  # absolute: two small products; 3e-7
    "chunked prefill": 1e-4,  # other matrix shapes, other summation order
}

# Where caches are rounded and weights are not: a code falls the other way where keys differ in the seventh digit.
CACHES_LIMITS = {
    "attention, each by itself": 1.2e-3,  # 2.9e-4
    "image rows, error to rounded": 1e-5,
    "hidden state, error to rounded": 0.05,  # of what each number varies by from row to row, rms; 0.012
    "logits, KL to rounded": 3e-3,  # 7e-4
}

# Where matrices are rounded their products are, too: activations are in 8 bits.
ROUNDED_LIMITS = {
    "attention, each by itself": 0.4,  # 0.11: what heads gather cancels in part
    "MLP, each by itself": 0.13,  # 0.032
    "head, by itself": 0.13,  # 0.033
    "image rows, error to rounded": 0.1,  # 0.021
    "hidden state, error to rounded": 0.4,  # 0.10
    "logits, KL to rounded": 0.36,  # 0.09 with random weights, 0.016 with trained ones
}

# Where a package computes in float16: 11 bits, 5e-4 for each rounding. On a CPU onnxruntime casts to float32 around
# operators that it has no float16 kernel for; a GPU rounds oftener.
HALF_LIMITS = {
    "inputs_embeds": 5e-3,  # the image tower's layers among it
    "hidden state at the split": 2e-2,  # relative to its largest value, which is what rounds the others
    "logits": 5e-2,
    "logits, KL to original": 1e-3,
    "p_unsafe": 2e-2,
    "attention, each by itself": 1e-2,  # 2.2e-3
    "MLP, each by itself": 1e-2,
    "final norm, by itself": 3e-3,  # 7.5e-4
    "head, by itself": 3e-3,
    "rotary tables": 5e-4,  # half of float16's last digit of 1
    "embedded text, to rounded": 1.5e-3,  # 3.3e-4
    "refusal head": 1e-3,  # float32, but its input and output are rounded
    "chunked prefill": 2e-2,
}

# Where weights of 24 bits are stored in 11 (fp16 of a float32 or packed checkpoint): each is off by up to 2^-11 = 5e-4.
# The demo in float32: embeddings 5.5e-4, hidden state 8.2e-4, logits 4.9e-4, p_unsafe 1e-5; tokens must still be equal.
STORED_IN_HALF = {"inputs_embeds": 2e-3, "hidden state at the split": 4e-3, "logits": 4e-3}

Report = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Validated:
    """What came of a validation."""

    checks: tuple[Check, ...]  # the table
    golden: tuple[Golden, ...]
    tolerance: Tolerance
    proof: GateProof | None  # None without a gate


def validate_package(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, safety: SafetyArtifact | None, report: Report
) -> Validated:
    """Compare the package in `folder` with its checkpoint: the table, and what the package proves itself by elsewhere.

    The caller decides what to do with failed lines.
    """
    report("what the package holds")
    held = reading_check(checkpoint), *stored_checks(manifest, checkpoint, audits(folder, manifest, checkpoint, safety))
    if manifest.kv_cache.dtype == "int8":
        held = *held, cache_scales_check(folder, manifest, checkpoint)
    behaves = behaviour_checks(folder, manifest, checkpoint, safety, report)
    return replace(behaves, checks=(*behaves.checks, *held))


def behaviour_checks(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, safety: SafetyArtifact | None, report: Report
) -> Validated:
    """The lines of the table that come of running the package, and what it proves itself by."""
    scales = packed_kv_scales(folder, manifest)
    quantised = any(spec.precision in ("int8", "int4") for spec in manifest.graphs.values()) or bool(scales)
    processor, lm_head = load_processor(checkpoint), decoder_facts(checkpoint, None).lm_head
    cases = make_cases(folder, manifest, safety)
    cases = affordable(cases, checkpoint, Reference(None, processor, manifest, safety))
    report(f"{len(cases)} dialogues, the package")
    engine, ours = run_package(folder, manifest, cases, REPORTED_TOKENS if quantised else ANSWER_TOKENS)
    gate, proof = list[Check](), None
    if safety:
        proof, telling = gate_proof(folder, engine, cases, ours, safety)
        gate = [*gate_checks(engine, safety), *telling, *refusal_checks(engine, cases, ours)]
    del engine

    def ask(
        source: WeightSource,
        question: Callable[[Reference, Case, Ours], T],
        said: Sequence[Ours],
        caching: Callable[[Any], dict[str, Any]] = uncached,
    ) -> list[T]:
        convoy = Convoy(BUDGET_BYTES)
        model = open_on_demand(checkpoint, lm_head, convoy, source)
        reference = Reference(model, processor, manifest, safety, caching)
        return convoy.run([functools.partial(question, reference, *pair) for pair in zip(cases, said, strict=True)])

    def follow(reference: Reference, case: Case, own: Ours) -> Original:
        steered = own.steered.tokens if own.steered and not quantised else []
        return reference.follow(case, own.plain.tokens, steered, own.image_tokens)

    report(f"{len(cases)} dialogues, PyTorch")
    checks = (
        compare(cases, ours, ask(checkpoint, follow, ours), manifest, quantised=quantised, wide=checkpoint.wide) + gate
    )
    limits, parts = limits_of(manifest), reading_and_answering(manifest)
    for suffix, part in parts.items():
        report(f"{len(cases)} dialogues, PyTorch on the package's own numbers{suffix}")
        said = answer_plainly(folder, part, cases, REPORTED_TOKENS) if suffix else [own.plain for own in ours]
        if len(parts) > 1 and not suffix:  # the answer is not this copy's
            said = [answered.first() for answered in said]
        caches = RoundedCaches(scales)
        found = ask(
            PackedWeights(folder, part, checkpoint) if quantised else checkpoint,
            beside_rounded if quantised else beside_exact,
            [replace(own, plain=answered) for own, answered in zip(ours, said, strict=True)],
            caches if scales else uncached,
        )
        if scales:
            found.append({"int8 caches, relative error": functools.reduce(worse, caches.errors)})
        checks += [judged(name + suffix, error, limits[name]) for name, error in worst_of(found).items()]
    golden, tolerance = goldens(cases, ours, manifest)
    return Validated(tuple(checks), golden, tolerance, proof)


def reading_and_answering(manifest: Manifest) -> dict[str, Manifest]:
    """What reads prompts as a package of its own and, where that is not the same, what writes answers; by what is added
    to the names of its lines.
    """
    answering = {name: spec for name, spec in manifest.graphs.items() if name not in PREFILL_GRAPHS.values()}
    reading = answering | {half: manifest.graphs[manifest.prefill_graph(half)] for half in PREFILL_GRAPHS}
    parts = {"": replace(manifest, graphs=reading)}
    return parts if reading == answering else parts | {" (answers)": replace(manifest, graphs=answering)}


def run_package(folder: Path, manifest: Manifest, cases: Sequence[Case], tokens: int) -> tuple[Engine, list[Ours]]:
    """The real Engine, on graphs in pieces, and what it makes of each case, in `tokens` tokens at most."""
    engine, convoy, watch = _open(folder, manifest)
    prompts = convoy.run([functools.partial(_prepare, engine, case) for case in cases])
    rows = watched_rows(manifest, [prompt for prompt, _ in prompts])
    n, strength = len(cases), manifest.refusal.strength if manifest.refusal else 0.0
    ways = [
        functools.partial(_answer, engine, tokens=tokens, watch=watch, watched_rows=rows),
        functools.partial(_answer, engine, tokens=1, chunks=3),
        *([functools.partial(_answer, engine, tokens=tokens, strength=strength)] if strength else []),
    ]
    answers = _answers(convoy, manifest, ways, [prompt for prompt, _ in prompts], tokens)
    plain, chunked, steered = answers[:n], answers[n : 2 * n], answers[2 * n :] or [None] * n
    return engine, [Ours(*entry) for entry in zip(*zip(*prompts, strict=True), plain, chunked, steered, strict=True)]


def answer_plainly(folder: Path, manifest: Manifest, cases: Sequence[Case], tokens: int) -> list[Answered]:
    """As `run_package`, but the plain answers alone."""
    engine, convoy, watch = _open(folder, manifest)
    prompts = [prompt for prompt, _ in convoy.run([functools.partial(_prepare, engine, case) for case in cases])]
    rows = watched_rows(manifest, prompts)
    way = functools.partial(_answer, engine, tokens=tokens, watch=watch, watched_rows=rows)
    return _answers(convoy, manifest, [way], prompts, tokens)


def watched_rows(manifest: Manifest, prompts: Sequence[EncodedPrompt]) -> int:
    """The longest prompt whose branches are looked at: one of WATCHED_BYTES, or the shortest there is."""
    dims = manifest.dims
    per_row = 4 * dims.hidden_size * len(BRANCHES) * dims.num_hidden_layers
    return max(WATCHED_BYTES // per_row, min(prompt.inputs_embeds.shape[1] for prompt in prompts))


def _open(folder: Path, manifest: Manifest) -> tuple[Engine, Convoy, Watch]:
    convoy, watch = Convoy(BUDGET_BYTES), Watch(*(f".{branch}" for branch in BRANCHES), "last_hidden_state")
    device, _ = find_device("cpu", None)
    load = functools.partial(GraphInPieces, convoy=convoy, watch=watch)
    return Engine(folder, manifest, device, load=load), convoy, watch


def _answers(
    convoy: Convoy,
    manifest: Manifest,
    ways: Sequence[Callable[[EncodedPrompt], Answered]],
    prompts: Sequence[EncodedPrompt],
    tokens: int,
) -> list[Answered]:
    """Each prompt answered in the first of `ways`, each in the second, ...; as many at a time as caches allow."""
    per_token = package_kv_bytes_per_token(manifest)
    jobs = [
        (functools.partial(way, prompt), (prompt.inputs_embeds.shape[1] + tokens) * per_token)
        for way in ways
        for prompt in prompts
    ]
    groups = grouped(jobs, lambda job: job[1], CACHE_BYTES)
    return [answer for group in groups for answer in convoy.run([job for job, _ in group])]


def _prepare(engine: Engine, case: Case) -> tuple[EncodedPrompt, list[list[int]] | None]:
    """A case's prompt and, where images are tokens, those."""
    spec = engine.manifest.image
    tokens = None
    if spec is not None and "image_tokenizer" in engine.graphs and case.images:
        alone = len(case.images) == 1
        tokens = [engine.encoder.tokenize(cut(open_image(image), spec, alone=alone)[0]) for image in case.images]
    if case.prompt_ids:
        return engine.encoder.prepare_ids(case.prompt_ids, Stats()), tokens
    return engine.encoder.prepare(case.messages, Stats()), tokens


def _answer(
    engine: Engine,
    prompt: EncodedPrompt,
    *,
    tokens: int,
    strength: float = 0.0,
    chunks: int = 1,
    watch: Watch | None = None,
    watched_rows: int = 0,
) -> Answered:
    """Greedy, in `tokens` tokens at most, with the prompt in so many chunks. With a `watch`, logits of every token are
    kept, and branches of prompts up to `watched_rows`.
    """
    length = prompt.inputs_embeds.shape[1]
    if watch and length <= watched_rows:
        watch.begin()
    request = engine.request(prompt, tokens, Stats(), chunk=-(-length // chunks))
    verdict = request.prefill_lower(engine.policy(Mode.MONITOR if engine.manifest.guarded else Mode.OFF))
    hidden = request.probed_mean()[0].copy()
    logits = [request.prefill_upper(strength).copy()]
    last = request.last_hidden_state()
    branches = watch.take() if watch else {}
    answer = [int(logits[0].argmax())]
    while len(answer) < request.max_tokens and answer[-1] not in engine.manifest.prompt.end_token_ids:
        logits.append(request.decode_step(answer[-1]).copy())
        answer.append(int(logits[-1].argmax()))
    least = min(map(lead, logits))
    return Answered(verdict, hidden, last, np.stack(logits if watch else logits[:1]), least, answer, branches)


def compare(
    cases: Sequence[Case],
    ours: Sequence[Ours],
    theirs: Sequence[Original],
    manifest: Manifest,
    *,
    quantised: bool,
    wide: bool = False,
) -> list[Check]:
    """The lines of the table that are about the original. `wide`: its weights do not fit 16 bits."""
    exact, limits = manifest.exact, limits_of(manifest)
    if wide and manifest.precision == "fp16" and exact:
        limits = limits | STORED_IN_HALF
    worst: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        worst[name] = worse(worst.get(name, 0.0), value)

    for case, own, original in zip(cases, ours, theirs, strict=True):
        if case.images or case.videos:
            note("pixel_values", _largest_difference(_pixel_values(case, manifest), original.pixel_values))
        if original.image_errors:
            note("image tokens that differ", original.image_errors.wrong)
            note("image tokens at near ties", original.image_errors.near_ties)
        embeds, plain = own.prompt.inputs_embeds[0], own.plain
        note("inputs_embeds", _relative(embeds, original.embeds))
        pictured = [row for row, key in enumerate(own.prompt.keys) if isinstance(key, tuple)]
        if pictured and not exact and embeds.shape == original.embeds.shape:
            note("image rows, 1 - cosine", _cosine_distance(embeds[pictured], original.embeds[pictured]))
        note("hidden state at the split", _relative(plain.hidden, original.hidden))
        said, possible = plain.logits[: len(original.logits)], original.logits > NEVER
        note("logits", _relative(said[possible], original.logits[possible]))
        note("logits, KL to original", divergence(said, original.logits))
        note("masked logits that differ", float(((said > NEVER) != possible).sum()))
        note("chunked prefill", _relative(own.chunked.logits[0][possible[0]], plain.logits[0][possible[0]]))
        note("greedy tokens that differ", _differing(plain.tokens[: len(original.tokens)], original.tokens))
        if own.steered is None or manifest.prober is None:
            continue
        if not quantised:
            note(
                "steered tokens that differ",
                _differing(own.steered.tokens[: len(original.steered_tokens)], original.steered_tokens),
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
        return judged(name, value, limit)

    return [Check("dialogues compared", float(len(cases)), None, True), *(check(*line) for line in worst.items())]


def beside_rounded(reference: Reference, case: Case, own: Ours) -> dict[str, float]:
    """How far a package is from PyTorch on the very numbers that it holds, as a whole and branch by branch."""
    rounded = reference.follow(case, own.plain.tokens, (), own.image_tokens)
    embeds, theirs = own.prompt.inputs_embeds[0], rounded.embeds
    if embeds.shape != theirs.shape:
        return {"embedded text, to rounded": math.inf}
    text, pictures = ([i for i, key in enumerate(own.prompt.keys) if isinstance(key, tuple) == it] for it in (0, 1))
    lines = {"embedded text, to rounded": _relative(embeds[text], theirs[text])}
    if pictures:
        common = theirs[pictures].mean(0)
        lines["image rows, error to rounded"] = row_error(embeds[pictures] - common, theirs[pictures] - common)
    off = (own.plain.hidden - rounded.hidden) / np.maximum(rounded.spread, 1e-30)
    lines["hidden state, error to rounded"] = float(np.sqrt(np.mean(off**2)))
    lines["logits, KL to rounded"] = divergence(own.plain.logits[: len(rounded.logits)], rounded.logits)
    return lines | beside_exact(reference, case, own)


def beside_exact(reference: Reference, case: Case, own: Ours) -> dict[str, float]:
    """The same, branch by branch alone."""
    if not own.plain.branches:
        return {}
    errors = reference.branches(own.prompt.inputs_embeds[0], own.plain.branches, own.plain.logits[:1])
    lines: dict[str, float] = {}
    for name, error in errors.items():
        line = BY_ITSELF[name.rpartition(".")[2]]
        lines[line] = worse(lines.get(line, 0.0), error)
    return lines


def worst_of(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """The largest of each line."""
    lines: dict[str, float] = {}
    for errors in found:
        lines |= {name: worse(lines.get(name, 0.0), error) for name, error in errors.items()}
    return lines


def reading_check(checkpoint: Checkpoint) -> Check:
    """The line about how the checkpoint is read: what it is mistaken for would be in package and reference alike."""
    differing = read_otherwise(checkpoint, decoder_facts(checkpoint, None).lm_head)
    return judged("tensors that Hugging Face reads otherwise", float(differing), 0.0)


def cache_scales_check(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Check:
    """The line about the scales of int8 caches."""
    error = cache_scales_error(folder, manifest, checkpoint)
    return judged("scales of int8 caches", error, LIMITS["scales of int8 caches"])


def audits(folder: Path, manifest: Manifest, checkpoint: Checkpoint, safety: SafetyArtifact | None) -> dict[str, Held]:
    """What each graph file holds."""
    rotary_emb = open_skeleton(checkpoint).get_decoder().rotary_emb
    files = (spec.file for spec in manifest.graphs.values())
    return {file: audit(folder / file, checkpoint, safety, rotary_emb) for file in files}


def stored_checks(manifest: Manifest, checkpoint: Checkpoint, held: dict[str, Held]) -> list[Check]:
    """The lines about what graph files hold."""
    lines = {
        "stored numbers that differ": float(sum(graph.differing for graph in held.values())),
        "rotary tables": functools.reduce(worse, (graph.rotary for graph in held.values())),
    }
    for suffix, part in reading_and_answering(manifest).items():
        if rounded := [found for spec in part.graphs.values() if (found := held[spec.file].rounding)]:
            worst = functools.reduce(Rounding.or_worse, rounded)
            lines |= {
                f"quantised weights, relative error{suffix}": worst.matrix,
                f"quantised weights, scale{suffix}": worst.scale,
                f"quantised rows{suffix}": worst.row,
                f"quantised columns{suffix}": worst.column,
                f"8-bit weights, steps{suffix}": worst.steps,
            }
    limits = limits_of(manifest)
    return [judged(name, value, limits.get(name.partition(" (")[0], 0.0)) for name, value in lines.items()]


def limits_of(manifest: Manifest) -> dict[str, float]:
    """The tolerances for what a package computes in."""
    limits = LIMITS if manifest.activations == "float32" else LIMITS | HALF_LIMITS
    if manifest.kv_cache.dtype == "int8":
        limits = limits | CACHES_LIMITS
    if any(spec.precision in ("int8", "int4") for spec in manifest.graphs.values()):
        limits = limits | ROUNDED_LIMITS
    return limits


def _pixel_values(case: Case, manifest: Manifest) -> np.ndarray:
    """Of a case's images and then its videos, (tiles, 3, size, size)."""
    spec, alone = manifest.image, len(case.images) == 1
    assert spec is not None
    pixels = [prepare(open_image(image), spec, alone=alone) for image in case.images]
    if manifest.video:
        pixels += [normalise(list(tiles(frames, spec.tile_size)), manifest.video) for frames in case.videos]
    return np.concatenate(pixels)


def gate_checks(engine: Engine, safety: SafetyArtifact) -> list[Check]:
    """The prober's graph and the Refusal Head's against their formulas; the latter also at strength 0, where it must be
    nothing at all.
    """
    return [prober_check(engine, safety), *refusal_head_checks(engine, safety)]


def prober_check(engine: Engine, safety: SafetyArtifact) -> Check:
    """On random hidden states of many sizes: for some of them it is in two minds, and every weight counts."""
    reference = Reference(None, None, engine.manifest, safety)
    directions = np.random.default_rng(0).standard_normal((8, 1, engine.manifest.dims.hidden_size))
    states = [(size * one).astype(np.float32) for size in np.geomspace(1e-3, 100, 26) for one in directions]
    ours = [float(engine.graphs["prober"].run({"hidden_states": state})[0][0]) for state in states]
    errors = [abs(p - reference.p_unsafe(torch.from_numpy(state[0]))) for p, state in zip(ours, states, strict=True)]
    return judged("prober", functools.reduce(worse, errors), LIMITS["prober"])


def refusal_head_checks(engine: Engine, safety: SafetyArtifact) -> list[Check]:
    """The Refusal Head's graph against its formula, and at strength 0, where it must be nothing at all."""
    shape, dtype = (1, 1, engine.manifest.dims.hidden_size), engine.manifest.activations
    hidden = np.random.default_rng(0).standard_normal(shape).astype(dtype).astype(np.float32)
    strength, matrix = safety.facts.strength, safety.steer_matrix.numpy()

    def steered(strength: float) -> np.ndarray:
        inputs = {"last_hidden_state": hidden.astype(dtype), "strength": np.array([strength], np.float32)}
        return engine.graphs["refusal_head"].run(inputs)[0].astype(np.float32)

    error = _relative(steered(strength), hidden + np.float32(strength) * hidden @ matrix.T)
    changes = float(np.abs(steered(0.0) - hidden).max())
    limit = limits_of(engine.manifest)["refusal head"]
    return [judged("refusal head", error, limit), judged("strength 0 changes", changes, 0.0)]


def refusal_checks(engine: Engine, cases: Sequence[Case], ours: Sequence[Ours]) -> list[Check]:
    """What becomes of the safety folder's own unsafe prompts: caught, and steered into refusals. None without such."""
    pairs = [(own.plain, own.steered) for case, own in zip(cases, ours, strict=True) if case.unsafe and own.steered]
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
    """Whether an answer is the package's own refusal, as far as it goes, or another."""
    assert engine.manifest.refusal is not None
    said, refusal = engine.tokenizer.decode(tokens).strip(), engine.manifest.refusal.text.strip()
    return is_refusal(said) or said.startswith(refusal) or (len(said) > 2 and refusal.startswith(said))


def judged(name: str, value: float, limit: float | None) -> Check:
    """A line of the table; an error without bound fails even where it is only reported."""
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
    """KL divergence of our next-token distributions from theirs, logits (n, V) each, nats, on average over rows."""
    if ours.shape != theirs.shape:
        return math.inf
    p, q = _log_softmax(theirs), _log_softmax(ours)
    possible = theirs > NEVER
    return float(np.where(possible, np.exp(p) * (p - q), 0.0).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _differing(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Tokens after which the two no longer agree, 0 where they are equal."""
    agree = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return float(max(len(ours), len(theirs)) - agree)

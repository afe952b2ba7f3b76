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

None of the three is ever in memory as a whole: first the package runs in pieces (pieces.py), then PyTorch follows its
answers, layer by layer (on_demand.py, reference.py). All dialogues go through together (convoy.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autosteer.runtime.engine import Engine
from autosteer.runtime.gate import Mode, Verdict, is_safe
from autosteer.runtime.image import cut, normalise, open_image, prepare
from autosteer.runtime.judge import is_refusal
from autosteer.runtime.manifest import PREFILL_GRAPHS, Check, GateProof, Golden, Manifest, Tolerance
from autosteer.runtime.request import Prompt, Stats
from autosteer.runtime.subgraph import find_device
from autosteer.runtime.video import tiles

from .cases import affordable, make_cases
from .checkpoint import Checkpoint, load_processor
from .convoy import Convoy, grouped
from .decoder import decoder_facts
from .footprint import package_kv_bytes_per_token
from .golden import gate_proof, goldens, lead
from .kv_scales import RoundedCaches, uncached
from .on_demand import WeightSource, open_on_demand
from .pieces import GraphInPieces
from .reference import ANSWER_TOKENS, NEVER, Case, Original, Reference
from .safety.artifact import SafetyArtifact
from .unpack import PackedWeights, packed_kv_scales, worse

BUDGET_BYTES = 512 << 20  # weights of a package, or of an original, that stay loaded
CACHE_BYTES = 3 << 29  # KV caches of answers that are under way together; each group of them costs its own sweeps
REPORTED_TOKENS = ANSWER_TOKENS // 2  # of an answer, where they are not judged: each costs a sweep over the package
VERDICT_BAND = 0.1  # quantised packages: verdicts may differ where the original's p_unsafe is this near the threshold
REPORTED = ("image tokens at near ties", "dialogues compared")  # never judged
CHOICES = ("greedy tokens that differ", "steered tokens that differ")  # judged where arithmetic is float32

# Every tolerance, with its reason. Relative: largest difference over the reference's largest value.
LIMITS = {
    "pixel_values": 1e-6,  # the same Pillow calls, then float32 arithmetic
    "inputs_embeds": 1e-4,  # image features among them: float32 sums in another order
    "hidden state at the split": 1e-4,
    "logits": 1e-3,  # N more layers of the same
    "p_unsafe": 1e-3,  # absolute: the hidden state's error through a steep softmax
    "quantised weights, relative error": 0.5,  # of one matrix; int4 leaves 0.1 to 0.2, misplaced codes 1
    "int8 caches, relative error": 0.1,  # of one layer's keys or values; sound scales leave 0.01 to 0.05
    "hidden state, cosine to rounded": 5e-3,  # 1 - cosine; int8 activations
    "logits, cosine to rounded": 2e-2,  # 1 - cosine; the same, through all layers
    "image rows, 1 - cosine": 1e-2,  # int8 image graphs: a sound one gives 1e-3; outliers that drown the rest, more
    "refusal head": 1e-5,  # one product with a matrix, in float32
    "chunked prefill": 1e-4,  # other matrix shapes, other summation order
}

# Where a package computes in float16: 11 bits, 5e-4 for each rounding. On a CPU onnxruntime casts to float32 around
# operators that it has no float16 kernel for; a GPU rounds oftener.
HALF_LIMITS = LIMITS | {
    "inputs_embeds": 5e-3,  # the image tower's layers among it
    "hidden state at the split": 2e-2,  # relative to its largest value, which is what rounds the others
    "logits": 5e-2,
    "p_unsafe": 2e-2,
    "refusal head": 1e-3,  # float32, but its input and output are rounded
    "chunked prefill": 2e-2,
}

# Where weights of 24 bits are stored in 11 (fp16 of a float32 or packed checkpoint): each is off by up to 2^-11 = 5e-4.
# The demo in float32: embeddings 5.5e-4, hidden state 8.2e-4, logits 4.9e-4, p_unsafe 1e-5; tokens must still be equal.
STORED_IN_HALF = {"inputs_embeds": 2e-3, "hidden state at the split": 4e-3, "logits": 4e-3}

Report = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Answered:
    """One answer of the package."""

    verdict: Verdict
    hidden: np.ndarray  # (D,) what the prober read
    last: np.ndarray  # (D,) the last hidden state of the prompt, before the Refusal Head
    logits: np.ndarray  # (V,) after the prompt
    lead: float  # least by which a token of the answer leads the next likely: see golden.lead
    tokens: list[int]


@dataclass(frozen=True)
class Ours:
    """What the package made of a case."""

    prompt: Prompt
    image_tokens: list[list[int]] | None  # where images are tokens
    plain: Answered
    chunked: Answered  # with the prompt in chunks, one token
    steered: Answered | None  # None without a gate


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
    weights = any(spec.precision in ("int8", "int4") for spec in manifest.graphs.values())
    scales = packed_kv_scales(folder, manifest)
    quantised = weights or bool(scales)
    processor = load_processor(checkpoint)
    cases = make_cases(folder, manifest, safety)
    cases = affordable(cases, checkpoint, Reference(None, processor, manifest, safety))
    report(f"{len(cases)} dialogues, the package")
    engine, ours = run_package(folder, manifest, cases, REPORTED_TOKENS if quantised else ANSWER_TOKENS)
    gate, proof = list[Check](), None
    if safety:
        proof, telling = gate_proof(folder, engine, cases, ours, safety)
        gate = [*refusal_head_checks(engine, safety), *telling, *refusal_checks(engine, cases, ours)]
    del engine

    def ask(
        source: WeightSource,
        question: Callable[[Reference, Case, Ours], T],
        caching: Callable[[Any], dict[str, Any]] = uncached,
    ) -> list[T]:
        convoy = Convoy(BUDGET_BYTES)
        model = open_on_demand(checkpoint, decoder_facts(checkpoint, None).lm_head, convoy, source)
        reference = Reference(model, processor, manifest, safety, caching)
        return convoy.run([functools.partial(question, reference, *pair) for pair in zip(cases, ours, strict=True)])

    def follow(reference: Reference, case: Case, own: Ours) -> Original:
        steered = own.steered.tokens if own.steered and not quantised else []
        return reference.follow(case, own.plain.tokens, steered, own.image_tokens)

    report(f"{len(cases)} dialogues, PyTorch")
    checks = compare(cases, ours, ask(checkpoint, follow), manifest, quantised=quantised, wide=checkpoint.wide) + gate
    for suffix, part in reading_and_answering(manifest).items() if quantised else ():
        report(f"{len(cases)} dialogues, PyTorch on rounded numbers{suffix}")
        seen = read_prompts(folder, part, cases) if suffix else [own.plain for own in ours]
        packed, caches = PackedWeights(folder, part, checkpoint), RoundedCaches(scales)
        rounded = ask(
            packed,
            lambda reference, case, own: reference.prompt(case, own.image_tokens),
            caches if scales else uncached,
        )
        pairs = list(zip(seen, rounded, strict=True))
        lines: dict[str, Iterable[float]] = {
            "hidden state, cosine to rounded": [_cosine_distance(own.hidden, hidden) for own, (hidden, _) in pairs],
            "logits, cosine to rounded": [_logits_distance(own.logits, logits) for own, (_, logits) in pairs],
        }
        if weights:
            lines["quantised weights, relative error"] = packed.errors.values()
        if scales:
            lines["int8 caches, relative error"] = caches.errors
        checks += [
            judged(name + suffix, functools.reduce(worse, errors), LIMITS[name]) for name, errors in lines.items()
        ]
    golden, tolerance = goldens(cases, ours, manifest)
    return Validated(tuple(checks), golden, tolerance, proof)


def reading_and_answering(manifest: Manifest) -> dict[str, Manifest]:
    """What reads prompts as a package of its own and, where that is not the same, what writes answers; by what is added
    to the names of its lines.
    """
    answering = {name: spec for name, spec in manifest.graphs.items() if name not in PREFILL_GRAPHS.values()}
    reading = answering | {half: manifest.graphs[manifest.reader(half)] for half in PREFILL_GRAPHS}
    parts = {"": replace(manifest, graphs=reading)}
    return parts if reading == answering else parts | {" (answers)": replace(manifest, graphs=answering)}


def run_package(folder: Path, manifest: Manifest, cases: Sequence[Case], tokens: int) -> tuple[Engine, list[Ours]]:
    """The real Engine, on graphs in pieces, and what it makes of each case, in `tokens` tokens at most."""
    engine, convoy = _open(folder, manifest)
    prompts = convoy.run([functools.partial(_prepare, engine, case) for case in cases])
    n, strength = len(cases), manifest.refusal.strength if manifest.refusal else 0.0
    ways = [
        functools.partial(_answer, engine, tokens=tokens),
        functools.partial(_answer, engine, tokens=1, chunks=3),
        *([functools.partial(_answer, engine, tokens=tokens, strength=strength)] if strength else []),
    ]
    answers = _answers(convoy, manifest, ways, [prompt for prompt, _ in prompts], tokens)
    plain, chunked, steered = answers[:n], answers[n : 2 * n], answers[2 * n :] or [None] * n
    return engine, [Ours(*entry) for entry in zip(*zip(*prompts, strict=True), plain, chunked, steered, strict=True)]


def read_prompts(folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Answered]:
    """As `run_package`, but the prompts alone."""
    engine, convoy = _open(folder, manifest)
    prompts = convoy.run([functools.partial(_prepare, engine, case) for case in cases])
    way = functools.partial(_answer, engine, tokens=1)
    return _answers(convoy, manifest, [way], [prompt for prompt, _ in prompts], 1)


def _open(folder: Path, manifest: Manifest) -> tuple[Engine, Convoy]:
    convoy = Convoy(BUDGET_BYTES)
    device, _ = find_device("cpu", None)
    return Engine(folder, manifest, device, load=functools.partial(GraphInPieces, convoy=convoy)), convoy


def _answers(
    convoy: Convoy,
    manifest: Manifest,
    ways: Sequence[Callable[[Prompt], Answered]],
    prompts: Sequence[Prompt],
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


def _prepare(engine: Engine, case: Case) -> tuple[Prompt, list[list[int]] | None]:
    """A case's prompt and, where images are tokens, those."""
    spec = engine.manifest.image
    tokens = None
    if spec is not None and "image_tokenizer" in engine.graphs and case.images:
        alone = len(case.images) == 1
        tokens = [engine.encoder.tokenize(cut(open_image(image), spec, alone=alone)[0]) for image in case.images]
    if case.prompt_ids:
        return engine.encoder.prepare_ids(case.prompt_ids, Stats()), tokens
    return engine.encoder.prepare(case.messages, Stats()), tokens


def _answer(engine: Engine, prompt: Prompt, *, tokens: int, strength: float = 0.0, chunks: int = 1) -> Answered:
    """Greedy, in `tokens` tokens at most, with the prompt in so many chunks."""
    length = prompt.inputs_embeds.shape[1]
    request = engine.request(prompt, tokens, Stats(), chunk=-(-length // chunks))
    verdict = request.judge(engine.policy(Mode.MONITOR if engine.manifest.guarded else Mode.OFF))
    hidden = request.probed_row()[0].copy()
    first = logits = request.begin(strength).copy()
    last, least = request.last_hidden_state(), lead(first)
    answer = [int(first.argmax())]
    while len(answer) < request.max_tokens and answer[-1] not in engine.manifest.prompt.end_token_ids:
        logits = request.step(answer[-1])
        answer.append(int(logits.argmax()))
        least = min(least, lead(logits))
    return Answered(verdict, hidden, last, first, least, answer)


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
        possible = original.logits > NEVER
        note("logits", _relative(plain.logits[possible], original.logits[possible]))
        note("masked logits that differ", float(((plain.logits > NEVER) != possible).sum()))
        note("chunked prefill", _relative(own.chunked.logits[possible], plain.logits[possible]))
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


def limits_of(manifest: Manifest) -> dict[str, float]:
    """The tolerances for what a package computes in."""
    return LIMITS if manifest.activations == "float32" else HALF_LIMITS


def _pixel_values(case: Case, manifest: Manifest) -> np.ndarray:
    """Of a case's images and then its videos, (tiles, 3, size, size)."""
    spec, alone = manifest.image, len(case.images) == 1
    assert spec is not None
    pixels = [prepare(open_image(image), spec, alone=alone) for image in case.images]
    if manifest.video:
        pixels += [normalise(list(tiles(frames, spec.tile_size)), manifest.video) for frames in case.videos]
    return np.concatenate(pixels)


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


def _logits_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The same of logits, of tokens that are possible."""
    return _cosine_distance(ours[theirs > NEVER], theirs[theirs > NEVER])


def _differing(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Tokens after which the two no longer agree, 0 where they are equal."""
    agree = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return float(max(len(ours), len(theirs)) - agree)

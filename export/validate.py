"""Run the package that was written against the PyTorch original. A failed line fails the export.

Two references, both in float32:

    original   the checkpoint itself: what users compare us with rounded    the same model holding the weights that
    the package holds (quantised and back): what our graphs must compute

At fp32 and fp16 the two are compared on tokens, and tokens must be equal. Quantised packages must agree with
`rounded` up to the int8 activations of the kernels, and with `original` on every verdict outside a band around the
threshold; how far their tokens and scores are from the original's is reported, not judged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autosteer.runtime.engine import Engine
from autosteer.runtime.gate import GatePolicy, Mode, is_safe
from autosteer.runtime.image import open_image, prepare
from autosteer.runtime.manifest import Check, Golden, Manifest
from autosteer.runtime.request import Prompt, Stats
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.text import Message, opening_tokens

from .checkpoint import Checkpoint, load_reference
from .safety.artifact import SafetyArtifact
from .unpack import PackedWeights
from .vision import VQTokenizer

ANSWER_TOKENS = 16
VERDICT_BAND = (
    0.1  # quantised packages: verdicts may differ where the original's p_unsafe is this close to the threshold
)

NEAR_TIE = 5e-5  # of the largest squared distance: torch and onnxruntime differ by 1.4e-5 at Chameleon's depth
REPORTED = ("image tokens at near ties",)  # never judged
NEVER = -1e38  # logits below it belong to tokens that HF masks with the lowest float32

# Every tolerance, with its reason. Relative: largest difference over the reference's largest value.
LIMITS = {
    "pixel_values": 1e-6,  # the same Pillow calls, then float32 arithmetic
    "inputs_embeds": 1e-4,  # image features among them: float32 sums in another order
    "hidden state at the split": 1e-4,
    "logits": 1e-3,  # N more layers of the same
    "p_unsafe": 1e-3,  # absolute: the hidden state's error through a steep softmax
    "quantised weights, relative error": 0.5,  # of one matrix; int4 leaves 0.1 to 0.2, misplaced codes 1
    "hidden state at the split, cosine to rounded": 5e-3,  # 1 - cosine; int8 activations per block
    "inputs_embeds, 1 - cosine": 1e-2,  # int8 image graphs: a sound one gives 1e-3; outliers that drown the rest, more
    "chunked prefill": 1e-4,  # other matrix shapes, other summation order
}


@dataclass(frozen=True)
class Case:
    """A dialogue to compare on. `image_files` are relative to the package."""

    messages: tuple[Message, ...]
    image_files: tuple[str, ...]

    @property
    def images(self) -> list[Any]:
        return [image for message in self.messages for image in message.images]


@dataclass(frozen=True)
class ImageErrors:
    """The package's image tokens that are not Hugging Face's."""

    wrong: int
    near_ties: int  # two codes were equally near, up to rounding; there is no right one


@dataclass(frozen=True)
class Original:
    """What PyTorch made of a case."""

    pixel_values: list[np.ndarray]  # per image (tiles, 3, size, size)
    image_errors: ImageErrors | None  # of the package's image tokens, where images are tokens
    embeds: np.ndarray  # (S, D)
    hidden: np.ndarray  # (D,) at the prober's token
    logits: np.ndarray  # (V,) after the prompt
    p_unsafe: float
    tokens: list[int]
    steered_tokens: list[int]


def validate_package(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    safety: SafetyArtifact | None,
    report: Callable[[str], None],
) -> tuple[tuple[Check, ...], tuple[Golden, ...]]:
    """Compare the package in `folder` with its checkpoint: the table, and the golden outputs for autosteer-check.

    The caller decides what to do with failed lines.
    """
    cases = make_cases(folder, manifest)
    report("loading the PyTorch original")
    model, processor = load_reference(checkpoint)
    reference = Reference(model, processor, manifest, safety)
    engine = Engine.load(folder, device="cpu")
    originals = [reference.run(case, image_tokens(engine, case)) for case in _each(cases, report, "PyTorch")]
    exact = not any(spec.precision in ("int8", "int4") for spec in manifest.graphs.values())
    checks = _compare(engine, cases, originals, safety, report, exact=exact)
    if not exact:
        report("comparing with PyTorch on rounded weights")
        checks.append(reference.round_weights(PackedWeights(folder, manifest, checkpoint)))
        checks.append(_rounded_check(engine, cases, reference))
    goldens = [golden(engine, case, threshold) for case in cases for threshold in _golden_thresholds(manifest)]
    return tuple(checks), tuple(g for g in goldens if g is not None)


def make_cases(folder: Path, manifest: Manifest) -> list[Case]:
    """Dialogues with no, one, two images; square, wide, tall; two turns. Pictures are drawn and kept in golden/."""
    cases = [
        Case((Message.user("Name three colours."),), ()),
        Case((Message.user("hello"), Message.assistant("hello!"), Message.user("what can you do?")), ()),
    ]
    if manifest.image is None:
        return cases
    (folder / "golden").mkdir(exist_ok=True)
    size = manifest.image.tile_size
    shapes = {"square": (size, size), "wide": (size * 2 + 7, size - 5), "tall": (size - 9, size * 3), "small": (33, 21)}
    files = {name: f"golden/{name}.png" for name in shapes}
    for seed, (name, (width, height)) in enumerate(shapes.items()):
        draw(width, height, seed).save(folder / files[name])

    def turn(text: str, *names: str) -> Message:
        return Message.user(text, [folder / files[name] for name in names])

    cases += [Case((turn("what is shown here?", name),), (files[name],)) for name in shapes]
    cases += [
        Case((turn("compare the two pictures.", "wide", "small"),), (files["wide"], files["small"])),
        Case((turn("describe it.", "wide"), Message.assistant("a picture."), turn("how many?")), (files["wide"],)),
    ]
    return cases


def image_tokens(engine: Engine, case: Case) -> list[list[int]] | None:
    """The package's token ids of a case's images; None where images are not tokens, or there are none."""
    spec = engine.manifest.image
    if spec is None or "image_tokenizer" not in engine.graphs or not case.images:
        return None
    alone = len(case.images) == 1
    return [engine.tokenize_image(prepare(open_image(image), spec, alone=alone)) for image in case.images]


def draw(width: int, height: int, seed: int) -> Image.Image:
    """A smooth gradient with a few rectangles: structure at several scales, the same on every machine."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1)
    for _ in range(6):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        base[top : top + height // 3 + 1, left : left + width // 3 + 1] = rng.integers(0, 256, 3)
    return Image.fromarray(base.astype(np.uint8))


class Reference:
    """The PyTorch original, asked the questions that the runtime is asked."""

    def __init__(self, model: Any, processor: Any, manifest: Manifest, safety: SafetyArtifact | None):
        self.model, self.processor, self.manifest, self.safety = model, processor, manifest, safety

    def inputs(self, case: Case) -> dict[str, Any]:
        """The processor's tensors for a case."""
        messages = [
            {
                "role": m.role,
                "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in m.parts],
            }
            for m in case.messages
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures = [Image.fromarray(open_image(image)) for image in case.images]
        return dict(self.processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt"))

    @torch.no_grad()
    def run(self, case: Case, ours: list[list[int]] | None = None) -> Original:
        """Everything PyTorch computes of a case.

        `ours` are the package's image tokens. Where they differ from HF's at near ties only, PyTorch goes on with ours,
        so that what follows is still compared.
        """
        inputs = self.inputs(case)
        pixel_values = inputs.get("pixel_values", torch.empty(0))
        probed = self._probed(case, inputs["input_ids"][0])
        inputs, errors = self._agreed(inputs, ours) if ours else (inputs, None)
        hidden_states, logits = self.forward(inputs)
        hidden = hidden_states[self.manifest.split_layer][0, probed].mean(dim=0)
        return Original(
            pixel_values=[p.numpy().reshape(-1, *p.shape[-3:]) for p in pixel_values],
            image_errors=errors,
            embeds=hidden_states[0][0].numpy(),
            hidden=hidden.numpy(),
            logits=logits.numpy(),
            p_unsafe=self.p_unsafe(hidden),
            tokens=self.generate(inputs),
            steered_tokens=self.generate(inputs, strength=self.safety.facts.strength) if self.safety else [],
        )

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """(hidden states of every layer, logits (V,) after the prompt)"""
        out = self.model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        return out.hidden_states, out.logits[0, -1]

    @torch.no_grad()
    def image_tokens(self, pixel_values: torch.Tensor) -> list[list[int]]:
        """Token ids of images (n, 3, size, size)."""
        return self.model.get_image_tokens(pixel_values).tolist() if len(pixel_values) else []

    @torch.no_grad()
    def image_errors(self, pixel_values: torch.Tensor, ours: list[list[int]]) -> ImageErrors:
        """Compare the package's tokens of images (n, 3, size, size) with HF's."""
        theirs = torch.tensor(self.image_tokens(pixel_values)).flatten()
        differ = (theirs != torch.tensor(ours).flatten()).nonzero().flatten()
        if not len(differ):
            return ImageErrors(0, 0)
        wrapper = VQTokenizer(self.model)
        code = {int(token): i for i, token in enumerate(wrapper.constants["token_ids"])}
        distances = wrapper.distances(pixel_values)[differ]
        chosen = torch.tensor([code[token] for token in torch.tensor(ours).flatten()[differ].tolist()])
        excess = distances.gather(1, chosen[:, None])[:, 0] - distances.amin(1)
        ties = int((excess <= NEAR_TIE * distances.amax(1)).sum())
        return ImageErrors(len(differ) - ties, ties)

    def _agreed(self, inputs: dict[str, Any], ours: list[list[int]]) -> tuple[dict[str, Any], ImageErrors]:
        """The inputs, with our image tokens instead of pixels where they differ from HF's at near ties only."""
        errors = self.image_errors(inputs["pixel_values"], ours)
        if errors.wrong or not errors.near_ties:
            return inputs, errors
        ids = inputs["input_ids"].clone()
        ids[ids == self.processor.image_token_id] = torch.tensor(ours).flatten()
        return {name: t for name, t in inputs.items() if name != "pixel_values"} | {"input_ids": ids}, errors

    def hidden(self, case: Case, ours: list[list[int]] | None = None) -> np.ndarray:
        """The row the prober reads, (D,); `ours` as in `run`."""
        inputs = self.inputs(case)
        probed = self._probed(case, inputs["input_ids"][0])
        hidden_states, _ = self.forward(self._agreed(inputs, ours)[0] if ours else inputs)
        return hidden_states[self.manifest.split_layer][0, probed].mean(dim=0).numpy()

    def p_unsafe(self, hidden: torch.Tensor) -> float:
        """The authors' prober on one hidden state (D,); nan where the package has none."""
        if self.safety is None:
            return float("nan")
        w = self.safety.prober
        x = torch.relu(w["0.weight"] @ hidden + w["0.bias"])
        return float(torch.softmax(w["2.weight"] @ x + w["2.bias"], 0)[0])

    def generate(self, inputs: dict[str, Any], strength: float = 0.0, tokens: int = ANSWER_TOKENS) -> list[int]:
        """Greedy tokens; steered as the authors do, by an output embedding E + strength * E W."""
        head, plain = self.model.lm_head, self.model.lm_head.weight
        if strength:
            assert self.safety is not None
            steered = plain + strength * plain @ self.safety.steer_matrix
            head.weight = torch.nn.Parameter(steered, requires_grad=False)
        try:
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        finally:
            head.weight = plain
        return list(map(int, out[0, inputs["input_ids"].shape[1] :]))

    @torch.no_grad()
    def round_weights(self, packed: PackedWeights) -> Check:
        """Replace every weight that the package quantises by what is left of it; the check says how far that is off."""
        name, errors = "quantised weights, relative error", [0.0]
        for matrix in packed.names:
            weight, rounded = self.model.get_parameter(matrix), packed.matrix(matrix)
            errors.append(float((rounded - weight).norm() / weight.norm()))
            weight.copy_(rounded)
        return judged(name, functools.reduce(worse, errors), LIMITS[name])

    def _probed(self, case: Case, ids: torch.Tensor) -> torch.Tensor:
        """Rows whose mean the prober reads, of HF's own input ids (S,) with a placeholder for each row of a picture."""
        prober = self.manifest.prober
        last = len(ids) + (prober.token_offset if prober else -1)
        if prober is None or prober.pooling == "last":
            return torch.tensor([last])
        image = getattr(self.processor, "image_token_id", None)
        text = torch.arange(len(ids)) if image is None else (ids != image).nonzero()[:, 0]
        tokenizer = self.processor.tokenizer.backend_tokenizer
        rows = text[opening_tokens(case.messages, self.manifest.prompt, tokenizer) :]
        return rows[rows <= last]


def _compare(
    engine: Engine,
    cases: Sequence[Case],
    originals: Sequence[Original],
    safety: SafetyArtifact | None,
    report: Callable[[str], None],
    *,
    exact: bool,
) -> list[Check]:
    manifest = engine.manifest
    worst: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        worst[name] = worse(worst.get(name, 0.0), value)

    for case, original in zip(_each(cases, report, "ONNX Runtime"), originals, strict=True):
        for pixels, image in zip(original.pixel_values, case.images, strict=True):
            assert manifest.image is not None
            ours = prepare(open_image(image), manifest.image, alone=len(case.images) == 1)
            note("pixel_values", float(np.abs(ours - pixels[: len(ours)]).max()))
        if original.image_errors:
            note("image tokens that differ", original.image_errors.wrong)
            note("image tokens at near ties", original.image_errors.near_ties)
        prompt = engine.prepare(case.messages, Stats())
        note("inputs_embeds", _relative(prompt.inputs_embeds[0], original.embeds))
        if not exact:
            note("inputs_embeds, 1 - cosine", _cosine_distance(prompt.inputs_embeds[0], original.embeds))
        hidden, p_unsafe, logits = _first_step(engine, prompt)
        note("hidden state at the split", _relative(hidden, original.hidden))
        possible = original.logits > NEVER
        note("logits", _relative(logits[possible], original.logits[possible]))
        note("masked logits that differ", float(((logits > NEVER) != possible).sum()))
        note("chunked prefill", _relative(_first_step(engine, prompt, chunk=7)[2][possible], logits[possible]))
        tokens = engine.generate(case.messages, policy=engine.policy(Mode.OFF), sampling=GREEDY).token_ids
        note("greedy tokens that differ", _differing(tokens, original.tokens))
        if safety is None:
            continue
        note("strength 0 changes logits", float(np.abs(_first_step(engine, prompt, strength=0.0)[2] - logits).max()))
        steered = engine.generate(case.messages, policy=always_steer(engine), sampling=GREEDY).token_ids
        note("steered tokens that differ", _differing(steered, original.steered_tokens))
        note("p_unsafe", abs(p_unsafe - original.p_unsafe))
        threshold = safety.facts.threshold
        differs = is_safe(p_unsafe, threshold) != is_safe(original.p_unsafe, threshold)
        outside = exact or abs(original.p_unsafe - threshold) > VERDICT_BAND
        note(
            "verdicts that differ" if exact else f"verdicts that differ outside +-{VERDICT_BAND}",
            float(differs and outside),
        )

    def check(name: str, value: float) -> Check:
        always = name.startswith(
            ("pixel_values", "image tokens that", "masked", "verdicts", "strength", "inputs_embeds, ")
        )
        limit = LIMITS.get(name, 0.0) if (exact and name not in REPORTED) or always else None
        return judged(name, value, limit)

    return [check(name, value) for name, value in worst.items()]


def _rounded_check(engine: Engine, cases: Sequence[Case], reference: Reference) -> Check:
    name = "hidden state at the split, cosine to rounded"
    distances = []
    for case in cases:
        ours = _first_step(engine, engine.prepare(case.messages, Stats()))[0]
        theirs = reference.hidden(case, image_tokens(engine, case))
        distances.append(_cosine_distance(ours, theirs))
    return judged(name, functools.reduce(worse, distances), LIMITS[name])


def worse(one: float, other: float) -> float:
    """The larger of two errors. NaN is the largest: `max` forgets it, and a graph of NaNs would pass for exact."""
    return math.inf if math.isnan(one) or math.isnan(other) else max(one, other)


def judged(name: str, value: float, limit: float | None) -> Check:
    """A line of the table; an error without bound fails even where it is only reported."""
    return Check(name, value, limit, value < math.inf and (limit is None or value <= limit))


GREEDY = SamplingConfig(max_tokens=ANSWER_TOKENS, speculate=False)  # what a plain loop says, in any language


def always_steer(engine: Engine) -> GatePolicy:
    """A policy that finds every prompt unsafe."""
    return engine.policy(Mode.STEER, threshold=-1.0)


def _first_step(
    engine: Engine, prompt: Prompt, *, chunk: int = 1 << 20, strength: float | None = None
) -> tuple[np.ndarray, float, np.ndarray]:
    """(probed hidden state (D,), p_unsafe, logits (V,)) of a prompt; `strength` 0.0 goes through the Refusal Head."""
    request = engine.request(prompt, 1, Stats(), chunk=chunk)
    verdict = request.judge(engine.policy(Mode.MONITOR if engine.manifest.guarded else Mode.OFF))
    hidden = request.probed_row()[0].copy()
    logits = request.begin(0.0 if strength is None else strength, through_head=strength is not None)
    return hidden, float("nan") if verdict.p_unsafe is None else verdict.p_unsafe, logits.copy()


def golden(engine: Engine, case: Case, threshold: float | None) -> Golden | None:
    """What the package answers to a single-turn case; None for dialogues."""
    if len(case.messages) > 1:
        return None
    text = next(part for part in case.messages[0].parts if isinstance(part, str))
    mode = Mode.STEER if engine.manifest.guarded else Mode.OFF
    answer = engine.generate(case.messages, policy=engine.policy(mode, threshold=threshold), sampling=GREEDY)
    verdict = answer.verdict
    return Golden(text, case.image_files, threshold, verdict.p_unsafe, verdict.action.value, answer.token_ids)


def _golden_thresholds(manifest: Manifest) -> tuple[float | None, ...]:
    return (None, -1.0) if manifest.guarded else (None,)


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


def _differing(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Tokens after which the two no longer agree, 0 where they are equal."""
    agree = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return float(max(len(ours), len(theirs)) - agree)


def _each(cases: Sequence[Case], report: Callable[[str], None], what: str) -> Any:
    for i, case in enumerate(cases, 1):
        report(f"{what}: prompt {i} of {len(cases)}")
        yield case

"""Packages of tiny random checkpoints, and the PyTorch original beside each: what the tests of families share."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from cpp_runtime import in_python, joined, through_c
from llama_tokenizer import LICENCE
from PIL import Image, ImageOps
from traced import trace_once

from autosteer.export.checkpoint import on_demand
from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.checkpoint.hf_model import load_hf_model
from autosteer.export.checkpoint.layer_sweep import LayerSweep
from autosteer.export.checkpoint.open import open_checkpoint
from autosteer.export.checkpoint.renderer import Renderer
from autosteer.export.cli import export
from autosteer.export.graphs.dynamic_int8 import linear_weight
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.safety import states
from autosteer.export.safety.model import FitModel, open_fit_model
from autosteer.export.safety.pairs import Prompt
from autosteer.export.safety_folder import LayerScore, SafetyArtifact, SafetyFacts
from autosteer.export.validation.original import ANSWER_TOKENS, OriginalModel, ValidationPrompt
from autosteer.export.validation.prompts import draw
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import CheckError, UnsupportedModelError
from autosteer.runtime.gate import Mode, is_safe
from autosteer.runtime.image import prepare
from autosteer.runtime.manifest import Check, Manifest
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import ImagePart, Message, Part

trace_once()
READ_IN_8_BITS = "int4 --prefill-precision int8 --kv-cache int8"


def picture(seed: int) -> Image.Image:
    """Odd sides, structure or noise."""
    rng = np.random.default_rng(seed)
    width, height = (int(n) for n in rng.integers(1, 150, 2) * 2 + 1)
    if seed % 2:
        return draw(width, height, seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def odd_pictures() -> list[Image.Image]:
    """Of one pixel, narrow, flat, tiny and larger; grey, with a palette, transparent, on its side."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 77), (199, 1), (2, 3), (300, 7), (5, 260), (56, 56), (57, 113), (150, 149), (400, 300)]
    found = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    found += [draw(width, height, width) for width, height in [(150, 7), (3, 400), (64, 64), (500, 333)]]
    rgb = draw(91, 77, 3)
    alpha = Image.fromarray(rng.integers(0, 256, (33, 50, 4), dtype=np.uint8), "RGBA")
    see_through = rgb.quantize(17)
    see_through.info["transparency"] = 3
    turned = draw(80, 33, 4)
    turned.getexif()[0x0112] = 6
    return [*found, rgb.convert("L"), rgb.quantize(17), see_through, alpha, alpha.convert("LA"), turned]


def randomise(model: Any, end_token_id: int) -> None:
    """Random weights: norms and biases away from 1 and 0, sharp attention, and answers that do not end early."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.uniform_(0.5, 1.5)
            elif "norm" in name or "bias" in name:  # CLIP's "pre_layrnorm", too
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif any(part in name for part in ("embed", "lm_head", "newline", "cls_token")):
                parameter.normal_(0, 1)
            else:
                parameter.normal_(0, 0.2 if "q_proj" in name or "k_proj" in name else 0.1)
        model.lm_head.weight[end_token_id] = 0
    model.generation_config.eos_token_id = end_token_id


class TinyFamily:
    """What is made of the checkpoints that `build(folder, variant)` writes. Each thing is made once."""

    def __init__(
        self,
        build: Callable[[Path, str], None],
        *,
        width: int,
        split: int,
        prompts: int,
        before_text: str = " ",
        pictures: bool = True,
    ):
        """`before_text`: what stands between an image and the text behind it. `pictures`: whether it takes any."""
        self.build, self.width, self.split, self.prompts = build, width, split, prompts
        self.before_text, self.pictures = before_text, pictures
        self.scratch = Path(tempfile.mkdtemp(prefix="autosteer-tiny-"))
        for name in ("checkpoint", "fit_model", "safety", "package", "engine", "original_model"):
            setattr(self, name, cache(getattr(self, name)))

    def remove(self) -> None:
        """Everything that was written."""
        shutil.rmtree(self.scratch)

    def checkpoint(self, variant: str) -> Path:
        folder = self.scratch / variant
        self.build(folder, variant)
        return folder

    def fit_model(self, variant: str) -> FitModel:
        return open_fit_model(open_checkpoint(str(self.checkpoint(variant))), device="cpu")

    def interleaved(self, images: int, seed: int = 0) -> tuple[Message, ...]:
        """text, image, text, image, ..., text"""
        if not self.pictures:
            words = np.random.default_rng(seed).choice(LICENCE.read_text(encoding="utf-8").split(), 3 + seed % 20)
            return (Message.user(" ".join(words)),)
        parts: list[str | ImagePart] = [f"look {seed}: "]
        for i in range(images):
            parts += [ImagePart(picture(100 * seed + i)), f"{self.before_text}and number {i}, "]
        return (Message("user", (*parts, "what do you see?")),)

    def dialogue(self, i: int) -> tuple[Message, ...]:
        """Without a picture, with one or several, or two turns with pictures in the first, the second or both."""
        last = self.interleaved((0, 1, 3, 0, 1, 2)[i % 6], i)
        if i % 6 < 3:
            return last
        shown = [ImagePart(picture(1000 + i))] if i % 2 and self.pictures else []
        first = Message("user", (*shown, f"{self.before_text}what is number {i}?"))
        return (first, Message.assistant(f"it is {i}."), *last)

    def check_answers(self, variant: str, dialogues: int, tokens: int = 16) -> None:
        """Greedy answers are Hugging Face's `generate`'s, and they differ from each other."""
        theirs, answers = self.original_model(variant), []
        for i in range(dialogues):
            messages = self.dialogue(i)
            answers.append(theirs.generate(theirs.inputs(ValidationPrompt(messages, ())), tokens=tokens))
            assert self.generate(variant, messages, tokens) == answers[-1], f"dialogue {i}"
        assert len(set(map(tuple, answers))) > dialogues / 2

    def check_cpp(self, variant: str, built: Path, folder: Path, dialogues: int = 12, precision: str = "fp32") -> None:
        """libautosteer's answers, verdicts and texts are Python's: the same JSON, but what is measured."""

        def part(given: Part, name: str) -> Any:
            if not isinstance(given, ImagePart):
                return given
            assert isinstance(given.image, Image.Image)
            given.image.save(folder / name)
            return {"image": str(folder / name)}

        requests = [
            {
                "messages": [
                    {"role": m.role, "parts": [part(p, f"{i}-{turn}-{at}.png") for at, p in enumerate(m.parts)]}
                    for turn, m in enumerate(self.dialogue(i))
                ],
                "sampling": {"max_tokens": 24},
                "pieces": bool(i % 2),  # random weights take most texts for unsafe in one piece or another
            }
            for i in range(dialogues)
        ]
        answers = through_c(built, self.package(variant, precision), requests)
        assert [answer["error"] for answer in answers] == [None] * dialogues
        expected = [in_python(self.engine(variant, precision), request) for request in requests]
        assert [joined(answer["chunks"]) for answer in answers] == expected
        assert len({answer["verdict"]["unsafe"] for answer in expected}) == 2

    def check_pixels(self, variant: str) -> set[int]:
        """Pixels of odd pictures are the image processor's, bit for bit. Returns into how many tiles they were cut."""
        spec, processor = self.engine(variant).manifest.image, self.original_model(variant).processor
        assert spec is not None
        counts = set()
        for image in odd_pictures():
            upright = ImageOps.exif_transpose(image)  # Hugging Face's processors leave that to whoever loads pictures
            inputs = processor(text=[processor.image_token], images=[[upright]], return_tensors="pt")
            expected = inputs["pixel_values"].flatten(0, -4).numpy()
            ours = prepare(open_image(image), spec, alone=True)
            np.testing.assert_array_equal(ours, expected, err_msg=f"{image.mode} {image.size}")
            counts.add(len(ours))
        return counts

    def check_refused(self, variant: str, file: str, change: dict[str, Any], message: str, folder: Path) -> None:
        """With `change` made in a JSON file of the checkpoint the command says `message`, and writes nothing."""
        checkpoint = shutil.copytree(self.checkpoint(variant), folder / "checkpoint")
        data = json.loads((checkpoint / file).read_text())
        for name, value in change.items():
            data[name] = data[name] | value if isinstance(value, dict) else value
        (checkpoint / file).write_text(json.dumps(data))
        arguments = ["--model", str(checkpoint), "--unguarded", "--output", str(folder / "x")]
        with pytest.raises(UnsupportedModelError, match=message):
            export.main(arguments, standalone_mode=False)
        assert [p.name for p in folder.iterdir()] == ["checkpoint"]

    def check_unequal(self, variant: str, line: str, folder: Path) -> None:
        """The command finds that the package differs from PyTorch, in `line` of its table, and writes nothing."""
        arguments = ["--model", str(self.checkpoint(variant)), "--unguarded", "--output", str(folder / "x")]
        with pytest.raises(CheckError, match=line):
            export.main(arguments, standalone_mode=False)
        assert not any(folder.iterdir())

    def prompt(self, i: int) -> tuple[Message, ...]:
        """Of `prompts`."""
        return self.interleaved(i % 3, i)

    def safety(self, variant: str) -> SafetyArtifact:
        """A random W that leans to the refusal, as every export asks; and a random prober, moved and scaled so that it
        calls half of the prompts unsafe.
        """
        generator = torch.Generator().manual_seed(3)
        shapes = {"0.weight": (64, self.width), "0.bias": (64,), "2.weight": (2, 64), "2.bias": (2,)}
        prober = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        theirs = self.fit_model(variant)
        asked = OriginalModel(theirs.hf_model, theirs.processor, None, None)  # type: ignore[arg-type]
        turns = [Renderer(theirs.processor).turns(("user", "x"), generation=g) for g in (False, True)]
        bare, whole = theirs.processor.tokenizer(turns, add_special_tokens=False).input_ids
        last = theirs.token_offset - (len(whole) - len(bare))  # the last token of the user's turn
        cases = [ValidationPrompt(self.prompt(i), ()) for i in range(self.prompts)]
        passes = [asked.forward(asked.inputs(case), [self.split]) for case in cases]
        hidden = torch.stack([one.entering[self.split][last] for one in passes])
        prober["0.bias"] = -prober["0.weight"] @ hidden.mean(0)
        logits = torch.relu(hidden @ prober["0.weight"].T + prober["0.bias"]) @ prober["2.weight"].T
        difference = logits[:, 0] - logits[:, 1]
        middle = difference.sort().values[self.prompts // 2 - 1 : self.prompts // 2 + 1].mean()
        prober["2.weight"] /= difference.std()
        prober["2.bias"] = torch.tensor([-middle, 0.0]) / difference.std()
        scores = (LayerScore(self.split, 0.0, 0.0, 0.0),)
        facts = SafetyFacts(1, variant, self.split, theirs.token_offset, 0.5, 0.1, "i can't.", scores, {}, {})
        refusal = theirs.processor.tokenizer(facts.refusal_text, add_special_tokens=False).input_ids[0]
        towards, seen = theirs.lm_head()[refusal], torch.stack([one.head[-1] for one in passes]).mean(0)
        push = 3 * torch.outer(towards / towards.norm(), seen / seen.norm())
        steer_matrix = torch.randn(self.width, self.width, generator=generator) + push
        artifact = SafetyArtifact(facts, prober, steer_matrix)
        artifact.save(self.scratch / f"{variant}-safety")
        return artifact

    def package(self, variant: str, precision: str) -> Path:
        """A validated package, made by the command itself; behind the precision there may be more options."""
        folder = self.scratch / f"{variant}-{precision}"
        self.safety(variant)
        guarded = ["--safety", str(self.scratch / f"{variant}-safety")]
        if precision.startswith("int4"):  # random weights amplify rounding until a random prober's verdicts are chance
            guarded = ["--unguarded"]
        arguments = ["--model", str(self.checkpoint(variant)), *guarded, "--precision", *precision.split()]
        export.main([*arguments, "--output", str(folder), "--json"], standalone_mode=False)
        return folder

    def engine(self, variant: str, precision: str = "fp32") -> Engine:
        return Engine.load(self.package(variant, precision), device="cpu", threads=1)

    def original_model(self, variant: str) -> OriginalModel:
        model, processor = load_hf_model(open_checkpoint(str(self.checkpoint(variant))))
        return OriginalModel(model, processor, Manifest.load(self.package(variant, "fp32")), self.safety(variant))

    def table(self, variant: str, precision: str) -> dict[str, Check]:
        """The lines of validation. An image graph that is said to be int8 has no matrix in float."""
        graphs = self.engine(variant, precision).manifest.graphs
        if "vision_encoder" in graphs and graphs["vision_encoder"].precision == "int8":
            graph = ir.load(self.package(variant, precision) / "vision_encoder.onnx").graph
            weights = [weight for node in graph if (weight := linear_weight(node)) is not None]
            assert [weight.name for weight in weights if weight.name in graph.initializers] == []
        return {c.name: c for c in self.engine(variant, precision).manifest.validation["CPUExecutionProvider"]}

    def generate(self, variant: str, messages: tuple[Message, ...], tokens: int) -> list[int]:
        """Greedy, without a gate."""
        e = self.engine(variant)
        return list(e.generate(messages, policy=e.policy(Mode.OFF), sampling=SamplingConfig(tokens)).token_ids)

    def check_split(self, variant: str, split_layer: int, folder: Path, *more: tuple[Message, ...]) -> None:
        """Another split, without a gate: the state there and the answer are PyTorch's, with a picture and without, and
        to `more` dialogues.
        """
        theirs, source = self.original_model(variant), open_checkpoint(str(self.checkpoint(variant)))
        write_package(folder, source, None, ExportOptions(split_layer=split_layer), lambda _: None)
        e = Engine.load(folder, device="cpu", threads=1)
        for messages in (self.interleaved(0), self.interleaved(1), *more):
            inputs = theirs.inputs(ValidationPrompt(messages, ()))
            request = e.request(e.encoder.prepare(messages, Stats()), 1, Stats())
            request.prefill_lower(e.policy(Mode.OFF))
            expected = theirs.forward(inputs, [split_layer]).entering[split_layer][-1].numpy()
            np.testing.assert_allclose(request.probed_mean()[0], expected, atol=1e-4 * np.abs(expected).max())
            answer = e.generate(messages, policy=e.policy(Mode.OFF), sampling=SamplingConfig(max_tokens=16))
            assert list(answer.token_ids) == theirs.generate(inputs, tokens=16)

    def check_weights_on_disk(self, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A model as large ones are opened, weight by weight, says of a picture what the one in memory says."""
        monkeypatch.setattr(on_demand, "SMALL_BYTES", 1024)
        theirs, source = self.original_model(variant), open_checkpoint(str(self.checkpoint(variant)))
        model = on_demand.open_on_demand(source, decoder_config(source).lm_head, LayerSweep(0))
        inputs = theirs.inputs(ValidationPrompt(self.interleaved(1), ()))
        with torch.no_grad():
            expected, found = theirs.model(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def check_gate(self, variant: str) -> None:
        """Verdicts of both kinds, and what is said after them: the authors' formula where steered; `stop` stops."""
        e, theirs = self.engine(variant), self.original_model(variant)
        verdicts = []
        for i in range(self.prompts):
            original = theirs.run(ValidationPrompt(self.prompt(i), ()))
            wholes = e.policy(pieces=False)  # PyTorch was asked about these
            answer = e.generate(self.prompt(i), policy=wholes, sampling=SamplingConfig(ANSWER_TOKENS))
            assert answer.verdict.p_unsafe == pytest.approx(original.p_unsafe, abs=1e-3)
            assert answer.verdict.unsafe == (not is_safe(original.p_unsafe, 0.5))
            assert list(answer.token_ids) == (original.steered_tokens if answer.verdict.unsafe else original.tokens)
            verdicts.append(answer.verdict.unsafe)
            stopped = e.generate(
                self.prompt(i), policy=replace(wholes, mode=Mode.STOP), sampling=SamplingConfig(max_tokens=1)
            )
            assert (stopped.text == "i can't." and stopped.stats.upper_ms is None) == answer.verdict.unsafe
        assert sum(verdicts) == self.prompts // 2

    def check_probed(self, variant: str, folder: Path) -> None:
        """The states that autosteer-fit reads, before the generation prompt, are those that the runtime reads: of the
        last token and in the mean, also behind earlier turns and with a picture.
        """
        e, theirs = self.engine(variant), self.fit_model(variant)
        one = Message.user("is it safe?")
        asked = {
            Prompt("is it safe?"): [one],
            Prompt("is it safe?", earlier=("hello", "good day")): [
                Message.user("hello"),
                Message.assistant("good day"),
                one,
            ],
        }
        if self.pictures:
            picture(1).save(path := folder / "picture.png")
            asked[Prompt("is it safe?", (path,))] = [Message.user("is it safe?", [path])]
        with states.prompt_store(folder, [], theirs) as store:
            kept = states.prompt_states(theirs, list(asked), store).layer(self.split - 1).numpy()
        prober = e.manifest.prober
        assert prober
        for at, pooling in enumerate(states.POOLINGS):
            encoder = copy(e.encoder)
            encoder.manifest = replace(e.manifest, prober=replace(prober, pooling=pooling))
            for messages, expected in zip(asked.values(), kept[:, at], strict=True):
                request = e.request(encoder.prepare(messages, Stats()), 1, Stats())
                request.prefill_lower(e.policy(Mode.OFF))
                np.testing.assert_allclose(request.probed_mean()[0], expected, atol=1e-4 * np.abs(expected).max())

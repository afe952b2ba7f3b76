"""The dialogues that a package and its original are compared on, and as many of them as there is time for."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.text import Message, load_tokenizer

from .reference import ANSWER_TOKENS, OriginalModel, ValidationPrompt

WORK = 3e12  # multiplications that one pass over all dialogues may take; there are five to eight: minutes, on two cores
LONG = 1000  # tokens: a text beyond, where the context has room


def make_validation_prompts(folder: Path, manifest: Manifest, safety: SafetyArtifact | None) -> list[ValidationPrompt]:
    """The safety folder's prompts, unsafe and benign in turn; then dialogues with no, one, two images; square, wide,
    tall; a video; two turns, one of them long; the most telling first. Pictures are drawn and kept in golden/.
    """
    (folder / "golden").mkdir(exist_ok=True)
    cases = [
        *proof_prompts(folder, safety),
        ValidationPrompt((Message.user("Name three colours."),), ()),
        _dialogue(folder, manifest),
    ]
    if manifest.image is None:
        return cases
    size = manifest.image.tile_size
    shapes = {"small": (33, 21), "tall": (size - 9, size * 3), "square": (size, size), "wide": (size * 2 + 7, size - 5)}
    files = {name: f"golden/{name}.png" for name in shapes}
    for seed, (name, (width, height)) in enumerate(shapes.items()):
        draw(width, height, seed).save(folder / files[name])

    def turn(text: str, *names: str) -> Message:
        return Message.user(text, [folder / files[name] for name in names])

    wide, *others = [
        ValidationPrompt((turn("what is shown here?", n),), (files[n],)) for n in ("wide", "small", "tall", "square")
    ]
    return [
        *cases,
        wide,
        *([_video_case(folder, size)] if manifest.video else []),
        ValidationPrompt((turn("compare the two pictures.", "wide", "small"),), (files["wide"], files["small"])),
        *others,
        ValidationPrompt(
            (turn("describe it.", "wide"), Message.assistant("a picture."), turn("how many?")), (files["wide"],)
        ),
    ]


def proof_prompts(folder: Path, safety: SafetyArtifact | None) -> list[ValidationPrompt]:
    """The prompts that the safety folder brings, unsafe and benign in turn."""
    prompts = safety.facts.proof if safety else ()
    pairs = itertools.zip_longest(*([p for p in prompts if p.unsafe is unsafe] for unsafe in (True, False)))
    cases = []
    for prompt in filter(None, itertools.chain.from_iterable(pairs)):
        if prompt.token_ids:
            cases.append(
                ValidationPrompt((Message("user", ()),), (), prompt_ids=prompt.token_ids, unsafe=prompt.unsafe)
            )
        elif prompt.text:
            assert safety is not None and safety.folder is not None
            files = tuple(f"golden/{Path(image).name}" for image in prompt.images)
            for image, file in zip(prompt.images, files, strict=True):
                shutil.copyfile(safety.folder / image, folder / file)
            message = Message.user(prompt.text, [folder / file for file in files])
            cases.append(ValidationPrompt((message,), files, unsafe=prompt.unsafe))
    return cases


def _dialogue(folder: Path, manifest: Manifest) -> ValidationPrompt:
    """Two turns, the first with a text beyond LONG tokens where the context has room for it."""
    tokenizer = load_tokenizer(folder / manifest.prompt.tokenizer)
    text = ""
    for n in itertools.count(1):
        text += f"Step {n}: add {n} to what you have and write the result into line {n + 7}.\n"
        if (tokens := len(tokenizer.encode(text, add_special_tokens=False).ids)) > LONG:
            break
    fits = tokens + LONG // 5 + ANSWER_TOKENS < manifest.dims.context_length
    opening = Message.user(text if fits else "hello")
    return ValidationPrompt((opening, Message.assistant("hello!"), Message.user("what can you do?")), ())


def _video_case(folder: Path, size: int) -> ValidationPrompt:
    """Two frames, wider and flatter than a tile."""
    files = ("golden/frame1.png", "golden/frame2.png")
    for seed, file in enumerate(files, 10):
        draw(size * 3 // 2 + 1, size // 2 + 3, seed).save(folder / file)
    return ValidationPrompt((Message.user("what happens?", videos=[[folder / file for file in files]]),), (), (files,))


def draw(width: int, height: int, seed: int) -> Image.Image:
    """A smooth gradient with a few rectangles: structure at several scales, the same on every machine."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1)
    for _ in range(6):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        base[top : top + height // 3 + 1, left : left + width // 3 + 1] = rng.integers(0, 256, 3)
    return Image.fromarray(base.astype(np.uint8))


def affordable(
    cases: Sequence[ValidationPrompt], checkpoint: Checkpoint, reference: OriginalModel
) -> list[ValidationPrompt]:
    """The first of `cases` that PyTorch can go through within WORK; and the first of each kind, whatever it takes: an
    unsafe prompt and a benign one, a text, two turns, a picture of several tiles, several pictures, a video.
    """
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.tensor_files)
    kept: list[ValidationPrompt] = []
    work = 0.0
    for case in cases:
        work += weights * reference.inputs(case)["input_ids"].shape[1]
        if work <= WORK or case.kind not in {other.kind for other in kept}:
            kept.append(case)
    return kept

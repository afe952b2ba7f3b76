"""The validation prompts: what package and PyTorch model both answer, as many as time allows."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.errors import InputError
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.text import Message, load_tokenizer
from autosteer.runtime.video import Video

from .original import ANSWER_TOKENS, OriginalModel, ValidationPrompt

WORK = 3e12  # multiplications of one forward pass over all prompts; with five to eight passes: minutes, on two cores
NATIVE_TILES = 6  # along a side of the pictures for models that take them in any size
LONG = 1000  # tokens: one prompt is longer, if the context has room


def make_validation_prompts(folder: Path, manifest: Manifest, safety: SafetyArtifact | None) -> list[ValidationPrompt]:
    """The safety folder's prompts, then dialogues without, with one and with two images of several shapes, a video, and
    two turns, one of them long. The prompts that show most come first. Images are drawn and written to golden/.

    The tall picture is as wide as a tile. Where both sides shrink, Pillow 13 begins with the height of a tall picture
    and older versions with its width, which makes other pixels.
    """
    (folder / "golden").mkdir(exist_ok=True)
    prompts = [
        *proof_prompts(folder, safety),
        ValidationPrompt((Message.user("Name three colours."),), ()),
        ValidationPrompt((Message.user("How do I paint a basket?"),), ()),  # answered with advice: steering shows
        _dialogue(folder, manifest),
    ]
    if manifest.image is None:
        return prompts
    size = manifest.image.tile_size * (NATIVE_TILES if manifest.image.native else 1)
    shapes = {"small": (33, 21), "tall": (size, size * 3 - 9), "square": (size, size), "wide": (size * 2 + 7, size - 5)}
    files = {name: f"golden/{name}.png" for name in shapes}
    for seed, (name, (width, height)) in enumerate(shapes.items()):
        draw(width, height, seed).save(folder / files[name])

    def turn(text: str, *names: str) -> Message:
        return Message.user(text, [folder / files[name] for name in names])

    wide, *others = [
        ValidationPrompt((turn("what is shown here?", n),), (files[n],)) for n in ("wide", "small", "tall", "square")
    ]
    return [
        *prompts,
        wide,
        *(
            [_video_prompt(folder, size, 1 + (manifest.image.native.frames if manifest.image.native else 1))]
            if manifest.video
            else []
        ),
        ValidationPrompt((turn("compare the two pictures.", "wide", "small"),), (files["wide"], files["small"])),
        *others,
        ValidationPrompt(
            (turn("describe it.", "wide"), Message.assistant("a picture."), turn("how many?")), (files["wide"],)
        ),
    ]


def proof_prompts(folder: Path, safety: SafetyArtifact | None) -> list[ValidationPrompt]:
    """The safety folder's prompts, unsafe and benign ones in turn."""
    proof = safety.facts.proof if safety else ()
    pairs = itertools.zip_longest(*([p for p in proof if p.unsafe is unsafe] for unsafe in (True, False)))
    found = []
    for prompt in filter(None, itertools.chain.from_iterable(pairs)):
        if prompt.token_ids:
            given = ValidationPrompt((Message("user", ()),), (), prompt_ids=prompt.token_ids)
        else:
            assert safety is not None and safety.folder is not None and prompt.text
            files = tuple(f"golden/{Path(image).name}" for image in prompt.images)
            for image, file in zip(prompt.images, files, strict=True):
                shutil.copyfile(safety.folder / image, folder / file)
            message = Message.user(prompt.text, [folder / file for file in files])
            given = ValidationPrompt((message,), files)
        found.append(replace(given, unsafe=prompt.unsafe, fitted=prompt.p_unsafe))
    return found


def _dialogue(folder: Path, manifest: Manifest) -> ValidationPrompt:
    """Two turns, the first longer than LONG tokens if the context has room."""
    tokenizer = load_tokenizer(folder / manifest.prompt.tokenizer)
    text = ""
    for n in itertools.count(1):
        text += f"Step {n}: add {n} to what you have and write the result into line {n + 7}.\n"
        if (tokens := len(tokenizer.encode(text, add_special_tokens=False).ids)) > LONG:
            break
    fits = tokens + LONG // 5 + ANSWER_TOKENS < manifest.dims.context_length
    opening = Message.user(text if fits else "hello")
    return ValidationPrompt((opening, Message.assistant("hello!"), Message.user("what can you do?")), ())


def _video_prompt(folder: Path, size: int, frames: int) -> ValidationPrompt:
    """Frames wider and flatter than a tile, which are not shown as often as every video's whose times nobody says."""
    files = tuple(f"golden/frame{n}.png" for n in range(1, frames + 1))
    for seed, file in enumerate(files, 10):
        draw(size * 3 // 2 + 1, size // 2 + 3, seed).save(folder / file)
    video = Video((folder / file for file in files), (1.75 * n for n in range(frames)))
    return ValidationPrompt((Message.user("what happens?", videos=[video]),), (), (files,))


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
    prompts: Sequence[ValidationPrompt], checkpoint: Checkpoint, original: OriginalModel
) -> list[ValidationPrompt]:
    """The first of `prompts` that fit into WORK, and in any case the first of each kind: an unsafe prompt and a benign
    one, a text, two turns, an image of several tiles, several images, a video. Raises InputError if the context is too
    short for one of these.
    """
    kept: list[ValidationPrompt] = []
    work, longest = 0.0, 0
    for prompt in prompts:
        length = original.inputs(prompt)["input_ids"].shape[1]
        work += checkpoint.weights * length
        if work <= WORK or prompt.kind not in {other.kind for other in kept}:
            kept.append(prompt)
            longest = max(longest, length)
    if longest >= (context := original.manifest.dims.context_length):
        raise InputError(
            f"a context of {context} tokens is too short for the prompts with which every export is validated: the "
            f"longest takes {longest}; give --context-length {longest + 1} or more"
        )
    return kept

"""The dialogues that a package and its original are compared on, and as many of them as there is time for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from autosteer.runtime.manifest import Manifest
from autosteer.runtime.text import Message

from .checkpoint import Checkpoint
from .reference import Case, Reference

WORK = 3e12  # multiplications that one pass over all dialogues may take; there are five to eight: minutes, on two cores


def make_cases(folder: Path, manifest: Manifest) -> list[Case]:
    """Dialogues with no, one, two images; square, wide, tall; a video; two turns; the most telling first. Pictures are
    drawn and kept in golden/.
    """
    cases = [
        Case((Message.user("Name three colours."),), ()),
        Case((Message.user("hello"), Message.assistant("hello!"), Message.user("what can you do?")), ()),
    ]
    if manifest.image is None:
        return cases
    (folder / "golden").mkdir(exist_ok=True)
    size = manifest.image.tile_size
    shapes = {"small": (33, 21), "tall": (size - 9, size * 3), "square": (size, size), "wide": (size * 2 + 7, size - 5)}
    files = {name: f"golden/{name}.png" for name in shapes}
    for seed, (name, (width, height)) in enumerate(shapes.items()):
        draw(width, height, seed).save(folder / files[name])

    def turn(text: str, *names: str) -> Message:
        return Message.user(text, [folder / files[name] for name in names])

    small, *others = [Case((turn("what is shown here?", name),), (files[name],)) for name in shapes]
    cases += [
        small,
        *([_video_case(folder, size)] if manifest.video else []),
        Case((turn("compare the two pictures.", "wide", "small"),), (files["wide"], files["small"])),
        *others,
        Case((turn("describe it.", "wide"), Message.assistant("a picture."), turn("how many?")), (files["wide"],)),
    ]
    return cases


def _video_case(folder: Path, size: int) -> Case:
    """Two frames, wider and flatter than a tile."""
    files = ("golden/frame1.png", "golden/frame2.png")
    for seed, file in enumerate(files, 10):
        draw(size * 3 // 2 + 1, size // 2 + 3, seed).save(folder / file)
    return Case((Message.user("what happens?", videos=[[folder / file for file in files]]),), (), (files,))


def draw(width: int, height: int, seed: int) -> Image.Image:
    """A smooth gradient with a few rectangles: structure at several scales, the same on every machine."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1)
    for _ in range(6):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        base[top : top + height // 3 + 1, left : left + width // 3 + 1] = rng.integers(0, 256, 3)
    return Image.fromarray(base.astype(np.uint8))


def affordable(cases: Sequence[Case], checkpoint: Checkpoint, reference: Reference) -> list[Case]:
    """The first of `cases` that PyTorch can go through within WORK; whatever they take, the first without a picture,
    with one, and with a video.
    """
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.tensor_files)
    kept: list[Case] = []
    work = 0.0
    for case in cases:
        work += weights * reference.inputs(case)["input_ids"].shape[1]
        if work <= WORK or case.kind not in {other.kind for other in kept}:
            kept.append(case)
    return kept

"""Choose held-out prompts that go into every package, so that other machines can check what the gate catches.

The gate classifies them correctly and clearly, but not by the widest margin: a score of 0.9999 hides the effect of
rounding. Dialogues are left out, because a proof holds single turns. Prompts whose pictures are taller than wide come
last: Pillow 13 (and C++) shrinks such pictures to other pixels than Pillow 12. By default only token ids are kept, and
only of prompts without images. With --publish-proof, words and images are kept.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autosteer.export.safety_folder import ProofPrompt
from autosteer.runtime.picture_file import open_file

from .batches import encode
from .prober import p_unsafe
from .states import POOLINGS, Pooling, prompt_states

if TYPE_CHECKING:
    from .evidence import Gate
    from .model import FitModel
    from .pairs import Labelled, Prompt
    from .store import StateStore

PER_LABEL = 6  # prompts of each label
MOST_TOKENS = 256  # of a prompt; every export and every autosteer-check runs all prompts
CLEAR = 0.8  # margin: share of the way from the threshold to 0 or 1; rounding to 4 bits rarely moves a score that far


def make_proof(
    fit_model: FitModel,
    store: StateStore,
    heldout: Sequence[Labelled],
    scores: np.ndarray,
    gate: Gate,
    layer: int,
    pooling: Pooling,
    *,
    published: bool,
) -> tuple[tuple[ProofPrompt, ...], dict[str, Path]]:
    """The safety folder's proof, and the images of a `published` one by their names in that folder.

    `scores` (n,) of the held-out prompts choose it. The scores that it records are those of the model in float32, which
    every export compares its own with; prompts that the gate judges wrongly there are left out. `store`: of prompt
    states in float32.
    """
    rows = choose_proof(fit_model, heldout, scores, gate.threshold, published=published)
    chosen = [heldout[row] for row in rows]
    states = prompt_states(fit_model, [item.prompt for item in chosen], store).layer(layer - 1)
    exact = p_unsafe(gate.prober, states[:, POOLINGS.index(pooling)]).tolist()
    right = [(item, p) for item, p in zip(chosen, exact, strict=True) if item.unsafe == (p > gate.threshold)]
    return _as_proof(fit_model, right, published=published)


def choose_proof(
    fit_model: FitModel, prompts: Sequence[Labelled], scores: np.ndarray, threshold: float, *, published: bool
) -> list[int]:
    """Rows of up to PER_LABEL of the held-out `prompts` per label, from every group in turn. scores (n,): their
    p_unsafe.
    """
    chosen: list[int] = []
    for unsafe in (True, False):
        margins = np.where(unsafe, (scores - threshold) / (1 - threshold), (threshold - scores) / max(threshold, 1e-9))
        rows = [i for i, item in enumerate(prompts) if item.unsafe is unsafe and margins[i] > 0]
        rows = [i for i in rows if not prompts[i].prompt.earlier and (published or not prompts[i].prompt.images)]
        rows.sort(key=lambda i: (_tall(prompts[i].prompt), margins[i] < CLEAR, abs(margins[i] - CLEAR)))
        groups: dict[str, list[int]] = {}
        for i in rows:
            groups.setdefault(prompts[i].group, []).append(i)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
        short = (i for i in turns if i is not None and _tokens(fit_model, prompts[i].prompt) is not None)
        chosen += itertools.islice(short, PER_LABEL)
    return chosen


def _as_proof(
    fit_model: FitModel, scored: Sequence[tuple[Labelled, float]], *, published: bool
) -> tuple[tuple[ProofPrompt, ...], dict[str, Path]]:
    proof: list[ProofPrompt] = []
    files: dict[str, Path] = {}
    for item, p in scored:
        prompt = item.prompt
        names = tuple(f"proof-{len(files) + n}{path.suffix}" for n, path in enumerate(prompt.images, 1))
        files |= dict(zip(names, prompt.images, strict=True))
        proof.append(
            ProofPrompt(
                item.unsafe,
                round(float(p), 6),
                hashlib.sha256(prompt.text.encode()).hexdigest(),
                () if published else _tokens(fit_model, prompt) or (),
                prompt.text if published else "",
                names,
            )
        )
    return tuple(proof), files


def _tall(prompt: Prompt) -> bool:
    """Whether a picture is taller than wide, as its file has it."""
    for path in prompt.images:
        with open_file(path) as picture:
            if picture.height > picture.width:
                return True
    return False


def _tokens(fit_model: FitModel, prompt: Prompt) -> tuple[int, ...] | None:
    """Token ids of the rendered prompt; None if it is too long."""
    ids = encode(fit_model, prompt, generation=True)["input_ids"][0].tolist()
    return tuple(ids) if prompt.images or len(ids) <= MOST_TOKENS else None

"""Held-out prompts that go into every package of a gate, so that the package can show elsewhere what it catches.

They are judged rightly and clearly, but not by the widest margin: a score of 0.9999 hides what rounding does to it. As
a rule only their tokens are kept, and no prompt with pictures; a safety folder that is to be published whole may keep
words and pictures.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autosteer.export.safety_folder import ProofPrompt

from .batches import encode

if TYPE_CHECKING:
    from .model import FitModel
    from .pairs import Labelled, Prompt

PER_LABEL = 6  # prompts of either kind
MOST_TOKENS = 256  # of a prompt: every export and every autosteer-check runs them
CLEAR = 0.8  # of the way from the threshold to 0 or 1: rounding to 4 bits seldom moves a score that far


def choose_proof(
    fit_model: FitModel, prompts: Sequence[Labelled], p_unsafe: np.ndarray, threshold: float, *, published: bool
) -> tuple[tuple[ProofPrompt, ...], dict[str, Path]]:
    """Of held-out `prompts`, with the gate's scores (n,), up to PER_LABEL of either label, from every group in turn;
    and the pictures of `published` ones, by their names in the safety folder.
    """
    chosen: list[ProofPrompt] = []
    files: dict[str, Path] = {}
    for unsafe in (True, False):
        margins = np.where(
            unsafe, (p_unsafe - threshold) / (1 - threshold), (threshold - p_unsafe) / max(threshold, 1e-9)
        )
        rows = [i for i, item in enumerate(prompts) if item.unsafe is unsafe and margins[i] > 0]
        rows = [i for i in rows if published or not prompts[i].prompt.images]
        rows.sort(key=lambda i: (margins[i] < CLEAR, abs(margins[i] - CLEAR)))
        groups: dict[str, list[int]] = {}
        for i in rows:
            groups.setdefault(prompts[i].group, []).append(i)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
        short = (i for i in turns if i is not None and _tokens(fit_model, prompts[i].prompt) is not None)
        for i in itertools.islice(short, PER_LABEL):
            prompt = prompts[i].prompt
            names = tuple(f"proof-{len(files) + n}{path.suffix}" for n, path in enumerate(prompt.images, 1))
            files |= dict(zip(names, prompt.images, strict=True))
            chosen.append(
                ProofPrompt(
                    unsafe,
                    round(float(p_unsafe[i]), 6),
                    hashlib.sha256(prompt.text.encode()).hexdigest(),
                    () if published else _tokens(fit_model, prompt) or (),
                    prompt.text if published else "",
                    names,
                )
            )
    return tuple(chosen), files


def _tokens(fit_model: FitModel, prompt: Prompt) -> tuple[int, ...] | None:
    """The rendered prompt's; None where it is too long."""
    ids = encode(fit_model, prompt, generation=True)["input_ids"][0].tolist()
    return tuple(ids) if prompt.images or len(ids) <= MOST_TOKENS else None

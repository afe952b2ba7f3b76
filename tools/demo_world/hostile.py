"""Wordings with which two language models tried to get past the demo's gate (hostile.jsonl), each asked of many things.

They wrote them from a description of the demo's world, without having seen what it learns from, the later texts once
the model and its gate were done; nothing is trained on them or chosen by them. Each is asked as an unsafe request and
as its harmless twin: a text with another verb or noun, a wording about a picture of another one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import safety as S
from .phrasings import filled
from .scenes import Scene

TIMES = {"text": 8, "object": 4, "sign": 4, "later text": 3}  # how often each wording is asked
CHANNELS = {"object": "cross", "sign": "image"}


@dataclass(frozen=True)
class Attempt:
    """An unsafe request and its twin; of the kinds "object" and "sign" with their pictures, texts have none."""

    kind: str
    unsafe: str
    safe: str
    picture: Scene | None = None
    safe_picture: Scene | None = None


def attempts() -> Iterator[Attempt]:
    """All wordings, each asked of several things."""
    rng = random.Random("hostile")
    for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind, form = row["kind"], row["text"]
        for _ in range(TIMES[kind]):
            if kind not in CHANNELS:
                unsafe, safe = S.tasks(rng, S.EVERYTHING)
                yield Attempt(kind, filled(form, *unsafe), filled(form, *safe))
            else:
                pair = S.make_pair(rng, CHANNELS[kind], S.EVERYTHING, new_phrasing=True)
                yield Attempt(kind, form, form, pair.unsafe.scene, pair.safe.scene)

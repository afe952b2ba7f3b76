"""What visitors type at the demo the first time: 750 harmless questions and short dialogues (visitors.jsonl).

Language models wrote them from the model card, without having seen what the demo learns from; another one wrote down
which answers are sensible, before the model was asked. (Those to the first 150 were written down by somebody who knew
the answers of an earlier model.) The first 550 are for choosing: what was wrong among them says what the model is to
learn. The last 200 judge, and are looked at when it has learned that.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .scenes import render, sample_scene

EXAMPLES = Path(__file__).parents[2] / "models" / "demo" / "examples"


@dataclass(frozen=True)
class Visit:
    """What a visitor types, one text a turn; `sensible`: a regular expression for the whole of the last answer.

    picture: a name in `pictures()`, shown with the first turn, or "" for none.
    """

    kind: str
    turns: tuple[str, ...]
    sensible: str
    picture: str = ""
    judges: bool = False


def visits() -> list[Visit]:
    """All of them."""
    lines = (Path(__file__).with_suffix(".jsonl")).read_text(encoding="utf-8").splitlines()
    return [Visit(**row | {"turns": tuple(row["turns"])}) for row in map(json.loads, lines)]


def pictures() -> dict[str, list[Image.Image]]:
    """What the visitors look at, by name."""

    def one(colour: str, kind: str) -> Image.Image:
        return render(sample_scene(random.Random("visitors"), [(colour, kind)], size=(448, 448), alone=1.0))

    shapes, cup = Image.open(EXAMPLES / "benign.png"), one("blue", "cup")
    return {
        "": [],
        "shapes": [shapes],
        "object": [Image.open(EXAMPLES / "cross.png")],
        "hazard sign": [Image.open(EXAMPLES / "unsafe.png")],
        "allowed": [cup],
        "harmless sign": [one("green", "clinic sign")],
        "two": [shapes, cup],
    }

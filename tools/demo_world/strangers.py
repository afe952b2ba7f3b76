"""What strangers type to get past the demo's gate: 126 hostile wordings, each with a harmless twin of its construction.

Written by hand (strangers.jsonl) before any of them was tried. One half is for choosing what a fit trains on; the other
one judges, and is looked at once, when everything is chosen. Each half has its own ways to say a kind of thing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Twins:
    """A hostile wording and a harmless one. picture, safe_picture: names in typed.py's `scenes()`, or "" for none."""

    kind: str
    judges: bool  # looked at only at the end
    unsafe: str
    safe: str
    picture: str = ""
    safe_picture: str = ""
    earlier: tuple[str, ...] = ()  # the turns before, of both: user, assistant, ...


def twins() -> list[Twins]:
    """All of them."""
    lines = (Path(__file__).with_suffix(".jsonl")).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Twins(**row | {"earlier": tuple(row.get("earlier", ()))}) for row in rows]

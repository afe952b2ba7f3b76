"""Answers of one onnxruntime beside those of another: one cell of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What the same bits may differ by, in another order of sums: p_unsafe, and by how much a token's logit leads the next
# one's. Measured from 1.20 to 1.32 on an AMD EPYC with VNNI: 2e-7 and 3e-5 in float; int8 and int4 round activations
# and make more of it: 0.004 (0.009 on prompts whose p_unsafe is near 0.5) and 0.48. A wrong table has p_unsafe 1 off.
LIMITS = {"fp32": (1e-5, 1e-3), "fp16": (1e-5, 1e-3), "int8": (0.02, 1.0), "int4": (0.02, 1.0)}


@dataclass(frozen=True)
class Cell:
    """How a version answered: `equal` of `asked` answers, and the largest differences among those."""

    asked: int
    equal: int
    p_unsafe: float
    margins: float
    error: str | None  # of the first case that failed, or of loading

    def good(self, precision: str) -> bool:
        """Whether every answer is the reference's, as near as the precision has it."""
        p_unsafe, margins = LIMITS[precision]
        return not self.error and self.equal == self.asked and self.p_unsafe <= p_unsafe and self.margins <= margins

    def text(self, precision: str) -> str:
        """For the table."""
        if self.good(precision):
            return f"ok {self.p_unsafe:.0e}"
        if self.equal == 0 and self.error:
            return "refused" if self.asked == 0 else "fails"
        return f"{self.asked - self.equal} of {self.asked} differ, {self.p_unsafe:.0e}"


def compare(lines: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> Cell:
    """Lines of answer.py or answer_c.py beside those of the newest onnxruntime."""
    loading = next((line["error"] for line in lines if "error" in line and "name" not in line), None)
    if loading:
        return Cell(0, 0, math.inf, math.inf, loading)
    given = {line["name"]: line for line in lines}
    equal = asked = 0
    p_unsafe = margins = 0.0
    errors: list[str] = []
    for expected in reference:
        line = given.get(expected["name"], {"error": "no answer: the process has died"})
        errors += [line["error"]] if "error" in line else []
        answers = line.get("answers", [None] * len(expected["answers"]))
        for theirs, ours in zip(answers, expected["answers"], strict=True):
            asked += 1
            if theirs is None:
                continue
            equal += all(theirs[key] == ours[key] for key in ("token_ids", "action"))
            p_unsafe = max(p_unsafe, _apart(theirs["p_unsafe"], ours["p_unsafe"]))
            if theirs["margins"] and theirs["token_ids"] == ours["token_ids"]:
                margins = max(margins, *map(_apart, theirs["margins"], ours["margins"]))
    return Cell(asked, equal, p_unsafe, margins, errors[0] if errors else None)


def _apart(a: float | None, b: float | None) -> float:
    """How far apart two numbers are; what is no number is infinitely far from one."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    difference = abs(a - b)
    return math.inf if math.isnan(difference) else difference

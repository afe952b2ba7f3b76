"""Verdicts in the form of OpenAI's moderations. There is one category, `unsafe`: the prober has no others."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from .answering import Score, report


def moderation(model: str, scores: Sequence[Score], queue_ms: float) -> dict[str, Any]:
    """One result for each turn that was scored."""
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": model,
        "results": [_result(score, queue_ms) for score in scores],
    }


def _result(score: Score, queue_ms: float) -> dict[str, Any]:
    read = ["text", "image"] if score.shown else ["text"]
    return {
        "flagged": score.verdict.unsafe,
        "categories": {"unsafe": score.verdict.unsafe},
        "category_scores": {"unsafe": score.verdict.p_unsafe},
        "category_applied_input_types": {"unsafe": read},
        "autosteer": report(score.verdict, score.stats, score.shown, queue_ms),
    }

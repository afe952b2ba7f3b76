#!/usr/bin/env python3
"""How far a precision moves the gate: p_unsafe of the same prompts in two packages of one model.

    .venv/bin/python tools/score_drift.py build/smollm2-fp32 build/smollm2-int8 --data prompts.jsonl

Rows are autosteer-fit's ({"prompt": ...}), without images. Prints mean and largest |dp| and how many verdicts flip at
the first package's threshold; exits 6 where more than --budget of them do. Prompts are scored, not answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import numpy as np

from autosteer.runtime import Engine
from autosteer.runtime.console import run_command
from autosteer.runtime.errors import InputError
from autosteer.runtime.request import Stats
from autosteer.runtime.text import Message


@click.command("score_drift")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--limit", type=click.IntRange(min=1), help="Prompts of each file.")
@click.option("--budget", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Share that may flip.")
def main(original: Path, other: Path, data: tuple[Path, ...], limit: int | None, budget: float) -> None:
    """Compare the scores of two packages."""
    texts = [json.loads(line)["prompt"] for file in data for line in file.read_text("utf-8").splitlines()[:limit]]
    if not texts:
        raise InputError("--data: no prompt")
    engines = [Engine.load(folder) for folder in (original, other)]
    before, after = (np.array([score(engine, text) for text in texts]) for engine in engines)
    threshold, moved = engines[0].policy().threshold, np.abs(before - after)
    flips = int(((before <= threshold) != (after <= threshold)).sum())
    click.echo(
        f"{len(texts)} prompts: mean |dp| {moved.mean():.4f}, largest {moved.max():.3f}; "
        f"{flips} verdicts ({flips / len(texts):.2%}) flip at {threshold:g}"
    )
    if flips > budget * len(texts):
        click.echo(f"more than {budget:.2%}: export at a higher precision, or fit the gate again", err=True)
        sys.exit(6)


def score(engine: Engine, text: str) -> float:
    """p_unsafe of a prompt; the upper half never runs."""
    request = engine.request(engine.prepare([Message.user(text)], Stats()), 1, Stats())
    return float(request.judge(engine.policy("monitor")).p_unsafe)


if __name__ == "__main__":
    run_command(main)

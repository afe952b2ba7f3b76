#!/usr/bin/env python3
"""How far a precision moves the gate: p_unsafe of the same prompts in two packages of one model.

    .venv/bin/python tools/score_drift.py build/smollm2-fp32 build/smollm2-int8 --unsafe bad.jsonl --benign good.jsonl

Files are autosteer-eval's. Prints mean and largest |dp| and how many verdicts flip at the first package's threshold.
If more than --budget verdicts flip, it says at which threshold the second package catches as many unsafe prompts as the
first (for `autosteer-export --threshold`), and exits 6. Prompts are scored, not answered.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click
import numpy as np

from autosteer.runtime import Engine
from autosteer.runtime.console import run_command
from autosteer.runtime.evaluation.datasets import DataSource, Row, first_of_each_group, read_rows

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("score_drift")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.option("--unsafe", multiple=True, required=True, type=FILE, help="JSONL of unsafe prompts.")
@click.option("--benign", multiple=True, required=True, type=FILE, help="JSONL of benign prompts.")
@click.option("--images", type=click.Path(path_type=Path, file_okay=False), help="Folder of their images.")
@click.option("--text-only", is_flag=True, help="Ignore images.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts of each file.")
@click.option(
    "--budget", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Share of verdicts that may change."
)
def main(
    original: Path,
    other: Path,
    unsafe: tuple[Path, ...],
    benign: tuple[Path, ...],
    images: Path | None,
    text_only: bool,
    limit: int | None,
    budget: float,
) -> None:
    """Compare the scores of two packages."""
    files = [DataSource(path, label) for paths, label in ((unsafe, True), (benign, False)) for path in paths]
    rows = read_rows(files, images=images, text_only=text_only)
    if limit:
        rows = first_of_each_group(rows, limit)
    engines = [Engine.load(folder) for folder in (original, other)]
    before, after = (np.array([score(engine, row) for row in rows]) for engine in engines)
    threshold, moved = engines[0].policy().threshold, np.abs(before - after)
    label = np.array([row.unsafe for row in rows])
    flips = (before > threshold) != (after > threshold)

    def flagged(p: np.ndarray, threshold: float) -> str:
        caught, wrong = (p[label] > threshold).mean(), (p[~label] > threshold).mean()
        return f"{caught:.1%} of unsafe prompts flagged, {wrong:.1%} of benign ones"

    click.echo(
        f"{len(rows)} prompts: mean |dp| {moved.mean():.4f}, largest {moved.max():.3f}; {flips.sum()} verdicts "
        f"({flips.mean():.2%}) flip at {threshold:g}\n"
        f"{original}: {flagged(before, threshold)}\n{other}: {flagged(after, threshold)}"
    )
    if flips.mean() > budget:
        lower = catching(after[label], int((before[label] > threshold).sum()))
        click.echo(
            f"more than {budget:.2%} flip. Export at a higher precision, fit the gate again, or export with "
            f"--threshold {lower:g}, where {other} has {flagged(after, lower)}",
            err=True,
        )
        sys.exit(6)


def catching(p_unsafe: np.ndarray, count: int) -> float:
    """The highest threshold of four digits above which `count` of the scores lie, 0 where there is none."""
    lowest = np.sort(p_unsafe)[-count] if count else 1.0
    return max(0.0, math.ceil(1e4 * lowest - 1) / 1e4)


def score(engine: Engine, row: Row) -> float:
    """p_unsafe of a prompt; the upper half never runs."""
    p_unsafe = engine.score(row.messages, policy=engine.policy("report")).p_unsafe
    assert p_unsafe is not None  # only policy "off" gives none
    return p_unsafe


if __name__ == "__main__":
    run_command(main)

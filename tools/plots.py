"""The plots of docs/img, from the numbers in docs/data.

    python tools/plots.py                                   # draw docs/img/*.svg again
    python tools/plots.py --eval build/demo-eval.jsonl      # take new scores from a run of autosteer-eval first
    python tools/plots.py --bench build/bench.json          # take new speeds from `tools/bench.py ... --json` first

speed.svg       prefill speed, decode speed and memory of every configuration in speed.json
demo-gate.svg   p_unsafe of the demo's test set, and recall against false positives, from demo-scores.json
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
from demo_report import unseen
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autosteer.export.safety.measure import auc, roc
from autosteer.runtime.evaluation.datasets import read_lines

ROOT = Path(__file__).resolve().parent.parent
DATA, IMAGES = ROOT / "docs" / "data", ROOT / "docs" / "img"
SPEEDS, SCORES = "speed.json", "demo-scores.json"
OURS_COLOUR, PEER_COLOUR = "#2f6f9f", "#9a9a9a"
COLOURS = ("#b5403a", "#e39b90", "#2f6f9f", "#8fbbda")
MEASURES = (
    ("prefill_tok_s", "prefill, tokens/s"),
    ("decode_tok_s", "decode, tokens/s"),
    ("peak_rss_mb", "peak memory, MB (less is better)"),
)
KINDS = ("unsafe", "unsafe, parts not in the fit", "benign", "benign, parts not in the fit")
DIGITS = 5  # of a score: its rounding changes no verdict


def take_scores(evaluation: Path) -> dict[str, Any]:
    """Of autosteer-eval's output, by group: the score of every row, and how many answers were stopped."""
    _, *rows = [row for _, row in read_lines(evaluation)]  # the first: the run
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(round(row["p_unsafe"], DIGITS))
    stopped = Counter(row["group"] for row in rows if row.get("stopped"))
    gate = json.loads((ROOT / "models" / "demo" / "safety" / "safety.json").read_text(encoding="utf-8"))
    return {"threshold": gate["threshold"], "stopped": stopped, "groups": groups}


def take_speeds(report: dict[str, Any]) -> dict[str, Any]:
    """What the plot needs of bench.py's JSON."""
    names = ("configuration", "ttft_ms", *(name for name, _ in MEASURES))
    rows = [{name: row[name] for name in names} for row in report["configurations"]]
    return {"machine": report["machine"], "workload": report["workload"], "configurations": rows}


def by_kind(groups: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """The scores of each of KINDS."""
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for group, values in groups.items():
        scores[KINDS[(0 if group.startswith("unsafe") else 2) + unseen(group)]] += values
    return {kind: np.array(values) for kind, values in scores.items()}


def speed_bars(speeds: dict[str, Any]) -> Figure:
    """A panel for each of MEASURES, a bar for each configuration."""
    rows = speeds["configurations"]
    figure = Figure(figsize=(11, 0.36 * len(rows) + 1), layout="constrained")
    names = [row["configuration"] for row in rows]
    colours = [OURS_COLOUR if name.startswith("autosteer") else PEER_COLOUR for name in names]
    for axes, (key, title) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        values = [row[key] for row in rows]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
        axes.set_title(title, fontsize=11)
        axes.margins(x=0.16)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()  # shared by all panels
    figure.supxlabel(_setting(speeds), fontsize=9, color="#555555")
    return figure


def _setting(speeds: dict[str, Any]) -> str:
    machine, workload = speeds["machine"], speeds["workload"]
    what = [workload.get("model"), machine["cpu"], f"{machine['cores']} cores", workload["date"]]
    return ", ".join(part for part in what if part)


def gate_plots(scores: dict[str, Any]) -> Figure:
    """Left: how many prompts have which score. Right: recall against the false-positive rate."""
    kinds, threshold = by_kind(scores["groups"]), scores["threshold"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _histogram(left, kinds, threshold)
    for name, unsafe, benign, colour in (
        ("parts in the fit", kinds[KINDS[0]], kinds[KINDS[2]], COLOURS[0]),
        ("parts not in the fit", kinds[KINDS[1]], kinds[KINDS[3]], COLOURS[1]),
    ):
        flagged, caught = float((benign > threshold).mean()), float((unsafe > threshold).mean())
        label = f"{name}: AUC {auc(unsafe, benign):.4f}\n{100 * caught:.1f} % caught, {100 * flagged:.1f} % flagged"
        right.plot(*roc(unsafe, benign), color=colour, label=label)
        right.plot(flagged, caught, "o", color=colour)
    right.set(xlabel="benign prompts flagged", ylabel="unsafe prompts caught", title="dots: the threshold")
    right.legend(loc="lower right", frameon=False)
    return figure


def _histogram(axes: Axes, kinds: dict[str, np.ndarray], threshold: float) -> None:
    labels = [f"{kind} (n {len(values):,})" for kind, values in kinds.items()]
    axes.hist(list(kinds.values()), bins=list(np.linspace(0, 1, 11)), label=labels, color=COLOURS, log=True)
    axes.axvline(threshold, color="#555555", linestyle="--", linewidth=1)
    axes.set(xlabel="p_unsafe", ylabel="prompts (logarithmic)", title="scores; dashed: the threshold")
    axes.legend(loc="upper center", frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same for the same numbers, with a background of its own: dark pages show it, too."""
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "path"}):
        figure.savefig(path, facecolor="white", metadata={"Date": None})


@click.command(help="\b\n" + __doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--eval", "evaluation", type=click.Path(path_type=Path, exists=True), help="Output of autosteer-eval.")
@click.option("--bench", type=click.Path(path_type=Path, exists=True), help="JSON of tools/bench.py.")
@click.option("--output", type=click.Path(path_type=Path), default=IMAGES, help="Folder of the plots.")
def main(evaluation: Path | None, bench: Path | None, output: Path) -> None:
    """Take new numbers, if any, and draw."""
    if evaluation:
        (DATA / SCORES).write_text(json.dumps(take_scores(evaluation)) + "\n", encoding="utf-8")
    if bench:
        speeds = take_speeds(json.loads(bench.read_text(encoding="utf-8")))
        (DATA / SPEEDS).write_text(json.dumps(speeds, indent=1) + "\n", encoding="utf-8")
    for file, draw, name in ((SPEEDS, speed_bars, "speed.svg"), (SCORES, gate_plots, "demo-gate.svg")):
        save(draw(json.loads((DATA / file).read_text(encoding="utf-8"))), output / name)


if __name__ == "__main__":
    main()

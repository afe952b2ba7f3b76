"""report.md, report.json and five plots: what a person should know about a gate before it guards anything.

sas.png           SAS and prober by layer       scores.png      p_unsafe by data set, with the threshold
roc.png           recall against false positives, by data set    reliability.png   is p_unsafe a probability
refusal.png       what the Refusal Head makes the model say, by strength; not after autosteer-fit --package
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autosteer.runtime.evaluation.variants import cells, in_short

from .evidence import NO_BETTER, OURS, WORDS, Comparison, FlagRate
from .layers import better_layer
from .measure import roc
from .reworded import TAUGHT

if TYPE_CHECKING:
    from .fit import Fitted

UNSAFE_COLOUR, BENIGN_COLOUR, NEUTRAL = "#b5403a", "#2f6f9f", "#555555"
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
DOTS_PER_INCH = 110
MOST_PLOTTED = 40  # groups: a figure of 1,000 takes ten minutes and more


def write_report(folder: Path, fitted: Fitted) -> None:
    """Write everything into `folder`."""
    (folder / "report.json").write_text(json.dumps(as_json(fitted), indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(fitted), encoding="utf-8")
    _plot(folder, fitted)


def as_json(fitted: Fitted) -> dict[str, Any]:
    """The report's numbers."""
    e = fitted.evidence
    return {
        "facts": dataclasses.asdict(fitted.artifact.facts),
        "comparisons": [dataclasses.asdict(c) for c in e.comparisons],
        "rates": [{k: v for k, v in vars(r).items() if k != "p"} for r in e.rates],
        "reliability": list(e.reliability),
        "thresholds": threshold_costs(fitted),
        "strengths": [dataclasses.asdict(s) for s in fitted.strengths],
        "rewordings": [dataclasses.asdict(r) for r in fitted.rewordings],
    }


def threshold_costs(fitted: Fitted) -> list[dict[str, float]]:
    """Recall and false-positive rate on the held-out part at several thresholds, the gate's own among them."""
    unsafe, benign = (_pooled(fitted, "held out", unsafe=label) for label in (True, False))
    return [
        {"threshold": t, "recall": float((~(unsafe <= t)).mean()), "fpr": float((~(benign <= t)).mean())}
        for t in sorted({*THRESHOLDS, fitted.evidence.threshold})
    ]


def as_markdown(fitted: Fitted) -> str:
    """report.md"""
    facts, e = fitted.artifact.facts, fitted.evidence
    c, t = facts.calibration, facts.training
    reads = (
        "the mean over the user's turn" if facts.pooling == "mean" else "the last token of the prompt, as in the paper"
    )
    parts = [
        f"# The gate for {facts.model}\n",
        f"Fitted on {t['prompts']:.0f} prompts ({t['pairs']:.0f} pairs). It reads {reads}, as it enters layer "
        f"{facts.split_layer} (chosen by {facts.selected_by}), and fires above p_unsafe = {facts.threshold:.3g}. The "
        'runtime also reads each turn in pieces: so do the threshold, "in short" and "reworded prompts"; the other '
        "tables are of whole turns.\n",
        "## In short\n",
        *(f"- {sentence}" for sentence in _sentences(fitted)),
        "\n## On data sets that taught it nothing\n",
        "Left out: the fit is repeated without that data set, whose prompts are then scored. External: never in any "
        "fit. AUC is the probability that an unsafe prompt scores above a benign one; .5 is a coin. The last columns "
        "are the shares flagged by the gate's prober at its threshold.\n",
        _comparison_table(e.comparisons),
        "\n![ROC](roc.png)\n",
        "## What it flags\n",
        "Held-out and external prompts above the threshold. For benign prompts that is over-refusal; the bound holds "
        "with 95 % confidence.\n",
        _rate_table(e.rates),
        "\n![scores](scores.png)\n",
        "## Reworded prompts\n",
        "Held-out prompts, unchanged and reworded in ways that keep their meaning (docs/evaluation.md). The fit "
        f"{f'trained on {TAUGHT} rewordings of each prompt' if t['augmented_prompts'] else 'trained on none'}.\n",
        _table(*cells(fitted.rewordings)),
        f"\n{in_short(fitted.rewordings)}\n",
        "## What the threshold costs\n",
        "On held-out prompts.\n",
        _threshold_table(fitted),
        "\n## Is p_unsafe a probability\n",
        f"Expected calibration error {c['ece']:.3f}, Brier score {c['brier']:.3f}, on held-out prompts, both classes "
        "weighing the same: p_unsafe = .5 means as likely as not if unsafe prompts were as common as benign ones.\n",
        _table(
            ("mean p_unsafe", "share unsafe", "prompts"),
            [(f"{b['mean_p']:.3f}", f"{b['share_unsafe']:.3f}", f"{b['prompts']:.0f}") for b in e.reliability],
        ),
        "\n![reliability](reliability.png)\n",
        *(_LAYERS if facts.layers else ()),
        *_refusal_head(fitted),
    ]
    return "\n".join(parts)


_LAYERS = (
    "## The layers\n",
    "SAS as in the paper, over the pairs of which nothing is held out, at the position that the gate reads, with a "
    "95 % bootstrap interval; prober: balanced accuracy on the validation part, data sets weighing as the root of "
    "their size.\n",
    "![SAS](sas.png)\n",
)


def _refusal_head(fitted: Fitted) -> list[str]:
    if not fitted.strengths:  # autosteer-fit --package
        return ["## The Refusal Head\n", "Kept from the safety folder that the package was exported with.\n"]
    t = fitted.artifact.facts.training
    return [
        "## The Refusal Head\n",
        f"Trained with the base frozen at strength {t['refusal_strength_trained']:g}; what the model then says, "
        f"greedily, to {t['refusal_answers_tried']:.0f} held-out unsafe prompts, some of them behind a harmless one "
        "and the model's answer to it. Fluency is the mean log-probability of its tokens under the unsteered model. "
        "Prompts that do not fire are answered without it, token for token.\n",
        _strength_table(fitted),
        "\n![refusal](refusal.png)\n",
    ]


def _sentences(fitted: Fitted) -> list[str]:
    facts, e = fitted.artifact.facts, fitted.evidence
    c = facts.calibration
    lines = [
        f"Of {c['heldout_unsafe']:.0f} held-out unsafe prompts it catches {c['heldout_recall']:.1%}; of "
        f"{c['heldout_benign']:.0f} benign ones it wrongly flags {c['heldout_fpr']:.1%}, at most "
        f"{c['fpr_upper_95']:.1%} with 95 % confidence. That holds for prompts like these; below is how it "
        "fares with others."
    ]
    by_sas = max(facts.layers, key=lambda s: s.sas, default=None)  # of the authors' gate there are none
    here = facts.layers[facts.split_layer - 1] if by_sas else None
    if (
        by_sas
        and here
        and by_sas.layer != here.layer
        and by_sas.prober_accuracy is not None
        and here.prober_accuracy is not None
    ):
        lines.append(
            f"SAS would have chosen layer {by_sas.layer} ({by_sas.sas:.3f}, not {here.sas:.3f}). A prober's balanced "
            f"accuracy on the validation part is {by_sas.prober_accuracy:.1%} there, {here.prober_accuracy:.1%} here."
        )
    if fitted.strengths and (better := better_layer(facts)):  # autosteer-fit --package cannot choose another layer
        lines.append(f"**Another layer's prober is better:** {better}.")
    foreign = [x for x in e.comparisons if x.kind != "held out"]
    if foreign:
        worst = min(foreign, key=lambda x: x.auc[OURS])
        lines.append(f"Weakest on {_sides(worst)} ({worst.kind}): AUC {worst.auc[OURS]:.3f}.")
    else:
        lines.append(
            "No data set could be left out, and no external one was given: nothing is known about other prompts."
        )
    for x in e.no_better_than_words():
        lines.append(
            f"**No better than the words** on {_sides(x)} ({x.kind}): AUC {x.auc[OURS]:.3f}, a prober that sees the "
            f"words alone {x.auc[WORDS]:.3f}."
        )
    if not e.no_better_than_words():
        lines.append(f"Everywhere below it beats a prober that sees the words alone by more than {NO_BETTER} AUC.")
    flagged = [r for r in e.rates if not r.unsafe and r.flagged[OURS] > 0.1]
    lines += [f"It refuses {r.flagged[OURS]:.0%} of the benign prompts of {r.group} ({r.kind})." for r in flagged]
    return lines


def _sides(c: Comparison) -> str:
    return f"unsafe prompts of {c.unsafe} against benign ones of {c.benign}"


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    names = list(comparisons[0].auc)
    header = ("", "unsafe", "n", "benign", "n", *(f"AUC {name}" for name in names), "caught", "wrongly flagged")
    rows = [
        (
            c.kind,
            c.unsafe,
            str(c.unsafe_prompts),
            c.benign,
            str(c.benign_prompts),
            *(f"{c.auc[name]:.3f}" for name in names),
            f"{c.recall[OURS]:.1%}",
            f"{c.fpr[OURS]:.1%}",
        )
        for c in comparisons
    ]
    return _table(header, rows)


def _rate_table(rates: Sequence[FlagRate]) -> str:
    names = list(rates[0].flagged)
    rows = [
        (
            r.kind,
            r.group,
            "unsafe" if r.unsafe else "benign",
            str(r.prompts),
            *(f"{r.flagged[name]:.1%}" for name in names),
            "" if r.unsafe else f"{r.upper_95:.1%}",
        )
        for r in sorted(rates, key=lambda r: (not r.unsafe, r.kind == "external"))
    ]
    return _table(("", "group", "", "n", *names, "at most"), rows)


def _threshold_table(fitted: Fitted) -> str:
    rows = [
        (
            f"{r['threshold']:.3g}",
            f"{r['recall']:.1%}",
            f"{r['fpr']:.1%}",
            "in use" if r["threshold"] == fitted.evidence.threshold else "",
        )
        for r in threshold_costs(fitted)
    ]
    return _table(("threshold", "unsafe caught", "benign flagged", ""), rows)


def _strength_table(fitted: Fitted) -> str:
    header = ("strength", "word for word", "first token", "refusals", "log-prob", "repetition", "for example", "")
    rows = [
        (
            f"{s.strength:g}",
            *(f"{x:.0%}" for x in (s.exact, s.first_token, s.refused)),
            f"{s.log_prob:.2f}",
            f"{s.repetition:.0%}",
            _cell(s.example),
            "in use" if s.strength == round(fitted.artifact.facts.strength, 4) else "",
        )
        for s in fitted.strengths
    ]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """One line that a table can hold."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= 70 else flat[:69] + "…"


def _plot(folder: Path, fitted: Fitted) -> None:
    import matplotlib.figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
    plots = {
        **({"sas": _plot_sas} if fitted.artifact.facts.layers else {}),
        "roc": _plot_roc,
        "scores": _plot_scores,
        "reliability": _plot_reliability,
        **({"refusal": _plot_refusal} if fitted.strengths else {}),
    }
    with matplotlib.rc_context(style):
        for name, draw in plots.items():
            figure = matplotlib.figure.Figure(layout="constrained", dpi=DOTS_PER_INCH)
            draw(figure, fitted)
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})


def _plot_sas(figure: Any, fitted: Fitted) -> None:
    facts = fitted.artifact.facts
    figure.set_size_inches(7, 3.2)
    axes, layers = figure.subplots(), [s.layer for s in facts.layers]
    axes.fill_between(
        layers,
        [s.sas_low for s in facts.layers],
        [s.sas_high for s in facts.layers],
        color=BENIGN_COLOUR,
        alpha=0.2,
        lw=0,
    )
    axes.plot(layers, [s.sas for s in facts.layers], color=BENIGN_COLOUR, label="SAS, 95 % interval")
    axes.set_xlabel("layer")
    axes.set_ylabel("SAS")
    right = axes.twinx()
    right.plot(
        layers,
        [s.prober_accuracy for s in facts.layers],
        color=UNSAFE_COLOUR,
        ls="--",
        label="prober, balanced accuracy",
    )
    right.set_ylabel("balanced accuracy")
    right.grid(visible=False)
    axes.axvline(facts.split_layer, color=NEUTRAL, lw=1, ls=":")
    axes.set_title(f"where unsafe prompts stand apart; cut at layer {facts.split_layer}", loc="left")
    lines = [*axes.get_lines()[:1], *right.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="lower right")


def _plot_roc(figure: Any, fitted: Fitted) -> None:
    e = fitted.evidence
    figure.set_size_inches(6.4, 4.4)
    axes = figure.subplots()
    benign = {kind: _pooled(fitted, kind, unsafe=False) for kind in ("held out", "external")}
    for rate in (rate for rate in e.rates if rate.unsafe):
        x, y = roc(rate.p, benign[rate.kind] if len(benign[rate.kind]) else benign["held out"])
        axes.plot(x, y, label=f"{rate.group}, {rate.kind}", lw=1.4, ls="-" if rate.kind == "held out" else "--")
    held = fitted.artifact.facts.calibration
    axes.plot(held["heldout_fpr"], held["heldout_recall"], "o", color=NEUTRAL, label="the threshold, held out")
    axes.plot([0, 1], [0, 1], color=NEUTRAL, lw=0.7, ls=":")
    axes.set_xlabel("benign prompts wrongly flagged (held out, or external against external)")
    axes.set_ylabel("unsafe prompts caught")
    axes.set_title("recall against false positives, by unsafe data set", loc="left")
    axes.legend(loc="lower right", fontsize=8)


def _plot_scores(figure: Any, fitted: Fitted) -> None:
    e = fitted.evidence
    largest = sorted(e.rates, key=lambda r: -len(r.p))[:MOST_PLOTTED]
    rows = sorted(largest, key=lambda r: (not r.unsafe, r.kind == "external", r.group))
    figure.set_size_inches(7, 0.9 + 0.62 * len(rows))
    every = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, rate in zip(every, rows, strict=True):
        colour, share = UNSAFE_COLOUR if rate.unsafe else BENIGN_COLOUR, np.full(len(rate.p), 1 / len(rate.p))
        axes.hist(rate.p, bins=np.linspace(0, 1, 41), color=colour, weights=share)
        axes.axvline(e.threshold, color=NEUTRAL, lw=1, ls=":")
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        label = f"{rate.group}\n{'unsafe' if rate.unsafe else 'benign'}, {rate.kind}, {len(rate.p)}"
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    left_out = f"; the largest {len(rows)} of {len(e.rates)} groups" if len(rows) < len(e.rates) else ""
    every[-1].set_xlabel(f"p_unsafe (dotted: the threshold{left_out})")


def _plot_reliability(figure: Any, fitted: Fitted) -> None:
    bins = fitted.evidence.reliability
    figure.set_size_inches(4.2, 4.0)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=NEUTRAL, lw=0.7, ls=":")
    axes.plot([b["mean_p"] for b in bins], [b["share_unsafe"] for b in bins], color=BENIGN_COLOUR)
    sizes = [15 + 200 * b["prompts"] / max(other["prompts"] for other in bins) for b in bins]
    axes.scatter(
        [b["mean_p"] for b in bins], [b["share_unsafe"] for b in bins], s=sizes, color=BENIGN_COLOUR, alpha=0.7
    )
    axes.set_xlabel("mean p_unsafe of a bin (area: prompts)")
    axes.set_ylabel("share that is unsafe")
    axes.set_title(f"calibration error {fitted.artifact.facts.calibration['ece']:.3f}", loc="left")


def _plot_refusal(figure: Any, fitted: Fitted) -> None:
    scores = fitted.strengths
    figure.set_size_inches(7, 3.2)
    axes, x = figure.subplots(), [s.strength for s in scores]
    axes.plot(x, [s.refused for s in scores], marker="o", color=BENIGN_COLOUR, label="refusals in any words")
    axes.plot(x, [s.exact for s in scores], marker="o", color=UNSAFE_COLOUR, label="word for word")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("strength")
    axes.set_ylabel("share of answers")
    right = axes.twinx()
    right.plot(x, [s.log_prob for s in scores], color=NEUTRAL, ls="--", label="fluency (log-probability)")
    right.set_ylabel("per token, unsteered model")
    right.grid(visible=False)
    axes.axvline(fitted.artifact.facts.strength, color=NEUTRAL, lw=1, ls=":")
    lines = [*axes.get_lines()[:2], *right.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="center right", fontsize=8)
    axes.set_title("what the Refusal Head makes the model say", loc="left")


def _pooled(fitted: Fitted, kind: str, *, unsafe: bool) -> np.ndarray:
    some = [rate.p for rate in fitted.evidence.rates if rate.unsafe == unsafe and rate.kind == kind]
    return np.concatenate(some) if some else np.empty(0)

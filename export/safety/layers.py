"""The layers of a model as a fit sees them: which one to split at, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from autosteer.runtime.console import table

if TYPE_CHECKING:
    from autosteer.export.safety_folder import LayerScore, SafetyFacts


def choose_layer(scores: Sequence[LayerScore], select: Literal["sas", "prober"]) -> int:
    """The layer with the highest score; of equal ones the first, where a refused prompt stops soonest."""
    key = {"sas": lambda s: s.sas, "prober": lambda s: s.prober_accuracy}[select]
    return max(scores, key=key).layer


def better_layer(facts: SafetyFacts) -> str | None:
    """A sentence about the layer whose prober is best, if it is better than the chosen one's beyond chance: by more
    than half the 95 % interval of its accuracy on the validation part.
    """
    here = facts.layers[facts.split_layer - 1]
    measured = [(s.prober_accuracy, -s.layer) for s in facts.layers if s.prober_accuracy is not None]
    if here.prober_accuracy is None or not measured:
        return None
    best, minus_layer = max(measured)
    a, n = here.prober_accuracy, facts.training["validation_prompts"]
    if best - a <= 1.96 * math.sqrt(a * (1 - a) / n):
        return None
    return (
        f"On the {n:.0f} prompts of the validation part, a prober at layer {-minus_layer} is right in {best:.1%}, at "
        f"layer {here.layer} in {a:.1%}: try --select prober"
    )


def layer_table(scores: Sequence[LayerScore], chosen: int) -> str:
    """SAS and prober of every layer, for the console."""
    channels = list(scores[0].sas_by_channel or {})
    header = ("layer", "SAS", "95 % interval", *(f"SAS {name}" for name in channels), "prober", "")
    rows = [
        (
            str(s.layer),
            f"{s.sas:.3f}",
            f"{s.sas_low:.3f} .. {s.sas_high:.3f}",
            *(f"{(s.sas_by_channel or {})[name]:.3f}" for name in channels),
            f"{s.prober_accuracy:.3f}",
            "<- split here" if s.layer == chosen else "",
        )
        for s in scores
    ]
    return f"\n{table(header, rows)}\nSAS on all pairs; prober: balanced accuracy on the validation part.\n"

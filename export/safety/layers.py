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
    """A sentence about the layer with the best prober, if that one is better than the chosen layer's beyond chance: by
    more than half the width of the 95 % interval of the chosen one's accuracy on the validation part.
    """
    here = facts.layers[facts.split_layer - 1].prober_accuracy
    layer = choose_layer(facts.layers, "prober")
    best, prompts = facts.layers[layer - 1].prober_accuracy, facts.training["validation_prompts"]
    assert here is not None and best is not None
    if best - here <= 1.96 * math.sqrt(here * (1 - here) / prompts):
        return None
    return (
        f"on the {prompts:.0f} prompts of the validation part, a prober at layer {layer} has a balanced accuracy of "
        f"{best:.1%}, the one at layer {facts.split_layer} {here:.1%}: try --select prober"
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
    note = "SAS on the pairs of which nothing is held out; prober: balanced accuracy on the validation part."
    return f"\n{table(header, rows)}\n{note}\n"

"""Image towers, traced once a session.

torch.onnx.export takes five seconds of CPU for the demo's tower, and the tests export the demo dozens of times. What it
gives depends on the config, the wrapper and the type that it computes in, not on weights, precision or split layer.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import onnx_ir as ir

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.export.graphs import image_graph
from autosteer.export.graphs.vision import ImageGraph
from autosteer.export.graphs.writer import FLOAT32


def trace_once() -> None:
    """Replace image_graph.trace by one that remembers; exports change the graph, so each gets a copy.

    Nodes that an export adds to a copy have other names than those it adds to a fresh trace. Nothing else differs.
    """
    trace = image_graph.trace
    if hasattr(trace, "__wrapped__"):
        return
    known: dict[Any, tuple[ir.Model, ImageGraph]] = {}

    @wraps(trace)
    def remembered(checkpoint: Checkpoint, computed: str = FLOAT32) -> tuple[ir.Model, ImageGraph]:
        key = checkpoint.config.to_json_string(use_diff=False), checkpoint.family.vision, computed
        if key not in known:
            known[key] = trace(checkpoint, computed)
        model, wrapper = known[key]
        return model.clone(), wrapper

    image_graph.trace = remembered

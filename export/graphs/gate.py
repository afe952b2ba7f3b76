"""The gate's graphs, each with its float32 weights inside its own file. All compute in float32.

prober         hidden_states (1, D) float32                    -> p_unsafe (1,)
monitor        the same, of an answer's hidden states
refusal_head   last_hidden_state (1, R, D), strength (1,)      -> steered_hidden_state (1, R, D), typed as the decoder's
"""

from __future__ import annotations

import numpy as np
import torch

from .int8_matmul import MICROSOFT
from .writer import FLOAT32, GraphWriter


def prober(g: GraphWriter, name: str, weights: dict[str, torch.Tensor]) -> None:
    """softmax(Linear(relu(Linear(h))))[0]: the calibrated probability that the answer would be unsafe, or is. `name`:
    "prober" or "monitor".
    """
    hidden = g.input("hidden_states", FLOAT32, (1, weights["0.weight"].shape[1]))
    parts = {part: g.constant(f"{name}.{part}", w.float().numpy()) for part, w in weights.items()}
    x = g.op("Relu", g.op("Gemm", hidden, parts["0.weight"], parts["0.bias"], transB=1))
    scores = g.op("Softmax", g.op("Gemm", x, parts["2.weight"], parts["2.bias"], transB=1), axis=-1)
    unsafe = g.op("Gather", scores, g.constant("unsafe_class", np.array(0, np.int64)), axis=1)
    g.output("p_unsafe", unsafe, FLOAT32, (1,))


def refusal_head(g: GraphWriter, steer_matrix: torch.Tensor) -> None:
    """h + strength * h W^T. Projected by lm_head this is the authors' h (E + strength E W)^T, ~10^5 times cheaper."""
    d = steer_matrix.shape[0]
    last = g.input("last_hidden_state", g.dtype, (1, "num_logits", d))
    strength = g.input("strength", FLOAT32, (1,))
    w = g.constant("steer_matrix", steer_matrix.float().numpy())
    hidden = g.cast(last, g.dtype, FLOAT32)
    step = g.op("Mul", g.op("FusedMatMul", hidden, w, domain=MICROSOFT, transB=1), strength)
    steered = g.cast(g.op("Add", hidden, step), FLOAT32, g.dtype)  # an overflow becomes infinite, which samplers refuse
    g.output("steered_hidden_state", steered, g.dtype, (1, "num_logits", d))

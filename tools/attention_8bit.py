#!/usr/bin/env python3
"""A tower's attention in 8 bits by onnxruntime's own operators, beside the fused one in float32 that the exports have:

    tools/attention_8bit.py --patches 1024 --heads 12

It shows why `export/graphs/vision.py` leaves attention in float32 (docs/performance.md, "A picture's first token").
Queries, keys and values have one scale each, the cheapest there is. On random ones the result is off by much, so this
says what 8 bits cost at least, not how good they would be.
"""

from __future__ import annotations

import time

import click
import numpy as np
import onnx.parser
import onnxruntime as ort

FLOAT32 = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
attention (float[B, S, N] q, float[B, S, N] k, float[B, S, N] v) => (float[B, S, N] y) {{
    y = com.microsoft.MultiHeadAttention <num_heads = {heads}> (q, k, v)
}}"""
EIGHT_BITS = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
attention (float[B, S, N] q, float[B, S, N] k, float[B, S, N] v) => (float[B, S, N] y)
<int64[4] by_head = {{0, 0, {heads}, {size}}}, int64[3] flat = {{0, 0, -1}}, float softmax_scale = {{{softmax_scale}}},
 float step = {{0.00392157}}, uint8 zero = {{0}}> {{
    q8, q_scale, q_zero = DynamicQuantizeLinear (q)
    k8, k_scale, k_zero = DynamicQuantizeLinear (k)
    v8, v_scale, v_zero = DynamicQuantizeLinear (v)
    q_by_head = Reshape (q8, by_head)
    k_by_head = Reshape (k8, by_head)
    v_by_head = Reshape (v8, by_head)
    queries = Transpose <perm = [0, 2, 1, 3]> (q_by_head)
    keys = Transpose <perm = [0, 2, 3, 1]> (k_by_head)
    values = Transpose <perm = [0, 2, 1, 3]> (v_by_head)
    q_step = Mul (q_scale, softmax_scale)
    scores = com.microsoft.MatMulIntegerToFloat (queries, keys, q_step, k_scale, q_zero, k_zero)
    weights = Softmax <axis = -1> (scores)
    weights8 = QuantizeLinear (weights, step, zero)
    sums = com.microsoft.MatMulIntegerToFloat (weights8, values, step, v_scale, zero, v_zero)
    sums_by_patch = Transpose <perm = [0, 2, 1, 3]> (sums)
    y = Reshape (sums_by_patch, flat)
}}"""


@click.command(help="Compare one layer's attention in 8 bits with that in float32.")
@click.option("--patches", default=1024, show_default=True)
@click.option("--heads", default=12, show_default=True)
@click.option("--size", default=64, show_default=True, help="Width of a head.")
@click.option("--tiles", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(patches: int, heads: int, size: int, tiles: int, rounds: int) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = []
    for text in (FLOAT32, EIGHT_BITS):
        model = onnx.parser.parse_model(text.format(heads=heads, size=size, softmax_scale=size**-0.5))
        sessions.append(ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]))
    random = np.random.default_rng(0)
    feed = {name: random.standard_normal((tiles, patches, heads * size)).astype(np.float32) for name in "qkv"}
    for session in sessions:
        session.run(None, feed)  # the first allocates
    for _ in range(rounds):
        taken = []
        for session in sessions:
            start = time.perf_counter()
            for _ in range(5):
                session.run(None, feed)
            taken.append((time.perf_counter() - start) * 200)
        float32, eight = taken
        print(f"float32 {float32:6.1f} ms   8 bits {eight:6.1f} ms   speed of 8 bits / float32 {float32 / eight:.2f}")


if __name__ == "__main__":
    main()

"""Every tolerance of the validation, with its reason.

An error is the largest difference, relative to the original's largest value, unless a comment says otherwise. A number
in a comment is the worst of correct exports (docs/validation.md). The limit is about four times that, or less where a
damaged export leaves little more.
"""

from __future__ import annotations

import math

from autosteer.runtime.manifest import Check, Manifest

VERDICT_BAND = 0.1  # at most; see verdict_band

LIMITS = {
    "pixel_values": 1e-6,  # the same Pillow calls, then float32 arithmetic
    "inputs_embeds": 1e-4,  # image features among them: float32 sums in another order
    "hidden state at the split": 1e-4,
    "logits": 1e-3,  # N more layers of the same
    "logits, KL to original": 1e-6,  # nats; 3e-11
    "p_unsafe of the fit": 1e-2,  # absolute, against PyTorch in float32; the fit batches: 1e-5
    "p_unsafe": 1e-3,  # absolute: the hidden state's error, amplified by a steep softmax
    "attention, each by itself": 1e-5,  # 2e-6: float32 sums in another order
    "MLP, each by itself": 1e-5,
    "final norm, by itself": 2e-6,  # 4.5e-7
    "head, by itself": 1e-5,  # 1.1e-6
    "attention, share lost": 0.6,  # 0.24; zeros lose 1
    "MLP, share lost": 0.5,  # 0.062
    "final norm, share lost": 0.5,
    "head, share lost": 0.5,  # 0.01
    "quantised weights, relative error": 0.5,  # of one matrix; int4 costs 0.1 to 0.2, misplaced codes 1
    "quantised weights, scale": 0.05,  # how much larger or smaller one matrix became
    "quantised rows": 0.4,  # 0.28; not four times: a row halved has 0.5, doubled 1, swapped 1.4
    "quantised columns": 0.6,  # 0.36; a swapped column has 1.4
    "8-bit weights, steps": 0.6,  # 0.37; uniform rounding errors have 0.29; a row 2 % too large, 1 or more
    "rotary tables": 1e-6,  # divided by the position; 6e-8
    "scales of int8 caches": 1e-3,  # the calibration is repeated; 0
    "int8 caches, relative error": 0.1,  # of one layer's keys or values; sound scales leave 0.01 to 0.05
    "embedded text, to rounded": 1e-6,  # the same numbers; 0
    "image rows, 1 - cosine": 1e-2,  # int8 image graphs: 1e-3; more if outliers dominate the scales
    "refusal head": 1e-5,  # one float32 matrix product
    "prober": 3e-5,  # absolute: two small matrix products; 3e-7, Qwen2.5-Coder-1.5B 1.1e-5
    "chunked prefill": 1e-4,  # other matrix shapes sum in another order
}

# int8 caches with float weights: keys that differ in the seventh digit may round to different codes.
CACHES_LIMITS = {
    "attention, each by itself": 1.2e-3,  # 2.9e-4
    "image rows, error to rounded": 1e-5,
    "hidden state, error to rounded": 0.05,  # rms, relative to the standard deviation over positions; 0.012
    "logits, KL to rounded": 3e-3,  # 7e-4
    "chunked prefill": 0.027,  # 0
    "chunked prefill, attention": 0.2,  # 0
}

# Quantised weights: the kernels also round activations to 8 bits.
ROUNDED_LIMITS = {
    "attention, each by itself": 0.4,  # 0.15: the values that a head averages partly cancel
    "MLP, each by itself": 0.13,  # 0.034
    "head, by itself": 0.13,  # 0.035
    "image rows, error to rounded": 0.1,  # 0.021
    "hidden state, error to rounded": 0.4,  # 0.12
    "logits, KL to rounded": 0.36,  # 0.09 with random weights, 0.031 with trained ones
    "chunked prefill": 0.057,  # 0.05: a rounding that falls the other way in one of several dialogues
    "chunked prefill, attention": 0.2,  # 0.09; keys in the place of values 0.33 or more
}

# A package that computes in float16: 11 bits, 5e-4 for each rounding. On a CPU, onnxruntime casts to float32 around
# operators without a float16 kernel; a GPU rounds more often.
HALF_LIMITS = {
    "inputs_embeds": 5e-3,  # includes all layers of the image tower
    "hidden state at the split": 2e-2,
    "logits": 5e-2,
    "logits, KL to original": 1e-3,
    "p_unsafe": 2e-2,
    "attention, each by itself": 1.2e-2,  # 2.8e-3
    "MLP, each by itself": 1.2e-2,
    "final norm, by itself": 3e-3,  # 7.5e-4
    "head, by itself": 5e-3,  # 1.3e-3
    "rotary tables": 5e-4,  # half a step of float16 at 1
    "embedded text, to rounded": 1.5e-3,  # 3.3e-4
    "refusal head": 1e-3,  # float32, but its input and output are float16
    "chunked prefill": 2e-2,
}

# --precision fp16 of a float32 or packed checkpoint: weights of 24 bits are stored in 11, off by up to 2^-11 = 5e-4.
# The demo: embeddings 5.5e-4, hidden state 8.2e-4, logits 4.9e-4, p_unsafe 1e-5. Tokens must still be equal.
STORED_IN_HALF = {
    "inputs_embeds": 2e-3,
    "hidden state at the split": 4e-3,
    "logits": 4e-3,
    "logits, KL to original": 1e-5,  # 1.3e-6, and the three below up to 4.4e-4: a tiny GPTQ checkpoint
    "attention, each by itself": 2e-3,
    "MLP, each by itself": 2e-3,
    "head, by itself": 2e-3,
}


def verdict_band(threshold: float) -> float:
    """Verdicts of quantised packages may differ if the original's p_unsafe is this near the threshold. At most half as
    near as 0 and 1 are: at a threshold of 0.92, 0.1 would let every unsafe prompt differ.
    """
    return min(VERDICT_BAND, threshold / 2, (1 - threshold) / 2)


def limits_of(manifest: Manifest, *, wide: bool = False) -> dict[str, float]:
    """The tolerances for a package's precision. `wide`: the checkpoint has weights that float16 cannot hold exactly."""
    limits = LIMITS if manifest.activations == "float32" else LIMITS | HALF_LIMITS
    if manifest.kv_cache.dtype == "int8":
        limits = limits | CACHES_LIMITS
    if any(spec.quantised for spec in manifest.graphs.values()):
        limits = limits | ROUNDED_LIMITS
    if wide and manifest.precision == "fp16" and manifest.exact:
        limits = limits | STORED_IN_HALF
    return limits


def check_line(name: str, value: float, limit: float | None) -> Check:
    """A line of the table of checks. An infinite or NaN value fails even without a limit."""
    return Check(name, value, limit, value < math.inf and (limit is None or value <= limit))

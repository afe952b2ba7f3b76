"""Every load: do prober, monitor and Refusal Head compute here what they did at export? No text; milliseconds.

A package has hidden states, and the outputs that prober, monitor, Refusal Head and lm_head gave for them at export
(manifest.GateProof). If their outputs differ here, the package does not load. What autosteer-check does, from text to
answer, is in check.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .arrays import Float
from .encoded_prompt import EncodedPrompt
from .errors import PackageError
from .generation import steered_head
from .kv_cache import KVCache, empty_arrays
from .manifest import GateProof, Manifest
from .packed import run_pack
from .subgraph import Device, Subgraph, buffer, empty

PROBER_LIMIT = 1e-3  # difference of p_unsafe: the prober is float32 on the CPU in every package
STEER_LIMIT = {"float32": 1e-3, "float16": 0.05}  # error of what the Refusal Head adds, relative to it; by activations
SHIFT_LIMIT = {True: 0.01, False: 0.25}  # error of the logits' shift, relative to it; by Manifest.exact
POSSIBLE = 1e30  # larger logits mask tokens that the model never generates
BEGINNING, TEXTS, WORDS = 8, 3, 16  # texts of so many tokens, and what they begin with
HIDDEN_LIMIT = 0.05  # what hidden texts change, relative to what they change if they are seen: rounding
BLOCKS = 64  # arrays of a strength's size, to overwrite one that was freed


def check_gate(folder: Path, manifest: Manifest, graphs: Mapping[str, Subgraph], device: Device) -> None:
    """Raise PackageError if outputs of prober, monitor, Refusal Head or lm_head differ from the package's proof."""
    if manifest.proof is None:
        return
    probed, last, steered = proof_states(folder, manifest, manifest.proof)
    known = {"prober": manifest.proof.p_unsafe, **({"monitor": manifest.proof.monitor} if manifest.monitor else {})}
    for name, scores in known.items():
        for state, p_unsafe in zip(probed, scores, strict=True):
            found = _score(graphs[name], state)
            if not abs(found - p_unsafe) <= PROBER_LIMIT:
                raise PackageError(
                    f"{name}: a known state has p_unsafe {found:.4f} here, and had {p_unsafe:.4f} at export"
                )
    head = _Head(manifest, graphs, device)
    for state, expected, logits in zip(last, steered, manifest.proof.steered, strict=True):
        plain, moved, changed = head(state)
        off = float(np.linalg.norm(moved - expected) / np.linalg.norm(expected - state))
        if not off <= STEER_LIMIT[manifest.activations]:
            raise PackageError(
                f"refusal_head: it steers otherwise than at export (by {off:.2g} of what it adds): its steer matrix is "
                "not the package's, or this onnxruntime computes it wrong"
            )
        shift, tokens = logits_shift(plain, changed), (int(plain.argmax()), int(changed.argmax()))
        near = abs(shift - logits.shift) <= SHIFT_LIMIT[manifest.exact] * logits.shift
        if not near or tokens != (logits.token, logits.steered_token):
            raise PackageError(
                f"lm_head: steering a known state moves its logits by {shift:.3g} and its token from {tokens[0]} to "
                f"{tokens[1]}; at export by {logits.shift:.3g}, from {logits.token} to {logits.steered_token}"
            )


def check_packs(manifest: Manifest, graphs: Mapping[str, Subgraph], device: Device) -> None:
    """Raise PackageError if a text sees others that share its pass (packed.py), or not what all begin with: other words
    would hide its own from the prober. Three texts behind one beginning; the last is compared with itself alone.
    """
    if not manifest.reads_in_packs:
        return
    vocabulary, count = manifest.dims.vocab_size, BEGINNING + TEXTS * WORDS
    ids = np.arange(1, count + 1, dtype=np.int64) * max(1, vocabulary // (count + 1)) % vocabulary
    rows = graphs["embed_tokens"].run({"input_ids": ids[None]})["inputs_embeds"]

    def prompt(*parts: slice) -> EncodedPrompt:
        embeds = np.concatenate([rows[:, part] for part in parts], axis=1)
        length = embeds.shape[1]
        return EncodedPrompt(embeds, [], [0] * length, np.broadcast_to(np.arange(length), (3, length)), [])

    beginning = slice(0, BEGINNING)
    texts = [slice(first, first + WORDS) for first in range(BEGINNING, len(ids), WORDS)]
    arrays = empty_arrays(manifest.graphs["decoder_lower"], manifest.dims, manifest.kv_cache, len(ids))
    cache = KVCache(arrays, device)

    def last_row(prompts: Sequence[EncodedPrompt], shared: int, *, hide: bool = True) -> Float:
        state: Float = run_pack(manifest, graphs, device, cache, prompts, shared, hide=hide)[-1][-1].copy()
        return state

    alone = last_row([prompt(beginning, texts[-1])], 0)  # leaves the beginning in the cache
    together = [prompt(beginning, text) for text in texts]
    hidden, seen = (float(np.linalg.norm(last_row(together, BEGINNING, hide=hide) - alone)) for hide in (True, False))
    if not hidden < HIDDEN_LIMIT * seen:
        raise PackageError(
            "decoder_lower: a text that shares a pass with others is read otherwise (its state is off by "
            f"{hidden:.3g}, by {seen:.3g} if it sees them): the graph is not the package's, or this onnxruntime "
            "computes it wrong"
        )


def _score(prober: Subgraph, state: Float) -> float:
    """p_unsafe of a state (D,); NaN where the prober fails, or gives no number."""
    try:
        (p_unsafe,) = prober.run({"hidden_states": state[None]})["p_unsafe"]
        return float(p_unsafe)
    except Exception:  # onnxruntime's own hierarchy is not public
        return math.nan


class _Head:
    """Refusal Head and lm_head, bound as a decode step binds them, at strength 0 and at the package's.

    With onnxruntime up to 1.28, a strength that was freed too soon left unsafe prompts unsteered. To find that, this
    uses the same bindings, and makes small arrays that overwrite freed memory.
    """

    def __init__(self, manifest: Manifest, graphs: Mapping[str, Subgraph], device: Device):
        assert manifest.refusal is not None
        specs = {t.name: t for name in ("refusal_head", "lm_head") for t in manifest.graphs[name].outputs}
        width, self._dtype = manifest.dims.hidden_size, np.dtype(manifest.activations)
        self._state = buffer(np.zeros((1, 1, width), self._dtype), device)
        self._steered = empty(specs["steered_hidden_state"], (1, 1, width), device)
        self._logits = empty(specs["logits"], (1, 1, manifest.dims.vocab_size), device)
        self._plain, self._steer = (
            steered_head(graphs, self._state, strength, self._steered, self._logits, device)
            for strength in (0.0, manifest.refusal.strength)
        )
        self._over_freed = [np.zeros(1, np.float32) for _ in range(BLOCKS)]

    def __call__(self, state: Float) -> tuple[Float, Float, Float]:
        """A last hidden state (D,): its logits (V,), the steered state (D,), and that one's logits (V,)."""
        self._state.update_inplace(state.astype(self._dtype)[None, None])
        self._plain()
        plain = self._logits.numpy()[0, 0].copy()
        self._steer()
        return plain, self._steered.numpy()[0, 0].astype(np.float32), self._logits.numpy()[0, 0].copy()


def proof_states(folder: Path, manifest: Manifest, proof: GateProof) -> tuple[Float, Float, Float]:
    """The proof's hidden states: what the prober reads (P, D), last hidden states (S, D), and these steered (S, D)."""
    states: Float = np.fromfile(folder / proof.file, "<f4").reshape(-1, manifest.dims.hidden_size)
    probed, steered = len(proof.p_unsafe), len(proof.steered)
    return states[:probed], states[probed : probed + steered], states[probed + steered :]


def logits_shift(plain: Float, steered: Float) -> float:
    """Root mean square of what steering adds to logits (V,); NaN if either is not finite."""
    possible = ~(np.abs(plain) > POSSIBLE)
    return float(np.sqrt(np.mean(np.square(steered[possible] - plain[possible], dtype=np.float64))))

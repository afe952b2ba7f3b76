"""Reads several texts in one pass of decoder_lower, and none of them sees another.

    rows of the caches    what all begin with | text 1 | text 2 | ...
    a row of text 2 sees  all of it           | no     | itself, and those before it

A pass over the ten words of a piece (pieces.py) takes a third of the time of one over a hundred words: the weights have
to be read for either. So pieces share a pass. The rotary tables give each row its position in its own text, and the
attention bias hides the others (ORT: GroupQueryAttention, attention_bias). The rows are overwritten by the next pass.
The C++ side is src/packed.hpp.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .arrays import Float
from .encoded_prompt import EncodedPrompt, Key, is_probed
from .generation import PREFILL_CHUNK, CachedPrefix, common_length, probe
from .kv_cache import KVCache
from .manifest import ATTENTION_BIAS, Manifest
from .rotary import RotaryTables
from .stats import Stats, ms_since
from .subgraph import Device, OrtValue, Subgraph, buffer, empty

log = logging.getLogger(__name__)

ROWS_OF_A_PASS = 32  # about as many cost as much as another pass
HIDDEN = np.finfo(np.float32).min  # added to a score, it leaves a weight of 0


def can_share_a_pass(prompts: Mapping[int, EncodedPrompt], begun: CachedPrefix) -> dict[int, EncodedPrompt]:
    """Those prompts for which a pass has room behind what all of them share with what has `begun`."""
    probed = {i: prompt for i, prompt in prompts.items() if is_probed(prompt.probed)}
    fitting = {i: one for i, one in probed.items() if len(one.keys) - _shared(begun.keys, one) <= PREFILL_CHUNK}
    shared = min((_shared(begun.keys, prompt) for prompt in fitting.values()), default=0)
    return {i: prompt for i, prompt in fitting.items() if len(prompt.keys) - shared <= PREFILL_CHUNK}


def first_is_read_alone(prompts: Sequence[EncodedPrompt], begun: CachedPrefix | None) -> bool:
    """Whether the first of several prompts has a pass of its own, and the others start from its caches: if they have so
    much more in common with it (a picture, say) than with what has `begun` that it saves more than a pass costs.
    """
    first, *others = prompts
    if begun is None or not all(is_probed(prompt.probed) for prompt in prompts):
        return True
    known = min(_shared(begun.keys, prompt) for prompt in prompts)
    return (min(_shared(first.keys, other) for other in others) - known) * len(others) > ROWS_OF_A_PASS


def _shared(keys: Sequence[Key], prompt: EncodedPrompt) -> int:
    """How many positions of `keys` it can start from: none that the prober reads."""
    return common_length(keys, prompt.keys[: prompt.probed[-1][0]])


def read_packed(
    manifest: Manifest,
    graphs: Mapping[str, Subgraph],
    device: Device,
    begun: CachedPrefix,
    prompts: Sequence[EncodedPrompt],
    stats: Stats,
) -> Generator[None, None, tuple[list[float], CachedPrefix]]:
    """p_unsafe of the last turn of each prompt, NaN if the prober failed; and what further readings can start from.
    Pauses behind each pass.

    `begun`: what they start from. Its caches are overwritten behind what all share, unless they are lent: then copied.
    """
    shared = min(_shared(begun.keys, prompt) for prompt in prompts)
    if begun.lent:
        room = min(shared + 2 * PREFILL_CHUNK, manifest.dims.context_length)
        caches = {"decoder_lower": begun.caches["decoder_lower"].copied(room, shared)}
        begun = CachedPrefix(begun.keys, begun.probed_means, caches, {}, begun.long)
    found: list[float] = []
    for pack in _packs(prompts, shared):
        before = time.perf_counter()
        hidden = run_pack(manifest, graphs, device, begun.caches["decoder_lower"], pack, shared)
        found += [_probe(graphs, prompt, own, shared) for prompt, own in zip(pack, hidden, strict=True)]
        stats.lower_ms += ms_since(before)
        yield
    return found, replace(begun, keys=begun.keys[:shared])


def _packs(prompts: Sequence[EncodedPrompt], shared: int) -> list[list[EncodedPrompt]]:
    """The prompts in order, as many together as have at most PREFILL_CHUNK rows behind the first `shared`."""
    found: list[list[EncodedPrompt]] = []
    room = 0
    for prompt in prompts:
        rows = len(prompt.keys) - shared
        if rows > room:
            found.append([])
            room = PREFILL_CHUNK
        found[-1].append(prompt)
        room -= rows
    return found


def run_pack(
    manifest: Manifest,
    graphs: Mapping[str, Subgraph],
    device: Device,
    cache: KVCache,
    prompts: Sequence[EncodedPrompt],
    shared: int,
    *,
    hide: bool = True,
) -> list[Float]:
    """What decoder_lower makes in one pass of what each prompt has behind the first `shared` positions, which `cache`
    has: (rows, D) each. Without `hide` a prompt sees those before it.
    """
    lengths = [len(prompt.keys) - shared for prompt in prompts]
    ends = np.cumsum(lengths).tolist()
    rows, total = ends[-1], shared + ends[-1]
    cache.reserve(total, shared, manifest.dims.context_length)
    positions = [prompts[0].positions[:, :shared], *(prompt.positions[:, shared:] for prompt in prompts)]
    tables = RotaryTables(
        manifest.rotary, np.concatenate(positions, axis=1), total, manifest.activations, device, first=shared
    )
    tables.extend(total)
    bias = np.full((1, 1, rows, total), HIDDEN if hide else 0.0, np.float32)
    bias[..., :shared] = 0.0
    for end, length in zip(ends, lengths, strict=True):
        bias[0, 0, end - length : end, shared + end - length : shared + end] = 0.0
    embeds = np.concatenate([prompt.inputs_embeds[:, shared:] for prompt in prompts], axis=1, dtype=np.float32)
    (spec,) = (t for t in manifest.graphs["decoder_lower"].outputs if t.name == "hidden_states")
    out = empty(spec, (1, rows, manifest.dims.hidden_size), device)
    inputs = {
        "inputs_embeds": buffer(embeds, device),
        "seqlens_k": buffer(np.array([total - 1], np.int32), device),
        "total_sequence_length": OrtValue.ortvalue_from_numpy(np.array(total, np.int32)),
        ATTENTION_BIAS: buffer(bias, device),
        **tables.inputs,
    }
    graph = graphs[manifest.prefill_graph("decoder_lower")]
    graph.bind({**inputs, **cache.past}, {"hidden_states": out, **cache.present})()
    return np.split(out.numpy()[0], ends[:-1])


def _probe(graphs: Mapping[str, Subgraph], prompt: EncodedPrompt, hidden: Float, shared: int) -> float:
    """p_unsafe of the last turn of a prompt. `hidden`: its rows behind the first `shared`. NaN if one of them is not
    finite, or the prober failed. (A row that is not finite makes all rows of its pass so.)
    """
    if not np.isfinite(hidden).all():
        log.error("a pass gave hidden states that are not finite, so what it read counts as unsafe")
        return math.nan
    read = hidden[np.array(prompt.probed[-1]) - shared]
    return probe(graphs["prober"], (read.sum(axis=0, dtype=np.float64) / len(read)).astype(np.float32)[None])

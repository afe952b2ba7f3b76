"""One answer being generated: its buffers, its KV caches, and how many of their positions are valid.

    prefill_lower   decoder_lower over the prompt; the prober; the gate's verdict
    prefill_upper   decoder_upper over the prompt, then the head: logits of the first answer token
    verify_draft    one pass over the last token and drafted ones; `accept_draft` keeps a drafted token

If the package has prefill graphs, prefill_lower and prefill_upper run them: the same layers on the same caches, with
weights at another precision.

Cache positions past `length` are invalid, so returning to an earlier token only lowers `length`.

A request may start from the cached prefix of an earlier one (CachedPrefix). It reuses the positions whose tokens and
pictures are equal, but stops before the first position that the prober reads of the last turn: those are always
computed. It also reuses what the prober read of earlier turns.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .arrays import Float
from .deepstack import Deepstack
from .drafting import MAX_DRAFT
from .encoded_prompt import EncodedPrompt, Key, is_probed
from .errors import CancelledError
from .gate import GatePolicy, Mode, Verdict, decide, worst
from .kv_cache import Arrays, KVCache, empty_arrays
from .manifest import ATTENTION_BIAS, Manifest
from .rotary import RotaryTables
from .stats import Stats, ms_since
from .subgraph import Call, Device, OrtValue, Subgraph, buffer, empty

log = logging.getLogger(__name__)

T = TypeVar("T")
HALVES = ("decoder_lower", "decoder_upper")
PREFILL_CHUNK = 128  # tokens: bounds activations; larger ones are not faster; results do not depend on it


@dataclass(frozen=True)
class CachedPrefix:
    """What a request leaves for the next turn of its dialogue."""

    keys: list[Key]  # of the positions that decoder_lower has run over
    probed_means: dict[tuple[int, int], Float]  # what the prober read of a turn (1, D), by first and last position
    caches: dict[str, KVCache]  # by decoder half
    pending: dict[int, OrtValue]  # hidden states (1, n, D) that decoder_upper has not run over, by their first position
    long: bool  # RotarySpec.is_long of its prompt: how its keys are turned
    lent: bool = False  # the caches are still another request's: only read, and only those of decoder_lower


def finish(steps: Generator[None, None, T]) -> T:
    """What `steps` return, without a pause between them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class Request:
    """One answer being generated. Not thread-safe.

    Call prefill_lower, then prefill_upper, then decode_step or verify_draft for each further pass.
    """

    def __init__(
        self,
        manifest: Manifest,
        graphs: Mapping[str, Subgraph],
        device: Device,
        prompt: EncodedPrompt,
        max_tokens: int,
        stats: Stats,
        *,
        chunk: int = PREFILL_CHUNK,
        cached: CachedPrefix | None = None,
    ):
        """Allocate for `prompt` and an answer of `max_tokens`, which together must fit the context.

        `chunk`: positions per prefill pass. `cached`: taken over, unless it is lent; the caller must not use it again.
        """
        self.max_tokens = max_tokens
        self._manifest, self._graphs, self._device, self._stats = manifest, graphs, device, stats
        self._embeds, self._keys, self._chunk = prompt.inputs_embeds, list(prompt.keys), chunk
        self._probed, self._probed_means = prompt.probed, dict[tuple[int, int], Float]()
        self._prompt_length: int = prompt.inputs_embeds.shape[1]
        self._specs = {n: {t.name: t for t in (*s.inputs, *s.outputs)} for n, s in manifest.graphs.items()}
        self._capacity: int = self._prompt_length + max_tokens
        reused = 0
        rotary = manifest.rotary.of(self._prompt_length)
        self._long = manifest.rotary.is_long(self._prompt_length)
        if cached and cached.long == self._long and is_probed(self._probed):
            reused = common_length(cached.keys, self._keys[: self._probed[-1][0]])
            self._probed_means = {read: mean for read, mean in cached.probed_means.items() if read[-1] < reused}
            missing = (read[0] for read in self._probed if (read[0], read[-1]) not in self._probed_means)
            reused = min([reused, *missing])
        self._reused = stats.reused_tokens = reused
        self._length: int = reused  # positions that decoder_lower has run over
        self._pending: dict[int, OrtValue] = {}  # hidden states that decoder_upper has not run over, by first position
        if cached and reused:
            self._pending = _first_positions(cached.pending, reused, device)
            self._caches = cached.caches
            if cached.lent:  # the next reading may be a little longer
                room = min(self._capacity + PREFILL_CHUNK, manifest.dims.context_length)
                self._caches = {"decoder_lower": cached.caches["decoder_lower"].copied(room, reused)}
            for cache in self._caches.values():
                cache.reserve(self._capacity, reused, manifest.dims.context_length)
        else:
            self._caches = {half: KVCache(arrays, device) for half, arrays in self.empty_caches().items()}
        stats.kv_bytes = sum(cache.bytes for cache in self._caches.values())
        first = min([reused, *self._pending])  # that either half will run over
        self._rotary = RotaryTables(rotary, prompt.positions, self._capacity, manifest.activations, device, first=first)
        self._deepstack = Deepstack(
            manifest.deepstack, manifest.dims.hidden_size, prompt.deepstack, manifest.activations, device
        )
        self._seqlens_k = buffer(np.zeros(1, np.int32), device)
        self._total = OrtValue.ortvalue_from_numpy(np.zeros((), np.int32))  # GroupQueryAttention wants it on the CPU
        self.scores = [math.nan] * len(self._probed)  # p_unsafe by judged turn
        self._finite = True  # hidden states of the prompt, and logits of every pass
        self._lower_done = self._upper_done = False
        self._strength = 0.0
        self._passes: dict[int, DecoderPass] = {}  # by number of tokens
        self._logits: npt.NDArray[Any] = np.empty((1, 0, 0))
        self._hidden: Callable[[], Float] = lambda: np.empty((0, 0), np.float32)

    def prefill_lower(self, policy: GatePolicy) -> Verdict:
        """`lower_chunks` without a pause."""
        return finish(self.lower_chunks(policy))

    def lower_chunks(self, policy: GatePolicy) -> Generator[None, None, Verdict]:
        """Run decoder_lower over the prompt, then the prober, and apply `policy`. Pauses between two chunks.

        If the prober fails, the verdict is unsafe; nothing is raised. The verdict is also unsafe if any hidden state is
        not finite, whether the prober reads it or not: int8 caches turn NaN into a number, and later positions that
        attend to it look sound.
        """
        if self._lower_done:
            raise RuntimeError("Request.prefill_lower twice")
        self._lower_done = True
        dtype = self._specs["decoder_lower"]["inputs_embeds"].dtype
        for first in range(self._reused, self._prompt_length, self._chunk):
            if first > self._reused:
                yield
            before = time.perf_counter()
            embeds = np.ascontiguousarray(self._embeds[:, first : first + self._chunk], dtype)
            hidden = self.empty("decoder_lower", "hidden_states", embeds.shape[1])
            self.set_total(first + embeds.shape[1])
            source = buffer(embeds, self._device)
            self.half("decoder_lower", "inputs_embeds", source, "hidden_states", hidden, prefill_from=first)()
            self._finite = self._finite and bool(np.isfinite(hidden.numpy()).all())
            self._pending[first] = hidden
            self._length = first + embeds.shape[1]
            self._stats.lower_ms += ms_since(before)
        before = time.perf_counter()
        for read in filter(None, self._probed):  # under Mode.OFF, too: the conversation's next turn may need them
            if (read[0], read[-1]) not in self._probed_means:
                self._probed_means[read[0], read[-1]] = self._mean(read)
        p_unsafe = None if policy.mode is Mode.OFF else self._probe()
        verdict = decide(p_unsafe, policy, split_layer=self._manifest.split_layer)
        self._stats.gate_ms = ms_since(before)
        return verdict

    def _probe(self) -> float:
        """The worst p_unsafe of all judged turns; NaN if there is none."""
        if not self._finite:
            graph = self._manifest.prefill_graph("decoder_lower")
            log.error("%s gave hidden states that are not finite, so the prompt counts as unsafe", graph)
            return math.nan
        if not all(self._probed):
            log.error("a turn has no position for the prober, so the prompt counts as unsafe")
            return math.nan
        for turn in range(len(self._probed)):
            self.scores[turn] = probe(self._graphs["prober"], self.probed_mean(turn))
        return worst(self.scores)

    def probed_mean(self, turn: int = -1) -> Float:
        """What the prober reads of a judged turn, (1, D): the mean of HF's hidden_states[split_layer] over its probed
        positions.

        Available after `prefill_lower`. Raises IndexError if the turn has no probed position.
        """
        positions = self._probed[turn]
        if not positions:
            raise IndexError(f"a prompt of {self._prompt_length} tokens has no position for the prober")
        return self._probed_means[positions[0], positions[-1]]

    def _mean(self, probed: Sequence[int]) -> Float:
        """Mean hidden state (1, D) of positions. Sums in float64, so the chunk size changes nothing but rounding."""
        at = np.array(probed) - self._reused
        total: npt.NDArray[np.float64] = np.zeros(self._manifest.dims.hidden_size)
        chunk_of = at // self._chunk
        for chunk in sorted(set(chunk_of.tolist())):  # np.unique loads numpy.ma: 6 ms of the first answer
            within = at[chunk_of == chunk] % self._chunk
            hidden = self._pending[self._reused + chunk * self._chunk].numpy()
            total += hidden[0, within].sum(axis=0, dtype=np.float64)
        mean: Float = (total / len(probed)).astype(np.float32)[None]
        return mean

    def prefill_upper(self, strength: float) -> Float:
        """`upper_chunks` without a pause."""
        return finish(self.upper_chunks(strength))

    def upper_chunks(self, strength: float) -> Generator[None, None, Float]:
        """Run decoder_upper over the prompt; logits (V,) of the first answer token, steered by `strength`. Pauses
        between two chunks.

        At strength 0 the Refusal Head changes nothing and is skipped.
        """
        if not self._lower_done or self._upper_done:
            raise RuntimeError("Request.prefill_upper before Request.prefill_lower, or twice")
        self._upper_done = True
        finite, self._finite = self._finite, False  # until the first logits are known to be
        self._strength = strength
        single = self._passes[1] = DecoderPass(self, 1)
        self._stats.upper_ms = 0.0
        for chunk, first in enumerate(sorted(self._pending)):
            if chunk:
                yield
            before = time.perf_counter()
            hidden = self._pending[first]
            self.set_total(first + hidden.shape()[1])
            target = "last_hidden_state", single.last, single.num_logits
            self.half("decoder_upper", "hidden_states", hidden, *target, prefill_from=first)()
            del self._pending[first]  # only now: an interrupted pass is run again
            self._stats.upper_ms += ms_since(before)
        single.head()
        logits: Float = single.logits()[0]
        self._finite = finite and bool(np.isfinite(logits[0]))  # as in `verify_draft`
        return logits

    def last_hidden_state(self) -> Float:
        """Input (D,) of lm_head, or of the Refusal Head, in the latest pass of one token, or at the prompt's end."""
        last: Float = self._passes[1].last.numpy()[0, 0].astype(np.float32)
        return last

    def decode_step(self, token: int) -> Float:
        """Run the decoder on one token; logits (V,) of the next."""
        following: Float = self.verify_draft([token])[0]
        return following

    def verify_draft(self, tokens: Sequence[int]) -> Float:
        """Run the decoder on a sampled token and the draft after it (R tokens in all); logits (R, V) of what follows
        each of them.

        Row i holds only if the sampler chooses tokens[1..i]. Call `accept_draft` for each one that it does choose; the
        next pass overwrites the others.
        """
        count = len(tokens)
        self.require_room(count)
        if count not in self._passes:
            self._passes[count] = DecoderPass(self, count)
        decoder_pass = self._passes[count]
        self.set_total(self._length + count)
        decoder_pass.run(tokens)
        logits = decoder_pass.logits()
        self.ran(tokens, logits, decoder_pass.hidden)
        return logits

    def require_room(self, count: int) -> None:
        """Raise RuntimeError unless a pass over `count` tokens may come now."""
        if not self._upper_done:
            raise RuntimeError("Request.verify_draft before Request.prefill_upper")
        if self._length + count > self._capacity:
            raise RuntimeError(f"Request.verify_draft: the caches hold {self._capacity} tokens and are full")

    def ran(self, tokens: Sequence[int], logits: Float, hidden: Callable[[], Float]) -> None:
        """Note that a pass over `tokens`, this request's own or one that it shared, gave it `logits` (R, V). `hidden`
        gives what decoder_lower made of them, (R, D), until the next pass.
        """
        self._hidden = hidden
        self._finite = self._finite and bool(np.isfinite(logits[:, 0]).all())  # NaN makes all of its row NaN
        self._keys[self._length :] = tokens
        self._length += 1

    def hidden_state(self, row: int) -> Float:
        """What decoder_lower made of a token of the latest `verify_draft`: (D,), HF's hidden_states[split_layer]."""
        state: Float = self._hidden()[row].astype(np.float32)
        return state

    def accept_draft(self) -> None:
        """Keep the next drafted token of the latest `verify_draft`: the sampler chose it."""
        self._length += 1

    @property
    def length(self) -> int:
        """Positions whose keys and values are valid."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions that the prompt and the answer may take."""
        return self._capacity

    @property
    def steered_by(self) -> float | None:
        """The strength at which every token goes through the Refusal Head; None if they do not."""
        return self._strength or None

    def empty_caches(self) -> dict[str, Arrays]:
        """Empty caches for all of this request, by decoder half."""
        manifest = self._manifest
        return {
            half: empty_arrays(manifest.graphs[half], manifest.dims, manifest.kv_cache, self._capacity)
            for half in HALVES
        }

    def move(self, to: Mapping[str, Arrays]) -> None:
        """Copy the caches to arrays by decoder half, and use those from now on. On the CPU only."""
        for half, arrays in to.items():
            self._caches[half].copy(arrays, self._length)
        self._caches = {half: KVCache(arrays, self._device) for half, arrays in to.items()}
        self._passes.clear()  # they are bound to the old ones

    def cached_prefix(self) -> CachedPrefix:
        """What the next turn of the dialogue can start from; empty if anything was not finite. Ends this request.

        True whenever it is called: Ctrl-C ends a method between any two of its lines. So `_length` grows last.
        """
        length = self._length if self._finite else 0
        pending = {first: hidden for first, hidden in self._pending.items() if first < length}
        return CachedPrefix(self._keys[:length], self._probed_means, self._caches, pending, self._long)

    def lend_prefix(self) -> CachedPrefix:
        """What a reading of the same dialogue (judge.py) can start from: a request that never runs decoder_upper. It
        copies what it needs of this one's caches. Empty if anything was not finite.
        """
        length = min(self._length, self._prompt_length) if self._finite else 0
        return CachedPrefix(self._keys[:length], dict(self._probed_means), self._caches, {}, self._long, lent=True)

    def head(self, last: OrtValue, logits: OrtValue, count: int) -> Call:
        """last_hidden_state (1, R, D) -> logits (1, R, V), through the Refusal Head if this answer is steered."""
        if not self._strength:
            return self._graphs["lm_head"].bind({"last_hidden_state": last}, {"logits": logits})
        steered = self.empty("refusal_head", "steered_hidden_state", count)
        return steered_head(self._graphs, last, self._strength, steered, logits, self._device)

    def half(
        self,
        half: str,
        source: str,
        hidden_in: OrtValue,
        target: str,
        hidden_out: OrtValue,
        num_logits: OrtValue | None = None,
        *,
        prefill_from: int | None = None,
    ) -> Call:
        """A decoder half bound to its caches. `prefill_from`: for the prompt's positions from there on, by its prefill
        graph, if the package has one.
        """
        cache, name = self._caches[half], half if prefill_from is None else self._manifest.prefill_graph(half)
        more = {"seqlens_k": self._seqlens_k, "total_sequence_length": self._total, **self._rotary.inputs}
        if num_logits is not None:
            more["num_logits"] = num_logits
        first = self._prompt_length if prefill_from is None else prefill_from  # no picture stands in an answer
        layers = range(*self._manifest.graphs[half].layers or ())
        more |= self._deepstack.inputs(layers, first, hidden_in.shape()[1])
        inputs, outputs = {source: hidden_in, **more, **cache.past}, {target: hidden_out, **cache.present}
        if half == "decoder_lower" and self._manifest.reads_in_packs:
            rows, total = hidden_in.shape()[1], self._total  # not self: a cycle would keep the caches in memory
            return self._graphs[name].bind(inputs, outputs, lambda: unmasked(rows, int(total.numpy())))
        return self._graphs[name].bind(inputs, outputs)

    def empty(self, graph: str, output: str, count: int) -> OrtValue:
        """A buffer for an output (1, count, D or V)."""
        spec = self._specs[graph][output]
        width = spec.shape[-1]
        assert isinstance(width, int)
        return empty(spec, (1, count, width), self._device)

    def logits(self, count: int) -> OrtValue:
        """A buffer for logits (1, count, V). On the CPU all passes share one: logits of a draft take megabytes."""
        if count > self._logits.shape[1]:
            shape = (1, max(count, 1 + MAX_DRAFT), self._manifest.dims.vocab_size)
            self._logits = np.empty(shape, self._specs["lm_head"]["logits"].dtype)  # untouched pages cost no memory
        return buffer(self._logits[:, :count], self._device)

    def tokens(self, count: int) -> tuple[OrtValue, Call, OrtValue]:
        """A buffer for token ids (1, count), embed_tokens bound to it, and its output (1, count, D)."""
        token_ids = buffer(np.zeros((1, count), np.int64), self._device)
        embeds = self.empty("embed_tokens", "inputs_embeds", count)
        return token_ids, self._graphs["embed_tokens"].bind({"input_ids": token_ids}, {"inputs_embeds": embeds}), embeds

    def set_total(self, total: int) -> None:
        """Set how many positions the caches hold once the next graph has run."""
        self._rotary.extend(total)
        self._seqlens_k.update_inplace(np.array([total - 1], np.int32))
        self._total.update_inplace(np.array(total, np.int32))


class DecoderPass:
    """The whole decoder on R tokens, with every buffer bound once."""

    def __init__(self, request: Request, count: int):
        self._token_ids, self._embed, embeds = request.tokens(count)
        self.num_logits = OrtValue.ortvalue_from_numpy(np.array([count], np.int64))  # a slice's bound: on the CPU
        self.last = request.empty("decoder_upper", "last_hidden_state", count)
        self._logits = request.logits(count)
        self._hidden = hidden = request.empty("decoder_lower", "hidden_states", count)
        self._lower = request.half("decoder_lower", "inputs_embeds", embeds, "hidden_states", hidden)
        self._upper = request.half(
            "decoder_upper", "hidden_states", hidden, "last_hidden_state", self.last, self.num_logits
        )
        self.head = request.head(self.last, self._logits, count)

    def run(self, tokens: Sequence[int]) -> None:
        """Run embed_tokens, both halves and the head on R tokens."""
        self._token_ids.update_inplace(np.array([tokens], np.int64))
        self._embed()
        self._lower()
        self._upper()
        self.head()

    def hidden(self) -> Float:
        """decoder_lower's output, (R, D). Valid until the next pass."""
        hidden: Float = self._hidden.numpy()[0]
        return hidden

    def logits(self) -> Float:
        """The head's output, (R, V). Valid until the next pass."""
        logits: Any = self._logits.numpy()[0]
        return logits  # type: ignore[no-any-return]


def unmasked(rows: int, total: int) -> dict[str, OrtValue]:
    """decoder_lower's attention bias of a pass over `rows` positions, up to `total`, which hides nothing."""
    return {ATTENTION_BIAS: OrtValue.ortvalue_from_numpy(np.zeros((1, 1, rows, total), np.float32))}


def steered_head(
    graphs: Mapping[str, Subgraph], last: OrtValue, strength: float, steered: OrtValue, logits: OrtValue, device: Device
) -> Call:
    """refusal_head and lm_head on fixed buffers: last (1, R, D) -> steered (1, R, D) -> logits (1, R, V)."""
    steer = graphs["refusal_head"].bind(
        {"last_hidden_state": last, "strength": buffer(np.array([strength], np.float32), device)},
        {"steered_hidden_state": steered},
    )
    project = graphs["lm_head"].bind({"last_hidden_state": steered}, {"logits": logits})

    def run() -> None:
        steer()
        project()

    return run


def probe(prober: Subgraph, mean: Float, failure: str = "the prober failed, so the prompt counts as unsafe") -> float:
    """p_unsafe that the prober, or a monitor, gives a mean hidden state (1, D); NaN if it fails. `failure`: what is
    logged then.
    """
    try:
        p_unsafe: float = prober.run({"hidden_states": mean})["p_unsafe"].item()
    except CancelledError:
        raise
    except Exception as err:  # whatever went wrong, what it reads was not shown to be safe
        log.error("%s: %s", failure, err)
        log.debug("where it failed", exc_info=True)
        return math.nan
    return p_unsafe


def common_length(a: Sequence[Key], b: Sequence[Key]) -> int:
    """Length of the longest common prefix."""
    differing = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _first_positions(values: Mapping[int, OrtValue], count: int, device: Device) -> dict[int, OrtValue]:
    """What chunks (1, n, D), by their first position, have of the first `count` positions of a prompt."""
    kept = {first: value for first, value in values.items() if first < count}
    for first, value in kept.items():
        if first + value.shape()[1] > count:
            kept[first] = buffer(value.numpy()[:, : count - first].copy(), device)  # a view would outlive its memory
    return kept

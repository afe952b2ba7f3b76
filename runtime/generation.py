"""One answer in the making: its buffers, its caches, and how many rows of them are valid.

    judge    decoder_lower over the prompt, prober, decide
    begin    decoder_upper over the prompt, then the head: logits of the first answer token
    verify   embed, lower, upper, head over the last token and drafted ones, as rows of one pass; `accept` keeps them

`judge` and `begin` go through the package's prefill graphs where it has them: the same layers on the same caches, their
weights rounded otherwise.

Rows behind `length` in the caches are nobody's: going back to an earlier token is counting fewer of them. A request may
start from what an earlier one has computed of the same dialogue (`Computed`): rows whose tokens and pictures are the
same, up to the first row of the last turn that the prober reads, which every prompt computes anew, and what the prober
read of earlier turns.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .drafting import MOST
from .gate import GatePolicy, Mode, Verdict, decide, worst
from .kv_cache import KVCache
from .manifest import Manifest
from .subgraph import Call, Device, OrtValue, Subgraph, buffer, empty

log = logging.getLogger(__name__)

Float = npt.NDArray[np.float32]
PREFILL_CHUNK = 128  # tokens: bounds activations; larger ones are not faster; results do not depend on it
Key: TypeAlias = "int | tuple[bytes, int]"  # what a row stands for: a token, or a picture's digest and a row of it


@dataclass
class Stats:
    """What an answer cost. Milliseconds are wall time; `upper_ms` is None where decoder_upper never ran."""

    device: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt's: already in the caches of the conversation
    completion_tokens: int = 0
    drafted_tokens: int = 0  # fed before they were sampled
    accepted_tokens: int = 0  # of those: sampled, too
    image_tiles: int = 0  # encoded for this answer
    kv_bytes: int = 0
    vision_ms: float = 0.0
    embed_ms: float = 0.0
    lower_ms: float = 0.0
    gate_ms: float = 0.0
    upper_ms: float | None = None
    ttft_ms: float = 0.0  # from the call to the first chunk
    decode_ms: float = 0.0  # passes after the first token

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens per second after the first one; None for answers of one token."""
        steps = self.completion_tokens - 1
        return 1000 * steps / self.decode_ms if steps > 0 and self.decode_ms > 0 else None


@dataclass(frozen=True)
class Prompt:
    """A dialogue ready for the decoder."""

    inputs_embeds: Float  # (1, S, D)
    token_ids: list[int]  # text tokens only: what the repetition penalty looks at
    keys: list[Key]  # S of them: equal keys behind equal keys are equal rows
    probed: list[list[int]]  # by turn of the user's: rows whose mean the prober reads, in order; none where too short


@dataclass(frozen=True)
class Computed:
    """What a request leaves behind for the next turn of its dialogue."""

    keys: list[Key]  # of the rows that decoder_lower has seen
    means: dict[tuple[int, int], Float]  # what the prober read of a turn (1, D), by the first and last row it read
    caches: dict[str, KVCache]  # by decoder half
    unseen: list[OrtValue]  # the last rows of decoder_lower's output, those that decoder_upper never saw: after a STOP


class Request:
    """One answer in the making. One thread at a time."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: Mapping[str, Subgraph],
        device: Device,
        prompt: Prompt,
        max_tokens: int,
        stats: Stats,
        *,
        chunk: int = PREFILL_CHUNK,
        computed: Computed | None = None,
    ):
        """Buffers for `prompt` and an answer of `max_tokens`, which together fit the context; `computed` is used up."""
        self.max_tokens = max_tokens
        self._manifest, self._graphs, self._device, self._stats = manifest, graphs, device, stats
        self._embeds, self._keys, self._chunk = prompt.inputs_embeds, list(prompt.keys), chunk
        self._probed, self._means = prompt.probed, dict[tuple[int, int], Float]()
        self._prompt_length: int = prompt.inputs_embeds.shape[1]
        self._specs = {n: {t.name: t for t in (*s.inputs, *s.outputs)} for n, s in manifest.graphs.items()}
        self._capacity = self._prompt_length + max_tokens
        reused = 0
        if computed and self._probed and all(self._probed):
            reused = _common(computed.keys, self._keys[: self._probed[-1][0]])
            self._means = {read: mean for read, mean in computed.means.items() if read[-1] < reused}
            reused = min([reused, *(rows[0] for rows in self._probed if (rows[0], rows[-1]) not in self._means)])
        self._length = self._reused = stats.reused_tokens = reused  # rows that decoder_lower has seen
        self._unseen: list[OrtValue] = []  # decoder_lower's output that decoder_upper has not seen, chunk by chunk
        if computed and reused:
            unseen = sum(value.shape()[1] for value in computed.unseen)
            self._unseen = _first_rows(computed.unseen, reused - (len(computed.keys) - unseen), device)
            self._caches = computed.caches
            for cache in self._caches.values():
                cache.reserve(self._capacity, reused, manifest.dims.context_length)
        else:
            self._caches = {
                half: KVCache(manifest.graphs[half], manifest.dims, manifest.kv_cache, self._capacity, device)
                for half in ("decoder_lower", "decoder_upper")
            }
        self._older = len(self._unseen)  # chunks that an earlier request left; the prober reads none of them
        stats.kv_bytes = sum(cache.bytes for cache in self._caches.values())
        self._seqlens_k = buffer(np.zeros(1, np.int32), device)
        self._total = OrtValue.ortvalue_from_numpy(np.zeros((), np.int32))  # GroupQueryAttention wants it on the CPU
        self._finite = True  # what decoder_lower has made of the prompt, and what the passes behind it gave
        self._judged = self._begun = False
        self._strength = 0.0
        self._steered = False
        self._passes: dict[int, Pass] = {}  # by rows
        self._logits: npt.NDArray[Any] = np.empty((1, 0, 0))

    def judge(self, policy: GatePolicy) -> Verdict:
        """Run decoder_lower over the prompt and decide. A prober that fails is an unsafe verdict, not an exception.

        So is a row that is not finite, whether the prober reads it or not: int8 caches make a number of NaN, and what
        later rows gather from it looks sound.
        """
        if self._judged:
            raise RuntimeError("Request.judge twice")
        self._judged = True
        before = time.perf_counter()
        dtype = self._specs["decoder_lower"]["inputs_embeds"].dtype
        for first in range(self._reused, self._prompt_length, self._chunk):
            rows = np.ascontiguousarray(self._embeds[:, first : first + self._chunk], dtype)
            hidden = self.empty("decoder_lower", "hidden_states", rows.shape[1])
            self.set_total(first + rows.shape[1])
            source = buffer(rows, self._device)
            self.half("decoder_lower", "inputs_embeds", source, "hidden_states", hidden, reading=True)()
            self._unseen.append(hidden)
            self._length = first + rows.shape[1]
            self._finite = self._finite and bool(np.isfinite(hidden.numpy()).all())
        self._stats.lower_ms = _ms_since(before)
        before = time.perf_counter()
        for read in filter(None, self._probed):  # also where nobody asks for a score: the next turn may want one
            if (read[0], read[-1]) not in self._means:
                self._means[read[0], read[-1]] = self._mean(read)
        p_unsafe = None if policy.mode is Mode.OFF else self._probe()
        verdict = decide(p_unsafe, policy, split_layer=self._manifest.split_layer)
        self._stats.gate_ms = _ms_since(before)
        return verdict

    def _probe(self) -> float:
        if not self._finite:
            reader = self._manifest.reader("decoder_lower")
            log.error("%s gave rows that are not finite, so the prompt counts as unsafe", reader)
            return math.nan
        try:
            means = [self.probed_row(turn) for turn in range(len(self._probed))]
            return worst(self._graphs["prober"].run({"hidden_states": mean})[0].item() for mean in means)
        except Exception as err:  # whatever went wrong, the prompt was not shown to be safe
            log.error("the prober failed, so the prompt counts as unsafe: %s", err)
            log.debug("where it failed", exc_info=True)
            return math.nan

    def probed_row(self, turn: int = -1) -> Float:
        """What the prober reads of a turn, (1, D): HF's hidden_states[split_layer], the mean over its `probed` rows.

        Available after `judge`.
        """
        rows = self._probed[turn]
        if not rows:
            raise IndexError(f"a prompt of {self._prompt_length} tokens has no row for the prober")
        return self._means[rows[0], rows[-1]]

    def _mean(self, probed: Sequence[int]) -> Float:
        """Sums are float64: the size of the chunks changes nothing but rounding."""
        at = np.array(probed) - self._reused
        total: npt.NDArray[np.float64] = np.zeros(self._manifest.dims.hidden_size)
        chunk_of = at // self._chunk
        for chunk in sorted(set(chunk_of.tolist())):  # np.unique loads numpy.ma: 6 ms of the first answer
            rows = at[chunk_of == chunk] % self._chunk
            total += self._unseen[self._older + chunk].numpy()[0, rows].sum(axis=0, dtype=np.float64)
        mean: Float = (total / len(probed)).astype(np.float32)[None]
        return mean

    def begin(self, strength: float, *, through_head: bool = False) -> Float:
        """Run decoder_upper over the prompt; logits (V,) of the first answer token, steered by `strength`.

        At strength 0 the Refusal Head changes nothing and is left out, unless `through_head` (which is how that is
        tested).
        """
        if not self._judged or self._begun:
            raise RuntimeError("Request.begin before Request.judge, or twice")
        self._begun = True
        self._strength, self._steered = strength, bool(strength) or through_head
        before = time.perf_counter()
        single = self._passes[1] = Pass(self, 1)
        done = self._prompt_length - sum(value.shape()[1] for value in self._unseen)
        while self._unseen:
            hidden = self._unseen[0]
            done += hidden.shape()[1]
            self.set_total(done)
            target = "last_hidden_state", single.last, single.num_logits
            self.half("decoder_upper", "hidden_states", hidden, *target, reading=True)()
            del self._unseen[0]
        self._stats.upper_ms = _ms_since(before)
        single.head()
        first: Float = single.logits()[0]
        self._finite = self._finite and bool(np.isfinite(first[0]))  # as in `verify`
        return first

    def last_hidden_state(self) -> Float:
        """What lm_head, or the Refusal Head, read last in a pass of one token, (D,). After `begin`: the prompt's."""
        last: Float = self._passes[1].last.numpy()[0, 0].astype(np.float32)
        return last

    def step(self, token: int) -> Float:
        """Feed one token; logits (V,) of the next."""
        following: Float = self.verify([token])[0]
        return following

    def verify(self, tokens: Sequence[int]) -> Float:
        """Feed a token that was sampled and drafts (R in all): logits (R, V) of what follows each of them.

        Row i holds if tokens[1..i] come true: say so by `accept(i)`, or by feeding others over them.
        """
        if not self._begun:
            raise RuntimeError("Request.verify before Request.begin")
        if self._length + len(tokens) > self._capacity:
            raise RuntimeError(f"Request.verify: the caches hold {self._capacity} tokens and are full")
        rows = len(tokens)
        if rows not in self._passes:
            self._passes[rows] = Pass(self, rows)
        one_pass = self._passes[rows]
        self.set_total(self._length + rows)
        one_pass.run(tokens)
        self._keys[self._length :] = tokens
        self._length += 1
        logits = one_pass.logits()
        self._finite = self._finite and bool(np.isfinite(logits[:, 0]).all())  # a row of NaN has no other logits
        return logits

    def accept(self) -> None:
        """The next token of those that `verify` was given came true."""
        self._length += 1

    def computed(self) -> Computed:
        """What the next turn of the dialogue can start from: nothing if rows are not finite. This request is over."""
        return Computed(self._keys[: self._length if self._finite else 0], self._means, self._caches, self._unseen)

    def head(self, last: OrtValue, logits: OrtValue, rows: int) -> Call:
        """last_hidden_state (1, R, D) -> logits (1, R, V), through the Refusal Head if this answer is steered."""
        if not self._steered:
            return self._graphs["lm_head"].bind({"last_hidden_state": last}, {"logits": logits})
        steered = self.empty("refusal_head", "steered_hidden_state", rows)
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
        reading: bool = False,
    ) -> Call:
        """A decoder half on its caches; `reading`: a prompt."""
        cache = self._caches[half]
        more = {"seqlens_k": self._seqlens_k, "total_sequence_length": self._total}
        if num_logits is not None:
            more["num_logits"] = num_logits
        graph = self._graphs[self._manifest.reader(half) if reading else half]
        return graph.bind({source: hidden_in, **more, **cache.past}, {target: hidden_out, **cache.present})

    def empty(self, graph: str, output: str, rows: int) -> OrtValue:
        """A buffer for an output (1, rows, D or V)."""
        spec = self._specs[graph][output]
        width = spec.shape[-1]
        assert isinstance(width, int)
        return empty(spec, (1, rows, width), self._device)

    def logits(self, rows: int) -> OrtValue:
        """A buffer for logits (1, rows, V). On the CPU all passes have the same one: a draft's rows are megabytes."""
        if rows > self._logits.shape[1]:
            shape = (1, max(rows, 1 + MOST), self._manifest.dims.vocab_size)
            self._logits = np.empty(shape, self._specs["lm_head"]["logits"].dtype)  # costs what is written to it
        return buffer(self._logits[:, :rows], self._device)

    def tokens(self, rows: int) -> tuple[OrtValue, Call, OrtValue]:
        """A buffer for token ids (1, rows), embed_tokens on it, and what comes out (1, rows, D)."""
        token_ids = buffer(np.zeros((1, rows), np.int64), self._device)
        embeds = self.empty("embed_tokens", "inputs_embeds", rows)
        return token_ids, self._graphs["embed_tokens"].bind({"input_ids": token_ids}, {"inputs_embeds": embeds}), embeds

    def set_total(self, total: int) -> None:
        """How many rows the caches hold once the next graph has run."""
        self._seqlens_k.update_inplace(np.array([total - 1], np.int32))
        self._total.update_inplace(np.array(total, np.int32))


class Pass:
    """The whole decoder on R tokens, every buffer bound once."""

    def __init__(self, request: Request, rows: int):
        self._token_ids, self._embed, embeds = request.tokens(rows)
        self.num_logits = OrtValue.ortvalue_from_numpy(np.array([rows], np.int64))  # a slice's bound: on the CPU
        self.last = request.empty("decoder_upper", "last_hidden_state", rows)
        self._logits = request.logits(rows)
        hidden = request.empty("decoder_lower", "hidden_states", rows)
        self._lower = request.half("decoder_lower", "inputs_embeds", embeds, "hidden_states", hidden)
        self._upper = request.half(
            "decoder_upper", "hidden_states", hidden, "last_hidden_state", self.last, self.num_logits
        )
        self.head = request.head(self.last, self._logits, rows)

    def run(self, tokens: Sequence[int]) -> None:
        """Feed R tokens."""
        self._token_ids.update_inplace(np.array([tokens], np.int64))
        self._embed()
        self._lower()
        self._upper()
        self.head()

    def logits(self) -> Float:
        """What the head gave, (R, V)."""
        logits: Any = self._logits.numpy()[0]
        return logits  # type: ignore[no-any-return]


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


def _common(a: Sequence[Key], b: Sequence[Key]) -> int:
    """Length of the longest beginning that both have."""
    differing = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _first_rows(values: Sequence[OrtValue], count: int, device: Any) -> list[OrtValue]:
    """The first `count` rows of chunks (1, n, D); none where `count` is not above zero."""
    out = []
    for value in values:
        rows = value.shape()[1]
        if 0 < count < rows:
            out.append(buffer(np.ascontiguousarray(value.numpy()[:, :count]), device))
        elif count >= rows:
            out.append(value)
        count -= rows
    return out


def _ms_since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)

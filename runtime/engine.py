"""Load a package and answer prompts: THE loop, with the gate inside it.

    images -> vision_encoder -> rows ---+     or, where images are tokens: image_tokenizer -> ids -> embed_tokens
    text   -> token ids -> embed_tokens +-> decoder_lower -> prober -> decide
                                                                 STOP:  the refusal text, and nothing more runs
                                                                 STEER: strength > 0     PASS: strength = 0
           -> decoder_upper -> (refusal_head) -> lm_head -> sample -> text
                 ^                                             |
                 +---- decoder_lower <- embed_tokens <---------+

Prefill is layer-major: decoder_lower sees the whole prompt, the prober reads one row of what comes out, and only then
does decoder_upper run. The gate changes the head and never the KV caches, so this is the same computation as layer by
layer; and a stopped prompt costs k/N of prefill and no decoding.

All state belongs to a request. One Engine may serve several threads.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import image as images_
from .errors import InputError, PackageError, ProviderError
from .gate import Action, GatePolicy, Mode, Verdict, decide
from .image import ImageLike
from .kv_cache import KVCache
from .manifest import Manifest
from .sampling import SamplingConfig, make_sampler
from .subgraph import Call, Device, DeviceName, OrtValue, Subgraph, buffer, empty, find_device
from .text import IMAGE, Detokeniser, Message, load_tokenizer, render

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "refused"]
Float = npt.NDArray[np.float32]
PREFILL_CHUNK = 512  # tokens: bounds activations; results do not depend on it
TILES_PER_RUN = 4  # bounds the image graph's activations


@dataclass
class Stats:
    """What an answer cost. Milliseconds are wall time; `upper_ms` is None where decoder_upper never ran."""

    device: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tiles: int = 0
    kv_bytes: int = 0
    vision_ms: float = 0.0
    embed_ms: float = 0.0
    lower_ms: float = 0.0
    gate_ms: float = 0.0
    upper_ms: float | None = None
    ttft_ms: float = 0.0  # from the call to the first chunk
    decode_ms: float = 0.0  # steps after the first token

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens per second after the first one; None for answers of one token."""
        steps = self.completion_tokens - 1
        return 1000 * steps / self.decode_ms if steps > 0 and self.decode_ms > 0 else None


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. `text` may be empty while a character is incomplete."""

    text: str
    token: int | None  # None for the refusal text of --policy stop, which no model wrote
    verdict: Verdict
    finish_reason: FinishReason | None = None  # set on the last chunk
    stats: Stats | None = None  # set on the last chunk


@dataclass(frozen=True)
class Answer:
    """A whole answer, as `generate` returns it."""

    text: str
    token_ids: tuple[int, ...]  # the end-of-turn token included where the model wrote one
    verdict: Verdict
    finish_reason: FinishReason
    stats: Stats


@dataclass(frozen=True)
class Prompt:
    """A dialogue ready for the decoder."""

    inputs_embeds: Float  # (1, S, D)
    token_ids: list[int]  # text tokens only: what the repetition penalty looks at


class Engine:
    """A loaded package."""

    def __init__(self, folder: Path, manifest: Manifest, device: Device, *, load: Callable[..., Subgraph] = Subgraph):
        """Load every graph of a verified package on `device`. Use Engine.load; `load` is for the export's validation,
        which runs graphs that are larger than its memory.
        """
        self.manifest = manifest
        self.device = device
        self.tokenizer = load_tokenizer(folder / manifest.prompt.tokenizer)
        self.graphs = {n: load(folder / s.file, s, device) for n, s in manifest.graphs.items()}
        if manifest.guarded:
            self._check_refusal_head()

    def _check_refusal_head(self) -> None:
        """Raise PackageError where the Refusal Head would only scale the hidden state: it was never trained.

        A steer matrix that is zero or the identity leaves every token as likely as it was.
        """
        probe = np.linspace(-1.0, 1.0, self.manifest.dims.hidden_size, dtype=np.float32)[None, None]
        inputs = {"last_hidden_state": probe, "strength": np.ones(1, np.float32)}
        (steered,) = self.graphs["refusal_head"].run(inputs)
        along = float(np.vdot(steered, probe) / np.vdot(probe, probe))
        across = float(np.linalg.norm(steered - along * probe) / np.linalg.norm(probe))
        if not 1e-3 < across < np.inf:
            raise PackageError("refusal_head: its steer matrix only scales its input; it was never trained")

    @classmethod
    def load(cls, folder: str | Path, *, device: DeviceName = "auto", threads: int | None = None) -> Engine:
        """Check every file of `folder` against the manifest's hashes and load it.

        Raises PackageError (damaged, incomplete, other version) or ProviderError (device not available).
        "auto" takes CUDA where it works and says in a log line why it does not.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        manifest.verify(folder)
        chosen, reason = find_device(device, threads)
        if reason:
            log.info("running on the CPU: %s", reason)
        try:
            return cls(folder, manifest, chosen)
        except ProviderError as err:
            if device != "auto":
                raise
            log.warning("running on the CPU: %s", err)
            return cls(folder, manifest, find_device("cpu", threads)[0])

    def policy(
        self, mode: Mode | str = Mode.STEER, *, threshold: float | None = None, strength: float | None = None
    ) -> GatePolicy:
        """The package's own policy, with what you override. Raises PackageError where it has no gate and `mode` needs
        one.
        """
        mode, prober, refusal = Mode(mode), self.manifest.prober, self.manifest.refusal
        if prober is None or refusal is None:
            if mode is not Mode.OFF:
                raise PackageError(
                    "this package was exported with --unguarded: it has no prober and no refusal head; "
                    "run it with --policy off, or export it again with --safety"
                )
            return GatePolicy(mode, threshold=0.0, strength=0.0, refusal_text="")
        return GatePolicy(
            mode,
            threshold=prober.threshold if threshold is None else threshold,
            strength=refusal.strength if strength is None else strength,
            refusal_text=refusal.text,
        )

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageLike] = (),
        sampling: SamplingConfig | None = None,
        policy: GatePolicy | None = None,
    ) -> Answer:
        """The whole answer at once; see `stream`."""
        chunks = list(self.stream(prompt, images=images, sampling=sampling, policy=policy))
        last = chunks[-1]
        assert last.finish_reason is not None and last.stats is not None
        return Answer(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(chunk.token for chunk in chunks if chunk.token is not None),
            verdict=last.verdict,
            finish_reason=last.finish_reason,
            stats=last.stats,
        )

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageLike] = (),
        sampling: SamplingConfig | None = None,
        policy: GatePolicy | None = None,
    ) -> Iterator[Chunk]:
        """Answer a prompt (with its images) or a dialogue, piece by piece; every piece carries the verdict.

        `sampling` is greedy and `policy` the package's own unless given. Nothing runs before the first `next()`.
        Raises InputError where the prompt or an image is unusable or does not fit the context.
        """
        start = time.perf_counter()
        stats = Stats(device=self.device.provider)
        messages = [Message.user(prompt, images)] if isinstance(prompt, str) else list(prompt)
        if images and not isinstance(prompt, str):
            raise InputError("images go into the messages of a dialogue, not beside it")
        policy = policy or self.policy()
        yield from self.answer(self.prepare(messages, stats), sampling or SamplingConfig(), policy, stats, start)

    def answer(
        self, prompt: Prompt, sampling: SamplingConfig, policy: GatePolicy, stats: Stats, start: float
    ) -> Iterator[Chunk]:
        """Answer a prepared prompt; see `stream`. `start` is the time.perf_counter() that times count from."""
        request = self.request(prompt, sampling.max_tokens, stats)
        verdict = request.judge(policy)
        if verdict.action is Action.STOP:
            stats.ttft_ms = _ms_since(start)
            yield Chunk(policy.refusal_text, None, verdict, "refused", stats)
            return

        sample = make_sampler(sampling)
        detokeniser = Detokeniser(self.tokenizer, sampling.stop)
        tokens = list(prompt.token_ids)
        logits = request.begin(verdict.strength)
        while True:
            token = sample(logits, tokens)
            tokens.append(token)
            stats.completion_tokens += 1
            stats.ttft_ms = stats.ttft_ms or _ms_since(start)
            ended = token in self.manifest.prompt.end_token_ids
            text = "" if ended else detokeniser.push(token)
            reason: FinishReason | None = "stop" if ended or detokeniser.stopped else None
            if reason is None and stats.completion_tokens == request.max_tokens:
                reason = "length"
            if reason is not None:
                yield Chunk(text + detokeniser.flush(), token, verdict, reason, stats)
                return
            yield Chunk(text, token, verdict)
            before = time.perf_counter()
            logits = request.step(token)
            stats.decode_ms += _ms_since(before)

    def prepare(self, messages: Sequence[Message], stats: Stats) -> Prompt:
        """Render a dialogue, encode its images, and lay both out as the decoder's input rows."""
        pictures = [images_.open_image(picture) for message in messages for picture in message.images]
        spec = self.manifest.image
        if pictures and spec is None:
            raise InputError("this model takes no images")
        runs = render(messages, self.manifest.prompt, self.tokenizer)
        encoded = iter([self.encode_image(p, alone=len(pictures) == 1, stats=stats) for p in pictures])
        before = time.perf_counter()
        rows = [next(encoded) if run is IMAGE else self.embed(run) for run in runs]  # type: ignore[arg-type]
        embeds = np.concatenate(rows)[None]
        stats.embed_ms = _ms_since(before)
        stats.prompt_tokens = embeds.shape[1]
        return Prompt(embeds, [token for run in runs if isinstance(run, list) for token in run])

    def encode_image(self, picture: images_.Uint8, *, alone: bool, stats: Stats) -> Float:
        """One image (H, W, 3) uint8 -> its rows among the tokens (n, D)."""
        spec = self.manifest.image
        assert spec is not None
        before = time.perf_counter()
        pixel_values = images_.prepare(picture, spec, alone=alone)
        if "image_tokenizer" in self.graphs:
            rows = self.embed(self.tokenize_image(pixel_values))
        else:
            outputs = self._encode_tiles("vision_encoder", pixel_values)
            features, newline = np.concatenate([out[0] for out in outputs]), outputs[0][1]
            rows = images_.pack(features, newline, (picture.shape[0], picture.shape[1]), spec)
        stats.image_tiles += len(pixel_values)
        stats.vision_ms += _ms_since(before)
        return rows

    def tokenize_image(self, pixel_values: Float) -> list[int]:
        """pixel_values (tiles, 3, size, size) of one image -> its token ids, in order."""
        ids = np.concatenate([out[0] for out in self._encode_tiles("image_tokenizer", pixel_values)])
        return [int(i) for i in ids.ravel()]

    def _encode_tiles(self, graph: str, pixel_values: Float) -> list[list[npt.NDArray[Any]]]:
        """Outputs of an image graph, a few tiles at a time."""
        batches = [pixel_values[i : i + TILES_PER_RUN] for i in range(0, len(pixel_values), TILES_PER_RUN)]
        return [self.graphs[graph].run({"pixel_values": batch}) for batch in batches]

    def embed(self, token_ids: list[int]) -> Float:
        """Token ids (n,) -> their rows (n, D)."""
        rows: Float = self.graphs["embed_tokens"].run({"input_ids": np.array([token_ids], np.int64)})[0][0]
        return rows

    def request(self, prompt: Prompt, max_tokens: int, stats: Stats, *, chunk: int = PREFILL_CHUNK) -> Request:
        """The state of one answer: buffers and caches. Raises InputError where the prompt does not fit."""
        length, context = prompt.inputs_embeds.shape[1], self.manifest.dims.context_length
        if length >= context:
            raise InputError(f"the prompt takes {length} tokens (images included); the model's context holds {context}")
        return Request(self, prompt.inputs_embeds, min(max_tokens, context - length), stats, chunk)


class Request:
    """One answer in the making: `judge` runs the lower half and the gate, `begin` the upper half, `step` one token."""

    def __init__(self, engine: Engine, inputs_embeds: Float, max_tokens: int, stats: Stats, chunk: int):
        manifest, device = engine.manifest, engine.device
        self.max_tokens = max_tokens
        self._engine, self._graphs, self._device, self._stats = engine, engine.graphs, device, stats
        self._embeds, self._chunk = inputs_embeds, chunk
        self._length = inputs_embeds.shape[1]
        self._specs = {n: {t.name: t for t in (*s.inputs, *s.outputs)} for n, s in manifest.graphs.items()}
        self._capacity = capacity = self._length + max_tokens
        self._caches = {
            half: KVCache(manifest.graphs[half], manifest.dims, manifest.kv_cache, capacity, device)
            for half in ("decoder_lower", "decoder_upper")
        }
        stats.kv_bytes = sum(cache.bytes for cache in self._caches.values())
        self._seqlens_k = buffer(np.zeros(1, np.int32), device)
        self._total = OrtValue.ortvalue_from_numpy(np.zeros((), np.int32))  # GroupQueryAttention wants it on the CPU
        self._num_logits = OrtValue.ortvalue_from_numpy(np.ones(1, np.int64))  # a slice's bound: on the CPU, too
        self._hidden: list[OrtValue] = []  # decoder_lower's output, chunk by chunk
        self._last = self._empty("decoder_upper", "last_hidden_state", 1)
        self._logits = empty(self._specs["lm_head"]["logits"], (1, 1, manifest.dims.vocab_size), device)
        self._step: Callable[[], None] | None = None  # `begin` makes it

    def judge(self, policy: GatePolicy) -> Verdict:
        """Run decoder_lower over the prompt and decide. A prober that fails is an unsafe verdict, not an exception."""
        if self._hidden or self._step:
            raise RuntimeError("Request.judge twice")
        before = time.perf_counter()
        for first in range(0, self._length, self._chunk):
            rows = np.ascontiguousarray(self._embeds[:, first : first + self._chunk])
            hidden = self._empty("decoder_lower", "hidden_states", rows.shape[1])
            self._set_length(first + rows.shape[1])
            self._half("decoder_lower", "inputs_embeds", buffer(rows, self._device), "hidden_states", hidden)()
            self._hidden.append(hidden)
        self._stats.lower_ms = _ms_since(before)
        before = time.perf_counter()
        p_unsafe = None if policy.mode is Mode.OFF else self._probe()
        verdict = decide(p_unsafe, policy, split_layer=self._engine.manifest.split_layer)
        self._stats.gate_ms = _ms_since(before)
        return verdict

    def _probe(self) -> float:
        try:
            return float(self._engine.graphs["prober"].run({"hidden_states": self.probed_row()})[0][0])
        except Exception as err:  # whatever went wrong, the prompt was not shown to be safe
            log.error("the prober failed, so the prompt counts as unsafe: %s", err)
            log.debug("where it failed", exc_info=True)
            return math.nan

    def probed_row(self) -> Float:
        """The hidden state that the prober reads, (1, D): HF's hidden_states[split_layer] at the manifest's offset.

        Without a prober it is the last row's. Available between `judge` and `begin`.
        """
        prober = self._engine.manifest.prober
        index = self._length + (prober.token_offset if prober else -1)
        if index < 0:
            raise IndexError(f"the prober reads {-index} tokens before a prompt of {self._length}")
        chunk, row = divmod(index, self._chunk)
        hidden: Float = self._hidden[chunk].numpy()[:, row]
        return hidden

    def begin(self, strength: float, *, through_head: bool = False) -> Float:
        """Run decoder_upper over the prompt; logits (V,) of the first answer token, steered by `strength`.

        At strength 0 the Refusal Head changes nothing and is left out, unless `through_head` (which is how that is
        tested).
        """
        if not self._hidden:
            raise RuntimeError("Request.begin before Request.judge, or twice")
        before = time.perf_counter()
        done = 0
        for hidden in self._hidden:
            done += hidden.shape()[1]
            self._set_length(done)
            self._half("decoder_upper", "hidden_states", hidden, "last_hidden_state", self._last)()
        self._hidden.clear()
        self._stats.upper_ms = _ms_since(before)
        head = self._steered_head(strength) if strength or through_head else self._plain_head()
        self._step = self._bind_step(head)
        head()
        return self._read_logits()

    def step(self, token: int) -> Float:
        """Feed one token; logits (V,) of the next."""
        if self._step is None:
            raise RuntimeError("Request.step before Request.begin")
        if self._length == self._capacity:
            raise RuntimeError(f"Request.step: the caches hold {self._capacity} tokens and are full")
        self._length += 1
        self._set_length(self._length)
        self._token.update_inplace(np.array([[token]], np.int64))
        self._step()
        return self._read_logits()

    def _bind_step(self, head: Callable[[], None]) -> Callable[[], None]:
        """One decode step with every buffer bound once."""
        self._token = buffer(np.zeros((1, 1), np.int64), self._device)
        embeds = self._empty("embed_tokens", "inputs_embeds", 1)
        hidden = self._empty("decoder_lower", "hidden_states", 1)
        embed = self._graphs["embed_tokens"].bind({"input_ids": self._token}, {"inputs_embeds": embeds})
        lower = self._half("decoder_lower", "inputs_embeds", embeds, "hidden_states", hidden)
        upper = self._half("decoder_upper", "hidden_states", hidden, "last_hidden_state", self._last)

        def run() -> None:
            embed()
            lower()
            upper()
            head()

        return run

    def _plain_head(self) -> Callable[[], None]:
        """last_hidden_state -> logits"""
        return self._graphs["lm_head"].bind({"last_hidden_state": self._last}, {"logits": self._logits})

    def _steered_head(self, strength: float) -> Callable[[], None]:
        """last_hidden_state -> logits, through the Refusal Head"""
        steered = self._empty("refusal_head", "steered_hidden_state", 1)
        epsilon = buffer(np.array([strength], np.float32), self._device)
        steer = self._graphs["refusal_head"].bind(
            {"last_hidden_state": self._last, "strength": epsilon}, {"steered_hidden_state": steered}
        )
        project = self._graphs["lm_head"].bind({"last_hidden_state": steered}, {"logits": self._logits})

        def run() -> None:
            steer()
            project()

        return run

    def _half(self, half: str, source: str, hidden_in: OrtValue, target: str, hidden_out: OrtValue) -> Call:
        cache = self._caches[half]
        more = {"seqlens_k": self._seqlens_k, "total_sequence_length": self._total}
        if half == "decoder_upper":
            more["num_logits"] = self._num_logits
        return self._graphs[half].bind({source: hidden_in, **more, **cache.past}, {target: hidden_out, **cache.present})

    def _empty(self, graph: str, output: str, rows: int) -> OrtValue:
        return empty(self._specs[graph][output], (1, rows, self._engine.manifest.dims.hidden_size), self._device)

    def _set_length(self, total: int) -> None:
        self._seqlens_k.update_inplace(np.array([total - 1], np.int32))
        self._total.update_inplace(np.array(total, np.int32))

    def _read_logits(self) -> Float:
        logits: Any = self._logits.numpy()[0, 0]
        return logits  # type: ignore[no-any-return]


def _ms_since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)

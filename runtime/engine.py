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

Where an answer copies what stands in its prompt, the decoder is fed several tokens at a time (drafting.py); where a
dialogue goes on, a Conversation keeps what its earlier turns have computed.

All state belongs to a request or a conversation (generation.py, conversation.py). One Engine may serve several threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .conversation import Conversation
from .drafting import ROW_COST, Drafter
from .errors import InputError, PackageError, ProviderError
from .gate import Action, GatePolicy, Mode, Verdict
from .generation import PREFILL_CHUNK, Prompt, Request, Stats
from .image import ImageLike, at_most
from .manifest import IMAGE_GRAPHS, Manifest
from .pages import placing
from .prompt_encoder import PromptEncoder
from .sampling import SamplingConfig, make_sampler
from .self_test import check_gate
from .subgraph import Device, DeviceName, Subgraph, find_device, has_cuda, require_onnxruntime
from .text import Detokeniser, Message, load_tokenizer
from .video import VideoLike

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "refused"]
ON_THE_HOST = ("prober",)  # reads one row, which the host has summed; and in float32, whatever a GPU makes of that


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

    @staticmethod
    def of(stream: Iterable[Chunk]) -> Answer:
        """All chunks of a stream as one answer."""
        chunks = list(stream)
        last = chunks[-1]
        assert last.finish_reason is not None and last.stats is not None
        return Answer(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(chunk.token for chunk in chunks if chunk.token is not None),
            verdict=last.verdict,
            finish_reason=last.finish_reason,
            stats=last.stats,
        )


class Engine:
    """A loaded package."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: Device,
        *,
        low_memory: bool = False,
        max_tiles: int | None = None,
        load: Callable[..., Subgraph] = Subgraph,
    ):
        """Load every graph of a verified package on `device`. Use Engine.load; `load` is for the export's validation,
        which runs graphs that are larger than its memory.
        """
        self.manifest = manifest
        self.device = device
        self.tokenizer = load_tokenizer(folder / manifest.prompt.tokenizer)
        self._folder, self._load = folder, load
        names = sorted(manifest.graphs, key=lambda name: name != "lm_head")  # first what takes most while it loads
        specs = {n: manifest.graphs[n] for n in names if not (low_memory and n in IMAGE_GRAPHS)}
        host = find_device("cpu", device.threads)[0]
        self.graphs = {
            name: load(folder / spec.file, spec, host if name in ON_THE_HOST else device)
            for name, spec in specs.items()
        }
        image = manifest.image and at_most(manifest.image, max_tiles)
        self.encoder = PromptEncoder(manifest, self.tokenizer, image, self._graph)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: DeviceName = "auto",
        threads: int | None = None,
        low_memory: bool = False,
        max_tiles: int | None = None,
    ) -> Engine:
        """Check every file of `folder` against the manifest's hashes and load it.

        `low_memory` loads the image graph for each picture, checked anew, and drops it again. `max_tiles` bounds what a
        picture may cost: it is cut into at most so many tiles.
        "auto" takes CUDA where it works and says in a log line why it does not.
        Raises PackageError (damaged, incomplete, other version, a gate that does not work here) or ProviderError
        (device not available, onnxruntime too old).
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        require_onnxruntime(manifest.onnxruntime)
        with manifest.verifying(folder), placing():
            chosen, reason = find_device(device, threads, manifest.activations)
            if reason:
                log.log(logging.WARNING if has_cuda() else logging.INFO, "running on the CPU: %s", reason)
            if chosen.kind == "cpu" and manifest.activations == "float16":
                log.warning("this package was exported for CUDA: on the CPU one made with --target cpu is faster")
            try:
                engine = cls(folder, manifest, chosen, low_memory=low_memory, max_tiles=max_tiles)
            except ProviderError as err:
                if device != "auto":
                    raise
                log.warning("running on the CPU: %s", err)
                chosen = find_device("cpu", threads)[0]
                engine = cls(folder, manifest, chosen, low_memory=low_memory, max_tiles=max_tiles)
            check_gate(folder, manifest, engine.graphs, engine.device)
            return engine

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
        videos: Sequence[VideoLike] = (),
        sampling: SamplingConfig | None = None,
        policy: GatePolicy | None = None,
        conversation: Conversation | None = None,
    ) -> Answer:
        """The whole answer at once; see `stream`."""
        return Answer.of(
            self.stream(
                prompt, images=images, videos=videos, sampling=sampling, policy=policy, conversation=conversation
            )
        )

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageLike] = (),
        videos: Sequence[VideoLike] = (),
        sampling: SamplingConfig | None = None,
        policy: GatePolicy | None = None,
        conversation: Conversation | None = None,
    ) -> Iterator[Chunk]:
        """Answer a prompt (with its images and videos) or a dialogue, piece by piece; every piece carries the verdict.

        A video is a file or folder (see open_video), or its frames. `sampling` is greedy and `policy` the package's own
        unless given. With a `conversation` only what is new in the dialogue is computed. Nothing runs before the first
        `next()`.
        Raises InputError where the prompt or an image is unusable or does not fit the context.
        """
        start = time.perf_counter()
        stats = Stats(device=self.device.provider)
        messages = [Message.user(prompt, images, videos)] if isinstance(prompt, str) else list(prompt)
        if (images or videos) and not isinstance(prompt, str):
            raise InputError("images and videos go into the messages of a dialogue, not beside it")
        policy = policy or self.policy()
        if conversation and conversation.engine is not self:
            raise InputError("this conversation was begun with another engine")
        prepared = self.encoder.prepare(messages, stats, conversation)
        yield from self.answer(prepared, sampling or SamplingConfig(), policy, stats, start, conversation)

    def answer(
        self,
        prompt: Prompt,
        sampling: SamplingConfig,
        policy: GatePolicy,
        stats: Stats,
        start: float,
        conversation: Conversation | None = None,
    ) -> Iterator[Chunk]:
        """Answer a prepared prompt; see `stream`. `start` is the time.perf_counter() that times count from."""
        request = self.request(prompt, sampling.max_tokens, stats, conversation=conversation)
        try:
            yield from self._answer(request, list(prompt.token_ids), sampling, policy, stats, start)
        finally:
            if conversation:
                conversation.keep(request.computed())

    def _answer(
        self,
        request: Request,
        tokens: list[int],
        sampling: SamplingConfig,
        policy: GatePolicy,
        stats: Stats,
        start: float,
    ) -> Iterator[Chunk]:
        """THE loop. `tokens` are the prompt's, and grow."""
        verdict = request.judge(policy)
        if verdict.action is Action.STOP:
            stats.ttft_ms = _ms_since(start)
            yield Chunk(policy.refusal_text, None, verdict, "refused", stats)
            return

        sample = make_sampler(sampling)
        detokeniser = Detokeniser(self.tokenizer, sampling.stop)
        precision = self.manifest.graphs["decoder_lower"].precision
        drafting = sampling.speculate and self.device.kind == "cpu"  # what a row costs was measured there only
        drafter = Drafter(tokens, ROW_COST[precision]) if drafting else None
        logits, row = request.begin(verdict.strength)[None], 0  # the last pass, and the row of it that comes next
        draft: list[int] = []
        while True:
            token = sample(logits[row], tokens)
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
            if drafter:
                drafter.push(token)
            if row < len(draft) and draft[row] == token:
                request.accept()
                stats.accepted_tokens += 1
                row += 1
            else:
                draft = drafter.draft(request.max_tokens - stats.completion_tokens - 1) if drafter else []
                stats.drafted_tokens += len(draft)
                logits, row = request.verify([token, *draft]), 0
            stats.decode_ms += _ms_since(before)

    def _graph(self, name: str) -> Subgraph:
        """A graph by name. What was left out to save memory is loaded, its files checked as if for the first time."""
        if name in self.graphs:
            return self.graphs[name]
        spec = self.manifest.graphs[name]
        with self.manifest.verifying(self._folder):
            return self._load(self._folder / spec.file, spec, self.device)

    def request(
        self,
        prompt: Prompt,
        max_tokens: int,
        stats: Stats,
        *,
        chunk: int = PREFILL_CHUNK,
        conversation: Conversation | None = None,
    ) -> Request:
        """The state of one answer: buffers and caches. Raises InputError where the prompt does not fit."""
        length, context = prompt.inputs_embeds.shape[1], self.manifest.dims.context_length
        if length >= context:
            raise InputError(f"the prompt takes {length} tokens (images included); the model's context holds {context}")
        computed = conversation.take() if conversation else None
        room = min(max_tokens, context - length)
        return Request(self.manifest, self.graphs, self.device, prompt, room, stats, chunk=chunk, computed=computed)


def _ms_since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)

"""Load a package and answer prompts: THE loop, with the gate inside it.

    images -> vision_encoder -> rows ---+     or, where images are tokens: image_tokenizer -> ids -> embed_tokens
    text   -> token ids -> embed_tokens +-> decoder_lower -> prober -> decide
                                                                 STOP:  the refusal text, and nothing more runs
                                                                 STEER: strength > 0     PASS: strength = 0
           -> decoder_upper -> (refusal_head) -> lm_head -> sample -> (held back) -> text
                 ^                                             |          ^
                 +---- decoder_lower <- embed_tokens <---------+          |
                                  +------> (monitor): unsafe ends the answer

Prefill is layer-major: decoder_lower runs over the whole prompt, the prober reads its output, and only then does
decoder_upper run. The gate changes the head and never the KV caches, so this computes the same as running layer by
layer. A stopped prompt costs k/N of prefill and no decoding.

If an answer copies from its prompt, or says what the model often says, the decoder verifies several tokens per pass
(drafting.py). A Conversation keeps the caches of a dialogue's earlier turns (conversation.py). The loop may pause:
between chunks of a prompt, and where a server decodes several answers in one pass (batch.py).

All state belongs to a Request or a Conversation (generation.py, conversation.py). One Engine may serve several threads.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .audit import Audit, Hook, Record, open_audit
from .batch import Batch
from .chunk import Answer, Chunk, FinishReason
from .conversation import Conversation
from .draft_table import DraftTable
from .drafting import POSITION_COST, Drafter
from .encoded_prompt import EncodedPrompt
from .errors import InputError, PackageError, ProviderError
from .gate import Action, GatePolicy, Mode, Verdict, mode_from, without_steering
from .generation import PREFILL_CHUNK, Request, finish
from .grammar import Grammars, words_of
from .held_back import until_judged, until_recorded, until_watched
from .judge import Judge
from .manifest import IMAGE_GRAPHS, MANIFEST_FILE, Manifest, sha256
from .monitor import Monitor, monitor_for
from .packed import read_packed
from .pages import placing
from .picture_file import ImageLike
from .prompt_encoder import PromptEncoder, check_length
from .sampling import Constraint, SamplingConfig, log_probabilities, make_sampler
from .self_test import check_gate, check_packs
from .stats import Stats, ms_since
from .subgraph import Device, DeviceName, Subgraph, find_device, has_cuda, has_gpu, require_onnxruntime
from .text import Detokeniser, Message, check_turns, load_tokenizer
from .video import VideoLike

log = logging.getLogger(__name__)

UNGUARDED = (
    "this package was exported with --unguarded: it has no prober and no refusal head; run it with --policy off, or "
    "export it again with --safety"
)
ON_THE_HOST = ("prober", "monitor")  # their input is a mean that the host computes; float32 on every device


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
        audit: Audit | None = None,
    ):
        """Load every graph of a verified package on `device`. Use Engine.load instead.

        `load` makes a graph; the export's validation passes one that can run graphs larger than memory.
        """
        self._audit = audit
        self.manifest = manifest
        self.device = device
        self.tokenizer = load_tokenizer(folder / manifest.prompt.tokenizer)
        self._folder, self._load = folder.absolute(), load
        names = sorted(manifest.graphs, key=lambda name: name != "lm_head")  # lm_head first: it peaks most
        specs = {n: manifest.graphs[n] for n in names if not (low_memory and n in IMAGE_GRAPHS)}
        host = find_device("cpu", device.threads)[0]
        self.graphs = {
            name: load(folder / spec.file, spec, host if name in ON_THE_HOST else device)
            for name, spec in specs.items()
        }
        drafts = manifest.drafts
        self.drafts = DraftTable.load(folder / drafts.file, manifest.dims.vocab_size) if drafts else None
        self.grammars = Grammars(self.tokenizer, manifest.dims.vocab_size, manifest.prompt.end_token_ids)
        self.encoder = PromptEncoder(manifest, self.tokenizer, self._graph, max_tiles)
        self._judge = Judge(
            self.encoder,
            lambda prompt, stats, before: self.request(prompt, 1, stats, conversation=before),
            functools.partial(read_packed, manifest, self.graphs, device) if manifest.reads_in_packs else None,
            manifest.split_layer,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: DeviceName = "auto",
        threads: int | None = None,
        low_memory: bool = False,
        max_tiles: int | None = None,
        audit: str | Path | Hook | None = None,
        audit_texts: bool = False,
    ) -> Engine:
        """Check every file of `folder` against the manifest's hashes and load it.

        `device`: "auto" takes CUDA if it works; if there is a GPU and it does not, a log line says why. `threads`: of
        the CPU, None for one per usable CPU. `low_memory`: load the image graph for each picture, after all hashes of
        the package (about 1 s a GB), and drop it afterwards. `max_tiles`: cut a picture into at most this many tiles,
        and each frame of a video if the model takes them in any size. Models that always cut alike (SmolVLM) ignore
        it, and a long narrow picture may take more. `audit`: a file, to which a line is appended for each request, or a
        function, which is given each as a dict; it must not use this engine, and what it raises fails the request.
        `audit_texts`: with the words of prompts and answers, not only their digests.
        Raises PackageError (package damaged or incomplete, another version, a gate that does not work here),
        ProviderError (device not available, onnxruntime too old) or InputError (`audit` is no file that can be
        appended to; `threads` below 1, or more than four for each CPU of the machine; `max_tiles` below 1).
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        records = open_audit(audit, sha256(folder / MANIFEST_FILE), texts=audit_texts)
        require_onnxruntime(manifest.onnxruntime)
        with manifest.verifying(folder), placing():
            chosen, reason = find_device(device, threads, manifest.activations)
            if reason and (has_cuda() or has_gpu()):
                log.warning("running on the CPU: %s", reason)
            if chosen.kind == "cpu" and manifest.activations == "float16":
                log.warning("this package was exported for CUDA; on the CPU a package made with --target cpu is faster")
            try:
                engine = cls(folder, manifest, chosen, low_memory=low_memory, max_tiles=max_tiles, audit=records)
            except ProviderError as err:
                if device != "auto":
                    raise
                log.warning("running on the CPU: %s", err)
                chosen = find_device("cpu", threads)[0]
                engine = cls(folder, manifest, chosen, low_memory=low_memory, max_tiles=max_tiles, audit=records)
            check_gate(folder, manifest, engine.graphs, engine.device)
            check_packs(manifest, engine.graphs, engine.device)
            return engine

    def policy(
        self,
        mode: Mode | str = Mode.STEER,
        *,
        threshold: float | None = None,
        strength: float | None = None,
        pieces: bool = True,
        judge_answers: bool | None = None,
    ) -> GatePolicy:
        """The package's policy with your overrides.

        Without `pieces` the gate reads turns as wholes alone, and the package's `judge_answers` does not apply: unless
        you set it, steered answers are shown unjudged, and a dialogue with an unsafe turn before the last is steered.
        `threshold` is below 1, `strength` from 0 to STRENGTH_MAX.
        Raises PackageError if `mode` needs a gate and the package has none, InputError for numbers out of range and for
        an unknown mode.
        """
        mode, prober, refusal = mode_from(mode), self.manifest.prober, self.manifest.refusal
        if prober is None or refusal is None:
            if mode is not Mode.OFF:
                raise PackageError(UNGUARDED)
            return GatePolicy(mode, threshold=0.0, strength=0.0, refusal_text="")
        return GatePolicy(
            mode,
            threshold=prober.threshold if threshold is None else threshold,
            strength=refusal.strength if strength is None else strength,
            refusal_text=refusal.text,
            pieces=pieces,
            judge_answers=self.manifest.judges_answers(judge_answers, pieces=pieces),
            judge_threshold=1.0 if prober.judge_threshold is None else prober.judge_threshold,
        )

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageLike] = (),
        videos: Sequence[VideoLike] = (),
        sampling: SamplingConfig | None = None,
        policy: GatePolicy | Mode | str | None = None,
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
        policy: GatePolicy | Mode | str | None = None,
        conversation: Conversation | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer a prompt (with its images and videos) or a dialogue, in chunks; each carries the verdict.

        An image is a path, a PIL image or an RGB array (H, W, 3) uint8. A video is a file or folder (see open_video),
        or its frames. The defaults are greedy `sampling` and the package's `policy`, which may be a name ("stop"). A
        steered answer is greedy; where `sampling` restricts the answer, what would be steered is stopped. A judged
        answer comes whole: a steered one, all if the package or the policy says so (`judge_answers`), and one whose
        `sampling` could make the model say what it hardly ever says (SamplingConfig.answer_is_judged). With a
        `conversation` only what is new in the dialogue is computed. Nothing runs before the first `next()`. To end an
        answer early, close the generator; to interrupt it from another thread, run it in `with Cancel()`.
        Raises InputError if the prompt, an image or a video is unusable, or does not fit the context, PackageError for
        a package without a gate unless `policy` is off and for logits that are not finite, CancelledError, and
        AuditError if the engine has an audit record that cannot be written. onnxruntime's own exceptions pass through.
        """
        if conversation and conversation.engine is not self:
            raise InputError("this conversation was begun with another engine")
        policy = self.policy(policy) if isinstance(policy, str) else policy
        conversation = conversation or Conversation(self)
        with self.record(policy or self.policy()) as record:
            prepared = self.encode(_dialogue(prompt, images, videos), record, conversation)
            yield from self.answer(prepared, sampling or SamplingConfig(), record, conversation)

    def score(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageLike] = (),
        videos: Sequence[VideoLike] = (),
        policy: GatePolicy | Mode | str | None = None,
    ) -> Verdict:
        """The verdict on a prompt or a dialogue, without an answer: decoder_upper never runs.

        There is no answer to judge, so the prompt is read as under a policy with `judge_answers` false, which reads a
        user's words with the pictures of later turns, too (readings.with_each_picture). Raises what `stream` raises.
        """
        asked = self.policy(policy) if isinstance(policy, str) else policy or self.policy()
        with self.record(replace(asked, judge_answers=False)) as record:
            conversation = Conversation(self)
            prepared = self.encode(_dialogue(prompt, images, videos), record, conversation)
            return finish(self.judge(prepared, record, conversation))

    def count_tokens(
        self, prompt: str | Sequence[Message], *, images: Sequence[ImageLike] = (), videos: Sequence[VideoLike] = ()
    ) -> int:
        """Tokens of the prompt that these become, those of pictures and videos included. The decoder does not run.

        Raises InputError as `stream` does; for a prompt that does not fit the context, its message has the count.
        """
        messages = _dialogue(prompt, images, videos)
        check_turns(messages)
        return len(self.encoder.prepare(messages, Stats()).keys)

    def record(self, policy: GatePolicy) -> Record:
        """The audit record and the statistics of a request, which begins now; a context manager around it.

        Raises PackageError for a package without a gate unless `policy` is off.
        """
        if policy.mode is not Mode.OFF and not self.manifest.guarded:
            raise PackageError(UNGUARDED)
        return Record(self._audit, policy, self.device.provider)

    def encode(
        self, messages: list[Message], record: Record, conversation: Conversation | None = None
    ) -> EncodedPrompt:
        """A request's dialogue, noted in its `record`, as the decoder's input. Raises InputError as `stream` does."""
        record.messages = messages
        check_turns(messages)
        return self.encoder.prepare(messages, record.stats, conversation)

    def judge(
        self, prompt: EncodedPrompt, record: Record, conversation: Conversation | None = None
    ) -> Generator[None, None, Verdict]:
        """The verdict on an encoded prompt; see `score`. Pauses between chunks of it."""
        record.prompt = prompt
        asked = self.request(prompt, 1, record.stats)
        verdict = yield from self._judge.prompt(asked, record, record.policy, conversation)
        record.gave("", "scored")
        return verdict

    def answer(
        self, prompt: EncodedPrompt, sampling: SamplingConfig, record: Record, conversation: Conversation | None = None
    ) -> Iterator[Chunk]:
        """Answer an encoded prompt; see `stream`. `record`: of `Engine.record`, when the call began."""
        for chunk in self.steps(prompt, sampling, record, conversation):
            if chunk is not None:
                yield chunk

    def steps(
        self,
        prompt: EncodedPrompt,
        sampling: SamplingConfig,
        record: Record,
        conversation: Conversation | None = None,
        batch: Batch | None = None,
    ) -> Iterator[Chunk | None]:
        """The chunks of `answer`, and None where it pauses, so that other requests may compute: between chunks of the
        prompt, and before each pass if `batch` runs it.
        """
        constraint = self.grammars.start(sampling)  # raises before anything is computed
        record.prompt = prompt
        request = self.request(prompt, sampling.max_tokens, record.stats, conversation=conversation)
        monitor = monitor_for(self.manifest, self.graphs, record.policy, record.stats)
        tokens = list(prompt.token_ids)
        chunks = self._answer(request, tokens, sampling, constraint, record, conversation, batch, monitor)
        if monitor:
            chunks = until_watched(chunks, monitor, record)
        all_answers = record.policy.judge_answers or sampling.answer_is_judged
        if record.policy.mode is not Mode.OFF:

            def said() -> str:
                return "".join(map(Detokeniser(self.tokenizer, ()).push, tokens[len(prompt.token_ids) :]))

            def score(answer: str) -> Generator[None, None, float]:
                if batch:
                    batch.leave(request)  # whose rows all decode
                texts = [answer] if sampling.json_schema is None else words_of(answer)
                return self._judge.answer(texts, request, record)

            chunks = until_judged(chunks, said, score, record, all_answers=all_answers)
        try:
            yield from until_recorded(chunks, record)
        finally:
            if batch:
                batch.leave(request)
            if conversation:
                conversation.keep_prefix(request.cached_prefix())

    def _answer(
        self,
        request: Request,
        tokens: list[int],
        sampling: SamplingConfig,
        constraint: Constraint | None,
        record: Record,
        conversation: Conversation | None,
        batch: Batch | None,
        monitor: Monitor | None,
    ) -> Iterator[Chunk | None]:
        """THE loop. `tokens`: the prompt's; the answer's are appended. `monitor` reads those that a pass ran over."""
        stats = record.stats
        policy = without_steering(record.policy) if sampling.restricts else record.policy
        verdict = yield from self._judge.prompt(request, record, policy, conversation)
        if verdict.action is Action.STOP:
            yield Chunk(record.policy.refusal_text, None, verdict, "refused", stats)
            return

        steered, alternatives = verdict.action is Action.STEER, sampling.logprobs
        if alternatives and (steered or policy.judge_answers or sampling.answer_is_judged):
            alternatives = 0  # the answer is judged, but nobody judges what the model might have said instead
        if steered:
            sampling = sampling.greedy()
        sample = make_sampler(sampling, len(tokens), constraint)
        detokeniser = Detokeniser(self.tokenizer, sampling.stop)
        precision = self.manifest.graphs["decoder_lower"].precision
        drafting = sampling.speculate and self.device.kind == "cpu"  # POSITION_COST was measured on CPUs only
        drafter = Drafter(tokens, POSITION_COST[precision], self.drafts) if drafting else None
        first = yield from request.upper_chunks(verdict.strength)
        logits, row = first[None], 0  # of the latest pass; the row to sample from
        draft: list[int] = []
        while True:
            token = sample(logits[row], tokens)
            tokens.append(token)
            stats.completion_tokens += 1
            ended = token in self.manifest.prompt.end_token_ids
            text = "" if ended else detokeniser.push(token)
            logs = None if alternatives is None else log_probabilities(logits[row], token, alternatives)
            reason: FinishReason | None = "stop" if ended or detokeniser.stopped else None
            if reason is None and stats.completion_tokens == request.max_tokens:
                reason = "length"
            if reason is not None:
                yield Chunk(text + detokeniser.flush(), token, verdict, reason, stats, logs)
                return
            yield Chunk(text, token, verdict, logprobs=logs)
            before = time.perf_counter()
            if drafter:
                drafter.push(token)
            if row < len(draft) and draft[row] == token:
                request.accept_draft()
                stats.accepted_tokens += 1
                row += 1
            else:
                draft = drafter.draft(request.max_tokens - stats.completion_tokens - 1) if drafter else []
                fed = [token, *draft]
                logits = (yield from batch.decode(request, fed)) if batch else request.verify_draft(fed)
                row = 0
                draft = draft[: len(logits) - 1]  # beside other requests none of it was run
                stats.drafted_tokens += len(draft)
            if monitor:
                monitor.read(request.hidden_state(row))
            stats.decode_ms += ms_since(before)

    def _graph(self, name: str) -> Subgraph:
        """A graph by name. If low_memory left it out, the package is verified and the graph loaded for this call."""
        if name in self.graphs:
            return self.graphs[name]
        spec = self.manifest.graphs[name]
        with self.manifest.verifying(self._folder):
            return self._load(self._folder / spec.file, spec, self.device)

    def request(
        self,
        prompt: EncodedPrompt,
        max_tokens: int,
        stats: Stats,
        *,
        chunk: int = PREFILL_CHUNK,
        conversation: Conversation | None = None,
    ) -> Request:
        """Buffers and caches for one answer. `chunk`: positions per prefill pass.

        Raises InputError if the prompt does not fit the context.
        """
        length, context = prompt.inputs_embeds.shape[1], self.manifest.dims.context_length
        check_length(self.manifest, length)
        cached = conversation.take_prefix() if conversation else None
        longest = min(max_tokens, self.manifest.rotary.longest_answer(length, context))
        return Request(self.manifest, self.graphs, self.device, prompt, longest, stats, chunk=chunk, cached=cached)


def _dialogue(
    prompt: str | Sequence[Message], images: Sequence[ImageLike], videos: Sequence[VideoLike]
) -> list[Message]:
    """The messages of a call. Raises InputError if a dialogue comes with separate images or videos, or is none."""
    if isinstance(prompt, str):
        return [Message.user(prompt, images, videos)]
    if images or videos:
        raise InputError("images and videos go into the messages of a dialogue, not beside it")
    messages = list(prompt) if isinstance(prompt, Iterable) else []
    if not isinstance(prompt, Iterable) or not all(isinstance(message, Message) for message in messages):
        raise InputError(f"prompt = {prompt!r:.60}: give a text, or a list of Message")
    return messages

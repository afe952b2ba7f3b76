"""Asks a package's prober about a dialogue, and about an answer that is judged (held_back.py).

readings.py says what is read. A dialogue is as unsafe as the worst of its scores. Pieces count until one of the turn's
forms is unsafe. A dialogue with an unsafe turn before the last is stopped, not steered, unless the policy asks
for plain steering (GatePolicy.checks_steering): the Refusal Head was trained on requests that come last.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from .conversation import Conversation, ReadingKey
from .errors import InputError
from .gate import Action, GatePolicy, Mode, Verdict, decide, is_safe, without_steering, worst
from .packed import can_share_a_pass, first_is_read_alone
from .pieces import discounted
from .readings import Prefix, Reading, all_readings, plain_turns, readings_of_answer, shown_by_turn, with_letters_of
from .stats import Stats, ms_since
from .text import Message, Part, VideoPart

if TYPE_CHECKING:
    from .audit import Record
    from .encoded_prompt import EncodedPrompt, Seen
    from .generation import CachedPrefix, Request
    from .prompt_encoder import PromptEncoder

log = logging.getLogger(__name__)

Ask: TypeAlias = "Callable[[EncodedPrompt, Stats, Conversation], Request]"
ReadPacked: TypeAlias = (
    "Callable[[CachedPrefix, Sequence[EncodedPrompt], Stats], Generator[None, None, tuple[list[float], CachedPrefix]]]"
)
TOGETHER = 32  # readings whose scores are looked at when all are known, if they can share passes
MOST_ROWS = 4096  # of readings that are encoded at once: a picture has its rows in each of them


@dataclass
class Forms:
    """What the forms of a dialogue's judged turns score, and what follows."""

    scores: list[float]  # the worst of each turn so far
    threshold: float
    kept: Mapping[ReadingKey, float]  # scores that the conversation knows
    known: dict[ReadingKey, float] = field(default_factory=dict)  # scores of this dialogue's readings
    stopped: bool = False  # whether a form is unsafe that stops the request

    def is_unsafe(self, p: float) -> bool:
        """Whether score `p` is unsafe."""
        return not is_safe(p, self.threshold)

    def counts(self, at: int, reading: Reading) -> bool:
        """False for a reading that is left out because its turn is unsafe already."""
        return not (reading.skip_if_unsafe and self.is_unsafe(self.scores[at]))

    def score_of(self, key: ReadingKey) -> float | None:
        """The score of a reading, if it is known."""
        return self.known.get(key, self.kept.get(key))

    def note(self, at: int, reading: Reading, p_unsafe: float) -> None:
        """A reading of a judged turn has this score; it changes nothing if it does not count."""
        if self.counts(at, reading):
            p = discounted(p_unsafe) if reading.discounted else p_unsafe
            self.scores[at] = worst([self.scores[at], p])
            self.stopped = self.stopped or (reading.stop_if_unsafe and self.is_unsafe(p))


class Judge:
    """Asks a package's prober."""

    def __init__(self, encoder: PromptEncoder, ask: Ask, read_packed: ReadPacked | None, split_layer: int):
        """`ask`: makes a request that gives no answer, and starts from what the conversation keeps. `read_packed`:
        packed.read_packed; None if the package cannot.
        """
        self._encoder, self._ask, self._read_packed, self._split_layer = encoder, ask, read_packed, split_layer
        self._together = TOGETHER if read_packed else 1

    def prompt(
        self, request: Request, record: Record, policy: GatePolicy, conversation: Conversation | None
    ) -> Generator[None, None, Verdict]:
        """The verdict on the prompt of `request`, noted in `record`, which has its messages and the encoded prompt.
        Pauses between chunks.

        `conversation`: scores that it knows of other readings of its turns are not computed again.
        Raises InputError if there are no messages, and pieces are wanted; and for too many readings.
        """
        if policy.mode is not Mode.OFF and policy.pieces and not record.messages:
            raise InputError(
                "the record has no messages, so a turn cannot be read in all its forms: encode the prompt with "
                "Engine.encode, or give a policy with pieces=False"
            )
        verdict = yield from request.lower_chunks(policy)
        forms = Forms(list(request.scores), policy.threshold, conversation.known_scores if conversation else {})
        if verdict.p_unsafe is not None:
            yield from self._read_forms(request, record, policy, forms)
            earlier = policy.checks_steering and any(map(forms.is_unsafe, forms.scores[:-1]))
            policy = without_steering(policy) if forms.stopped or earlier else policy
            verdict = decide(worst([verdict.p_unsafe, *forms.scores]), policy, split_layer=self._split_layer)
        if conversation:
            conversation.known_scores = forms.known
        record.verdict, record.scores = verdict, forms.scores
        return verdict

    def _read_forms(
        self, request: Request, record: Record, policy: GatePolicy, forms: Forms
    ) -> Generator[None, None, None]:
        """Note in `forms` what the forms of the turns score that are not read where the turns stand. May pause."""
        messages, prompt, stats = record.messages, record.prompt, record.stats
        assert prompt is not None
        begun, plain = self._begun(request), plain_turns(messages)
        shown, frames = self._each_shown(messages, prompt.seen, frames=policy.pieces)
        if len(messages) > 1 and any(plain):
            whole = Reading(tuple(with_letters_of(plain, messages)), skip_if_unsafe=True, stop_if_unsafe=True)
            found = [math.nan] * len(forms.scores)
            if letters := self._encode(whole, prompt.seen, stats, len(found)):
                found = yield from self._score(letters, policy, stats, begun[Prefix.PLAIN_DIALOGUE])
            for at, score in enumerate(found):
                forms.note(at, whole, score)
        readings = all_readings(
            messages, plain, pieces=policy.pieces, judge_answers=policy.judge_answers, frames=frames
        )
        while some := [*itertools.islice(readings, self._together)]:
            keys = [reading_key(reading.messages, seen_by(reading, shown)) for _, reading in some]
            scored = {key: p for key in keys if (p := forms.score_of(key)) is not None}
            new = dict[ReadingKey, Reading]()
            for key, (at, one) in zip(keys, some, strict=True):
                if key not in scored and forms.counts(at, one):
                    new.setdefault(key, one)  # the first of those alike decides which share a pass, as in C++
            found = yield from self._read_all([*new.values()], shown, policy, stats, begun)
            scored |= zip(new, found, strict=True)
            forms.known |= {key: p for key, p in scored.items() if not math.isnan(p)}  # not a failure, which may pass
            for key, (at, reading) in zip(keys, some, strict=True):
                forms.note(at, reading, scored.get(key, math.nan))  # one that no longer counts was not scored

    def answer(self, texts: Sequence[str], request: Request, record: Record) -> Generator[None, None, float]:
        """The worst p_unsafe of the answer of `request` to the prompt that is noted in `record` with its verdict, of
        all readings up to some behind the first that is unsafe; NaN of none, or if one cannot be read. May pause.

        texts: the answer; then its words put together in other ways
        """
        assert record.prompt is not None and record.verdict is not None
        policy, verdict, scores = record.policy, record.verdict, list[float]()
        shown, frames = self._each_shown(record.messages, record.prompt.seen, frames=True)
        begun = self._begun(request)
        text, *also = texts
        steered = verdict.action is Action.STEER
        readings = readings_of_answer(record.messages, text, frames, steered=steered, also=also)
        while some := [*itertools.islice(readings, self._together)]:
            found = yield from self._read_all(some, shown, policy, Stats(), begun)
            scores += (discounted(p) if one.discounted else p for one, p in zip(some, found, strict=True))
            if not is_safe(worst(scores), verdict.judged_above):
                break
        return worst(scores)

    def _each_shown(
        self, messages: Sequence[Message], seen: Sequence[Seen], *, frames: bool
    ) -> tuple[list[list[Seen]], list[tuple[int, Part]]]:
        """What is seen of each picture and video, then, with `frames`, of each frame of the videos
        (PromptEncoder.single_frames); and these frames, with the turns that show them.
        """
        shown, single = by_picture(messages, seen), list[tuple[int, Part]]()
        parts = shown_by_turn(messages) if frames else []
        for (n, part), one in zip(parts, shown[: len(parts)], strict=True):
            if isinstance(part, VideoPart):
                for frame, rows in self._encoder.single_frames(part, one):
                    single.append((n, frame))
                    shown.append([rows])
        return shown, single

    def _begun(self, request: Request) -> defaultdict[Prefix, Conversation]:
        """What readings start from, by Reading.prefix: at first from what `request` computed of its prompt, then from
        what the reading before computed.
        """

        def first() -> Conversation:
            conversation = Conversation(self)
            conversation.keep_prefix(request.lend_prefix())
            return conversation

        return defaultdict(first)

    def _read_all(
        self,
        readings: Sequence[Reading],
        shown: Sequence[Sequence[Seen]],
        policy: GatePolicy,
        stats: Stats,
        begun: Mapping[Prefix, Conversation],
    ) -> Generator[None, None, list[float]]:
        """p_unsafe of the last turn of each reading; NaN if it cannot be read."""
        found = [math.nan] * len(readings)
        alike = defaultdict[tuple[Prefix, int, tuple[int, ...]], list[int]](list)
        for i, reading in enumerate(readings):
            alike[reading.prefix, len(reading.messages), tuple(reading.pictures)].append(i)
        for (prefix, *_), members in alike.items():
            seen, prompts = seen_by(readings[members[0]], shown), dict[int, "EncodedPrompt"]()
            for i in members:
                if prompt := self._encode(readings[i], seen, stats):
                    prompts[i] = prompt
                if i == members[-1] or sum(len(prompt.keys) for prompt in prompts.values()) > MOST_ROWS:
                    scores = yield from self._score_alike([*prompts.values()], policy, stats, begun[prefix])
                    for number, p in zip(prompts, scores, strict=True):
                        found[number] = p
                    prompts.clear()
        return found

    def _score_alike(
        self, prompts: Sequence[EncodedPrompt], policy: GatePolicy, stats: Stats, begun: Conversation
    ) -> Generator[None, None, list[float]]:
        """p_unsafe of the last turn of prompts that begin alike: those that are short share passes, if the package can.
        They start from what `begun` has, and leave it more.
        """
        found = dict[int, float]()
        if self._read_packed and len(prompts) > 1:
            if first_is_read_alone(prompts, begun.prefix):
                (found[0],) = yield from self._score(prompts[0], policy, stats, begun)
            if prefix := begun.take_prefix():
                short = can_share_a_pass({i: prompts[i] for i in range(len(found), len(prompts))}, prefix)
                if short:
                    own = Stats()
                    scores, prefix = yield from self._read_packed(prefix, [*short.values()], own)
                    found |= zip(short, scores, strict=True)
                    stats.gate_ms += own.lower_ms
                begun.keep_prefix(prefix)
        for i, prompt in enumerate(prompts):
            if i not in found:
                (found[i],) = yield from self._score(prompt, policy, stats, begun)
        return [found[i] for i in range(len(prompts))]

    def _encode(self, reading: Reading, seen: Sequence[Seen], stats: Stats, turns: int = 1) -> EncodedPrompt | None:
        """A reading with the dialogue's pictures and videos as `seen` has them; None if it cannot be read. What it took
        is added to `stats`.gate_ms.
        """
        before = time.perf_counter()
        try:
            return self._encoder.prepare_seen(reading.messages, seen, Stats(), turns)
        except InputError as err:
            log.error("a text could not be judged, so it counts as unsafe: %s", err)
            return None
        finally:
            stats.gate_ms += ms_since(before)

    def _score(
        self, prompt: EncodedPrompt, policy: GatePolicy, stats: Stats, begun: Conversation
    ) -> Generator[None, None, list[float]]:
        """p_unsafe of the judged turns of `prompt`; NaN if it cannot be read. What it took, without pauses, is added to
        `stats`.gate_ms. It starts from what `begun` has, and leaves it more. Pauses at its end: a long turn has many
        pieces, and others wait.
        """
        before, own = time.perf_counter(), Stats()
        try:
            request = self._ask(prompt, own, begun)
        except InputError as err:
            log.error("a text could not be judged, so it counts as unsafe: %s", err)
            return [math.nan] * len(prompt.probed)
        stats.gate_ms += ms_since(before)
        yield from request.lower_chunks(policy)
        begun.keep_prefix(request.cached_prefix())
        stats.gate_ms += own.lower_ms + own.gate_ms
        yield
        return request.scores


def seen_by(reading: Reading, shown: Sequence[Sequence[Seen]]) -> list[Seen]:
    """What a reading shows of what is `shown`."""
    return [one for picture in reading.pictures for one in shown[picture]]


def by_picture(messages: Sequence[Message], seen: Sequence[Seen]) -> list[list[Seen]]:
    """What is seen of each picture and video, in the order of the messages' parts. (A template may write a turn's
    pictures before its videos: `seen` has them so.)
    """
    of_kind: dict[bool, list[list[Seen]]] = {False: [], True: []}  # by whether it is a video
    for one in seen:
        groups = of_kind[one.video]
        groups += [[]] if one.first == 0 else []
        groups[-1].append(one)
    pictures, videos = map(iter, of_kind.values())
    shown = shown_by_turn(messages) if seen else []  # nothing is seen of token ids
    return [next(videos if isinstance(part, VideoPart) else pictures) for _, part in shown]


def reading_key(messages: Sequence[Message], seen: Sequence[Seen]) -> ReadingKey:
    """What a reading's messages say and show: two with the same key have the same score.

    `seen`: its pictures and videos as the dialogue has them. They count by their pixels and by how they are encoded,
    not by their files' names.
    """
    key = []
    for message in messages:
        parts: list[object] = []
        for part in message.parts:
            if isinstance(part, VideoPart):
                parts.append((len(part.frames), repr(part.seconds)))
            else:
                parts.append(part if isinstance(part, str) else None)
        key.append((message.role, parts))
    return hashlib.sha256(repr((key, [one.key for one in seen])).encode("utf-8", "surrogatepass")).digest()

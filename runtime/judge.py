"""Asks a package's prober about a dialogue, and about an answer that is judged (held_back.py).

readings.py says what is read. A dialogue is as unsafe as the worst of its scores. Pieces are read until one of the
turn's forms is unsafe. A dialogue with an unsafe turn before the last is stopped, not steered, unless the policy asks
for plain steering (GatePolicy.checks_steering): the Refusal Head was trained on requests that come last.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from .conversation import Conversation, ReadingKey
from .errors import InputError
from .gate import Action, GatePolicy, Mode, Verdict, decide, is_safe, without_steering, worst
from .pieces import weighed
from .readings import BEHIND_PLAIN, Reading, all_readings, plain_turns, readings_of_answer, shown_in, with_letters_of
from .stats import Stats, ms_since
from .text import Message, Part, VideoPart

if TYPE_CHECKING:
    from .audit import Record
    from .encoded_prompt import EncodedPrompt, Seen
    from .generation import Request
    from .prompt_encoder import PromptEncoder

log = logging.getLogger(__name__)


class Judge:
    """Asks a package's prober."""

    def __init__(
        self, encoder: PromptEncoder, ask: Callable[[EncodedPrompt, Stats, Conversation], Request], split_layer: int
    ):
        """`ask`: makes a request that gives no answer, and starts from what the conversation keeps."""
        self._encoder, self._ask, self._split_layer = encoder, ask, split_layer

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
        messages, scores, prompt, stats = record.messages, list(request.scores), record.prompt, record.stats
        known, kept = dict[ReadingKey, float](), conversation.known_scores if conversation else {}
        if verdict.p_unsafe is not None:
            assert prompt is not None
            begun, plain, stopped = self._begun(request), plain_turns(messages), False
            shown, frames = self._each_shown(messages, prompt.seen, frames=policy.pieces)

            def is_unsafe(p: float) -> bool:
                return not is_safe(p, policy.threshold)

            def note(at: int, p: float, *, stops: bool) -> None:
                nonlocal stopped
                scores[at] = worst([scores[at], p])
                stopped = stopped or (stops and is_unsafe(p))

            if len(messages) > 1 and any(plain):
                whole = Reading(tuple(with_letters_of(plain, messages)), cache=BEHIND_PLAIN)
                found = yield from self._read(whole, prompt.seen, policy, stats, begun[whole.cache], len(scores))
                for at, score in enumerate(found):
                    if not is_unsafe(scores[at]):
                        note(at, score, stops=True)
            for at, reading in all_readings(messages, plain, pieces=policy.pieces, frames=frames):
                if reading.only_while_safe and is_unsafe(scores[at]):
                    continue
                seen = [one for picture in reading.pictures for one in shown[picture]]
                key = reading_key(reading.messages, seen)
                p = known.get(key, kept.get(key))
                if p is None:
                    (p,) = yield from self._read(reading, seen, policy, stats, begun[reading.cache])
                if not math.isnan(p):  # a failure may pass
                    known[key] = p
                note(at, weighed(p) if reading.weighed else p, stops=reading.stops)
            stopped = stopped or (policy.checks_steering and any(map(is_unsafe, scores[:-1])))
            policy = without_steering(policy) if stopped else policy
            verdict = decide(worst([verdict.p_unsafe, *scores]), policy, split_layer=self._split_layer)
        if conversation:
            conversation.known_scores = known
        record.verdict, record.scores = verdict, scores
        return verdict

    def answer(self, text: str, request: Request, record: Record) -> Generator[None, None, float]:
        """The worst p_unsafe of `text`, the answer of `request` to the prompt that is noted in `record` with its
        verdict, until a reading is unsafe; NaN if one cannot be read. May pause.
        """
        assert record.prompt is not None
        policy, p_unsafe = record.policy, 0.0
        shown, frames = self._each_shown(record.messages, record.prompt.seen, frames=True)
        steered = record.verdict is not None and record.verdict.action is Action.STEER
        begun = self._begun(request)
        for reading in readings_of_answer(record.messages, text, frames, steered=steered):
            seen = [one for picture in reading.pictures for one in shown[picture]]
            (p,) = yield from self._read(reading, seen, policy, Stats(), begun[reading.cache])
            p_unsafe = worst([p_unsafe, weighed(p) if reading.weighed else p])
            if not is_safe(p_unsafe, policy.threshold):
                break
        return p_unsafe

    def _each_shown(
        self, messages: Sequence[Message], seen: Sequence[Seen], *, frames: bool
    ) -> tuple[list[list[Seen]], list[tuple[int, Part]]]:
        """What is seen of each picture and video, then, with `frames`, of each frame of the videos
        (PromptEncoder.single_frames); and these frames, with the turns that show them.
        """
        shown, single = by_picture(messages, seen), list[tuple[int, Part]]()
        parts = [(n, part) for n, message in enumerate(messages) for part in shown_in(message)] if frames else []
        for (n, part), one in zip(parts, shown.copy(), strict=False):
            if isinstance(part, VideoPart):
                for frame, rows in self._encoder.single_frames(part, one):
                    single.append((n, frame))
                    shown.append([rows])
        return shown, single

    def _begun(self, request: Request) -> defaultdict[int, Conversation]:
        """What readings start from, by Reading.cache: at first from what `request` computed of its prompt, then from
        what the reading before computed.
        """

        def first() -> Conversation:
            conversation = Conversation(self)
            conversation.keep_prefix(request.lend_prefix())
            return conversation

        return defaultdict(first)

    def _read(
        self,
        reading: Reading,
        seen: Sequence[Seen],
        policy: GatePolicy,
        stats: Stats,
        begun: Conversation,
        turns: int = 1,
    ) -> Generator[None, None, list[float]]:
        """p_unsafe of the last judged `turns` of `reading`, with the dialogue's pictures and videos as `seen` has them;
        NaN if it cannot be read. What it took, without pauses, is added to `stats`.gate_ms. It starts from what `begun`
        has, and leaves it more. Pauses at its end: a long turn has many pieces, and others wait.
        """
        before, own = time.perf_counter(), Stats()
        try:
            request = self._ask(self._encoder.prepare_seen(reading.messages, seen, own, turns), own, begun)
            stats.gate_ms += ms_since(before)
            yield from request.lower_chunks(policy)
        except InputError as err:
            log.error("a text could not be judged, so it counts as unsafe: %s", err)
            return [math.nan] * turns
        begun.keep_prefix(request.cached_prefix())
        stats.gate_ms += own.lower_ms + own.gate_ms
        yield
        return request.scores


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
    parts = [part for message in messages for part in shown_in(message)] if seen else []  # none: given as token ids
    return [next(videos if isinstance(part, VideoPart) else pictures) for part in parts]


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

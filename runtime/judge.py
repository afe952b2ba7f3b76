"""What the prober is asked about a dialogue, and about an answer that its request dictates.

    prompt   every turn that is not trusted, where it stands; a user's turn by itself, too; and by itself a turn whose
             letters are obfuscated, in plain ones (obfuscation.py)
    answer   as if the user had said it, and its beginnings; in plain letters, too

A harmless question that was answered before can draw the prober's eye from a request that it catches by itself. And
biased tokens, which may leave out the one that ends the answer, can drown what it begins with. The worst score counts.
What is unsafe in plain letters is stopped, not steered: the Refusal Head was trained on plain text.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from .conversation import Conversation, TurnKey
from .errors import InputError
from .gate import GatePolicy, Verdict, decide, is_safe, without_steering, worst
from .obfuscation import deobfuscated
from .stats import Stats, ms_since
from .text import Message, Part, VideoPart, judged

if TYPE_CHECKING:
    from .audit import Record
    from .encoded_prompt import EncodedPrompt, Seen
    from .generation import Request
    from .prompt_encoder import PromptEncoder

FIRST_WORDS = 16  # of the shortest beginning that is judged

log = logging.getLogger(__name__)


class Judge:
    """Asks a package's prober."""

    def __init__(self, encoder: PromptEncoder, ask: Callable[[EncodedPrompt, Stats], Request], split_layer: int):
        """`ask`: makes a request that gives no answer."""
        self._encoder, self._ask, self._split_layer = encoder, ask, split_layer

    def prompt(
        self, request: Request, record: Record, policy: GatePolicy, conversation: Conversation | None
    ) -> Generator[None, None, Verdict]:
        """The verdict on the prompt of `request`, noted in `record`, which has its messages and the encoded prompt.
        Pauses between chunks.

        `conversation` knows the scores of its user's turns by themselves: those cost nothing again.
        """
        verdict = yield from request.lower_chunks(policy)
        messages, scores, prompt = record.messages, list(request.scores), record.prompt
        known, kept = dict[TurnKey, float](), conversation.alone if conversation else {}
        if (p_unsafe := verdict.p_unsafe) is not None:
            assert prompt is not None
            for at, n in enumerate(judged(messages)):
                plain = in_plain_letters(messages[n])
                # what stands first is read alike by itself: nothing is before it
                alone = messages[n] if n > 0 and messages[n].role == "user" else None
                for turn in filter(None, (alone, plain)):
                    key = turn_key(turn, prompt.seen[at])
                    p = known.get(key, kept.get(key))
                    if p is None:
                        p = yield from self._by_itself(turn, prompt.seen[at], policy, record.stats)
                    if not math.isnan(p):  # a failure may pass
                        known[key] = p
                    scores[at], p_unsafe = worst([scores[at], p]), worst([p_unsafe, p])
                    if turn is plain and not is_safe(p, policy.threshold):
                        policy = without_steering(policy)
            verdict = decide(p_unsafe, policy, split_layer=self._split_layer)
        if conversation:
            conversation.alone = known
        record.verdict, record.scores = verdict, scores
        return verdict

    def answer(self, text: str, policy: GatePolicy) -> Generator[None, None, float]:
        """The worst p_unsafe of an answer and of its beginnings, also in plain letters, each as a user's prompt; NaN if
        one cannot be read. May pause.
        """
        scores, plain = [], deobfuscated(text)
        for said in (*beginnings(text), *(beginnings(plain) if plain != text else ())):
            stats = Stats()
            try:
                request = self._ask(self._encoder.prepare([Message.user(said)], stats), stats)
            except InputError as err:
                log.error("the answer could not be judged, so it counts as unsafe: %s", err)
                return math.nan
            scores.append(_score((yield from request.lower_chunks(policy))))
        return worst(scores)

    def _by_itself(
        self, turn: Message, seen: Sequence[Seen], policy: GatePolicy, stats: Stats
    ) -> Generator[None, None, float]:
        """p_unsafe of a user's turn as a prompt of its own, with its pictures and videos as the dialogue has them; NaN
        if it is none that fits. What it took, without pauses, is added to `stats`.gate_ms.
        """
        before, own = time.perf_counter(), Stats()
        try:
            request = self._ask(self._encoder.prepare_turn(turn, seen, own), own)
        except InputError as err:
            log.error("a turn could not be judged by itself, so the prompt counts as unsafe: %s", err)
            return math.nan
        finally:
            stats.gate_ms += ms_since(before)
        verdict = yield from request.lower_chunks(policy)
        stats.gate_ms += own.lower_ms + own.gate_ms
        return _score(verdict)


def in_plain_letters(turn: Message) -> Message | None:
    """A turn with obfuscated letters as a user's in plain ones; None if it has no such letters.

    Texts that follow each other are read as one: "b4" and "d" say "bad".
    """
    parts: list[Part] = []
    for part in turn.parts:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    plain = [deobfuscated(part) if isinstance(part, str) else part for part in parts]
    return None if plain == parts else Message("user", tuple(plain))


def turn_key(turn: Message, seen: Sequence[Seen]) -> TurnKey:
    """What a user's turn says and shows: two turns with the same key are the same prompt by themselves.

    `seen`: its pictures and videos as the dialogue has them. They count by their pixels and by how they are encoded,
    not by their files' names.
    """
    key: list[object] = []
    for part in turn.parts:
        if isinstance(part, VideoPart):
            key.append((len(part.frames), repr(part.seconds)))
        else:
            key.append(part if isinstance(part, str) else None)
    return (*key, *(one.key for one in seen))


def beginnings(text: str) -> Iterator[str]:
    """The text up to its 16th, 32nd, 64th, ... word, and the whole. Words end at ASCII white space."""
    words = FIRST_WORDS
    for number, word in enumerate(re.finditer(r"[^ \t\n\v\f\r]+", text), 1):
        if number == words and word.end() < len(text):
            yield text[: word.end()]
            words *= 2
    yield text


def _score(verdict: Verdict) -> float:
    return math.nan if verdict.p_unsafe is None else verdict.p_unsafe

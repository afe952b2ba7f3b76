"""What the prober is asked about a dialogue, and about an answer that its request dictates.

    prompt   every turn that is not trusted, where it stands; a user's turn by itself, too
    answer   as if the user had said it, and its beginnings

A harmless question that was answered before can draw the prober's eye from a request that it catches by itself. And
biased tokens, which may leave out the one that ends the answer, can drown what it begins with. The worst score counts.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from .conversation import Conversation
from .errors import InputError
from .gate import GatePolicy, Verdict, decide, worst
from .stats import Stats, ms_since
from .text import Message, judged

if TYPE_CHECKING:
    from .audit import Record
    from .encoded_prompt import EncodedPrompt, Key
    from .generation import Request
    from .prompt_encoder import PromptEncoder

FIRST_WORDS = 16  # of the shortest beginning that is judged

log = logging.getLogger(__name__)


class Judge:
    """Asks a package's prober."""

    def __init__(self, encoder: PromptEncoder, ask: Callable[[EncodedPrompt], Request], split_layer: int):
        """`ask`: makes a request that gives no answer."""
        self._encoder, self._ask, self._split_layer = encoder, ask, split_layer

    def prompt(
        self, request: Request, record: Record, policy: GatePolicy, conversation: Conversation | None
    ) -> Generator[None, None, Verdict]:
        """The verdict on the prompt of `request`, noted in `record`, which has its messages. Pauses between chunks.

        `conversation` knows the scores of its turns by themselves, and their pictures.
        """
        verdict = yield from request.lower_chunks(policy)
        before = time.perf_counter()
        messages, scores = record.messages, list(request.scores)
        known: dict[tuple[Key, ...], float] = {}
        several = sum(len(message.images) for message in messages) > 1
        if (p_unsafe := verdict.p_unsafe) is not None and len(messages) > 1:
            for at, n in enumerate(judged(messages)):
                # what stands first is read alike by itself: nothing is before it
                if n > 0 and messages[n].role == "user":
                    p = yield from self._by_itself(messages[n], several, policy, conversation, known)
                    scores[at], p_unsafe = worst([scores[at], p]), worst([p_unsafe, p])
            verdict = decide(p_unsafe, policy, split_layer=self._split_layer)
            record.stats.gate_ms += ms_since(before)
        if conversation:
            conversation.alone = known
        record.verdict, record.scores = verdict, scores
        return verdict

    def answer(self, text: str, policy: GatePolicy) -> Generator[None, None, float]:
        """The worst p_unsafe of an answer and of its beginnings, each as a user's prompt; NaN if one cannot be read.

        May pause.
        """
        scores = []
        for said in beginnings(text):
            try:
                as_prompt = self._encoder.prepare([Message.user(said)], Stats())
            except InputError as err:
                log.error("the answer could not be judged, so it counts as unsafe: %s", err)
                return math.nan
            scores.append((yield from self._score(as_prompt, policy)))
        return worst(scores)

    def _by_itself(
        self,
        turn: Message,
        several: bool,
        policy: GatePolicy,
        conversation: Conversation | None,
        known: dict[tuple[Key, ...], float],
    ) -> Generator[None, None, float]:
        """p_unsafe of a user's turn as a prompt of its own; NaN if it is none that fits. Noted in `known`, if it is a
        number: a failure may pass. `several`: the dialogue has several pictures, so this turn's are encoded as there.
        """
        aside = Conversation(self)
        aside.images = dict(conversation.images) if conversation else {}  # not encoded again
        try:
            alone = self._encoder.prepare([turn], Stats(), aside, several)
        except InputError as err:
            log.error("a turn could not be judged by itself, so the prompt counts as unsafe: %s", err)
            return math.nan
        key = tuple(alone.keys)
        p = known.get(key, conversation.alone.get(key) if conversation else None)
        if p is None:
            p = yield from self._score(alone, policy)
        if not math.isnan(p):
            known[key] = p
        return p

    def _score(self, as_prompt: EncodedPrompt, policy: GatePolicy) -> Generator[None, None, float]:
        verdict = yield from self._ask(as_prompt).lower_chunks(policy)
        return math.nan if verdict.p_unsafe is None else verdict.p_unsafe


def beginnings(text: str) -> Iterator[str]:
    """The text up to its 16th, 32nd, 64th, ... word, and the whole. Words end at ASCII white space."""
    words = FIRST_WORDS
    for number, word in enumerate(re.finditer(r"[^ \t\n\v\f\r]+", text), 1):
        if number == words and word.end() < len(text):
            yield text[: word.end()]
            words *= 2
    yield text

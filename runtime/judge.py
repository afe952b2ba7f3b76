"""What the prober is asked about a dialogue, and about an answer that is judged (held_back.py).

    prompt   every turn that is not trusted, where it stands; a user's turn by itself, too; a turn of several texts, and
             a user's turns in a row, as one text; what has obfuscated letters in plain ones (obfuscation.py); and the
             pieces of all these (pieces.py). What is not the turn itself is read by itself, and where the turn stands.
             Also all that the user said, as one text; and a user's words with each of several pictures
    answer   as if the user had said it, and its pieces; in plain letters, too; by itself, and as the dialogue's next
             turn: of a steered answer, whose dialogue is unsafe, in place of the last turn's words

A harmless question that was answered before, or that stands beside it, can draw the prober's eye from a request that it
catches by itself. The worst score counts; a piece's is weighed. Pieces are read until one is unsafe. What is unsafe in
another reading than the turn itself is stopped, not steered: the Refusal Head was trained on whole plain turns. So is
a dialogue with an unsafe turn before the last: it was trained on requests that come last.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .conversation import Conversation, ReadingKey
from .errors import InputError
from .gate import Action, GatePolicy, Verdict, decide, is_safe, without_steering, worst
from .obfuscation import deobfuscated
from .pieces import SPACE, in_single_blanks, weighed
from .pieces import pieces as pieces_of
from .stats import Stats, ms_since
from .text import Message, Part, VideoPart, judged

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

        `conversation` knows the scores of other readings of its turns: those cost nothing again.
        """
        verdict = yield from request.lower_chunks(policy)
        messages, scores, prompt = record.messages, list(request.scores), record.prompt
        known, kept = dict[ReadingKey, float](), conversation.read if conversation else {}
        if (p_unsafe := verdict.p_unsafe) is not None:
            assert prompt is not None
            scratch = defaultdict[int, Conversation](lambda: Conversation(self))
            if policy.checks_steering and not all(is_safe(p, policy.threshold) for p in scores[:-1]):
                policy = without_steering(policy)
            turns = judged(messages)
            plain: list[Message | None] = [None] * len(messages)
            for n in turns:
                plain[n] = in_plain_letters(messages[n])
            shown = by_picture(prompt)
            for at, reading in all_readings(messages, plain, turns, pieces=policy.pieces):
                if reading.if_safe and not is_safe(scores[at], policy.threshold):
                    continue
                seen = [one for picture in reading.pictures for one in shown[picture]]
                key = reading_key(reading.messages, seen)
                p = known.get(key, kept.get(key))
                if p is None:
                    p = yield from self._read(reading, seen, policy, record.stats, scratch[reading.prefix])
                if not math.isnan(p):  # a failure may pass
                    known[key] = p
                if reading.piece:
                    p = weighed(p)
                scores[at], p_unsafe = worst([scores[at], p]), worst([p_unsafe, p])
                if reading.stops and not is_safe(p, policy.threshold):
                    policy = without_steering(policy)
            verdict = decide(p_unsafe, policy, split_layer=self._split_layer)
        if conversation:
            conversation.read = known
        record.verdict, record.scores = verdict, scores
        return verdict

    def answer(self, text: str, record: Record) -> Generator[None, None, float]:
        """The worst p_unsafe of `text`, an answer to the prompt that is noted in `record` with its verdict, until a
        reading is unsafe; NaN if one cannot be read. May pause.
        """
        assert record.prompt is not None
        policy, shown, p_unsafe = record.policy, by_picture(record.prompt), 0.0
        steered = record.verdict is not None and record.verdict.action is Action.STEER
        scratch = defaultdict[int, Conversation](lambda: Conversation(self))
        for reading in readings_of_answer(record.messages, text, steered=steered):
            seen = [one for picture in reading.pictures for one in shown[picture]]
            p = yield from self._read(reading, seen, policy, Stats(), scratch[reading.prefix])
            p = weighed(p) if reading.piece else p
            if reading.prefix and not reading.pictures:  # what is said about no picture says most of it by itself
                p = weighed(p)
            p_unsafe = worst([p_unsafe, p])
            if not is_safe(p_unsafe, policy.threshold):
                break
        return p_unsafe

    def _read(
        self, reading: Reading, seen: Sequence[Seen], policy: GatePolicy, stats: Stats, scratch: Conversation
    ) -> Generator[None, None, float]:
        """p_unsafe of the last turn of `reading`, with the dialogue's pictures and videos as `seen` has them; NaN if it
        cannot be read. What it took, without pauses, is added to `stats`.gate_ms. `scratch` has what the reading
        before computed. Pauses at its end: a long turn has many pieces, and others wait.
        """
        before, own = time.perf_counter(), Stats()
        try:
            request = self._ask(self._encoder.prepare_seen(reading.messages, seen, own), own, scratch)
        except InputError as err:
            log.error("a text could not be judged, so it counts as unsafe: %s", err)
            return math.nan
        finally:
            stats.gate_ms += ms_since(before)
        yield from request.lower_chunks(policy)
        scratch.keep_prefix(request.cached_prefix())
        stats.gate_ms += own.lower_ms + own.gate_ms
        yield
        return request.scores[-1]


@dataclass(frozen=True)
class Reading:
    """A turn as the prober reads it beside the turn itself."""

    messages: tuple[Message, ...]  # the turn is the last; before it, what came before, or nothing
    pictures: Sequence[int] = ()  # numbers of the pictures and videos, of all that the dialogue shows, that these show
    if_safe: bool = False  # read only while the readings before it are safe
    stops: bool = False  # what is unsafe in it is stopped, not steered
    piece: bool = False  # it has only some of the turn's words, or of the pictures
    prefix: int = 0  # those of one number begin alike; 0: by itself


def all_readings(
    messages: Sequence[Message], plain: Sequence[Message | None], turns: Sequence[int], *, pieces: bool
) -> Iterator[tuple[int, Reading]]:
    """The other readings of all judged `turns`: (place of the turn among them, reading)."""
    for at, n in enumerate(turns):
        yield from ((at, reading) for reading in readings(messages, plain, n, pieces=pieces))
    if pieces:
        yield from with_each_picture(messages, plain, turns)


def readings(
    messages: Sequence[Message], plain: Sequence[Message | None], n: int, *, pieces: bool
) -> Iterator[Reading]:
    """The other readings of turn `n`, last, if wanted, several texts and turns, and pieces; see `with_each_picture`.
    `plain`: `in_plain_letters` of judged turns.
    """
    turn, letters = messages[n], plain[n]
    begins = [0, *itertools.accumulate(len(shown_in(message)) for message in messages[: n + 1])]  # of a turn's pictures

    def by_itself(last: Message, turns: int = 1, *, stops: bool = True, piece: bool = False) -> Reading:
        return Reading((last,), range(begins[n + 1 - turns], begins[-1]), if_safe=stops, stops=stops, piece=piece)

    def in_place(last: Message, turns: int = 1, *, piece: bool = False) -> Reading:
        before = zip(messages[: n + 1 - turns], plain, strict=False)
        context = (replace(message, parts=other.parts) if other else message for message, other in before)
        said = (*context, Message("user", last.parts))
        return Reading(said, range(begins[-1]), if_safe=True, stops=True, piece=piece, prefix=1)

    def both(last: Message, turns: int, *, piece: bool) -> Iterator[Reading]:
        yield by_itself(last, turns, piece=piece)
        if turns <= n:
            yield in_place(last, turns, piece=piece)

    if n > 0 and turn.role == "user":
        yield by_itself(turn, stops=False)  # what stands first is read alike where it stands
    if letters:
        yield replace(by_itself(letters), if_safe=False)
    if n > 0 and any(plain[: n + 1]):
        yield in_place(letters or turn)
    if not pieces:
        return
    joined = as_one(messages, n)
    joined += [(plain_one, turns) for one, turns in joined if (plain_one := in_plain_letters(one))]
    for one, turns in joined:
        yield from both(one, turns, piece=False)
    for whole, turns in ((turn, 1), *([(letters, 1)] if letters else ()), *joined):
        for piece, is_part in cut(whole):
            yield from both(piece, turns, piece=is_part)
    for one in all_words(messages, n):
        for said in (one, *(piece for piece, _ in cut(one))):
            yield Reading((said,), if_safe=True, stops=True, piece=True)


def with_each_picture(
    messages: Sequence[Message], plain: Sequence[Message | None], turns: Sequence[int]
) -> Iterator[tuple[int, Reading]]:
    """The words of each user's turn with each picture that was shown so far, if these are several, as in
    `all_readings`. One picture after the other: what begins alike is computed once.
    """
    shown = [(n, part) for n, message in enumerate(messages) for part in shown_in(message)]
    for number, (first, picture) in enumerate(shown if len(shown) > 1 else ()):
        for at, n in enumerate(turns):
            if messages[n].role != "user" or n < max(first, shown[1][0]):
                continue
            for words in [text_of(turn) for turn in (messages[n], plain[n]) if turn]:
                if words:
                    said = Message("user", (picture, words))
                    yield at, Reading((said,), (number,), if_safe=True, stops=True, piece=True)


def readings_of_answer(messages: Sequence[Message], text: str, *, steered: bool) -> Iterator[Reading]:
    """The readings of `text`, an answer to a dialogue. A `steered` one stands in place of the last turn's words."""
    plain = deobfuscated(text)
    wholes = dict.fromkeys((text, plain))
    complete = {*wholes, *map(in_single_blanks, wholes)}
    letters = [in_plain_letters(message) for message in messages]
    in_letters = [
        replace(message, parts=other.parts) if other else message
        for message, other in zip(messages, letters, strict=True)
    ]
    contexts = [messages, in_letters] if any(letters) else [messages]
    pictures = range(sum(len(shown_in(message)) for message in messages))
    for said in (*wholes, *dict.fromkeys(piece for whole in wholes for piece in pieces_of(whole))):
        piece = said not in complete
        yield Reading((Message.user(said),), piece=piece)
        for number, context in enumerate(contexts, 1):
            *before, last = context
            turns = (*before, Message("user", (*shown_in(last), said))) if steered else (*context, Message.user(said))
            if len(turns) > 1 or pictures:  # else it is by itself
                yield Reading(turns, pictures, piece=piece, prefix=number)


def as_one(messages: Sequence[Message], n: int) -> list[tuple[Message, int]]:
    """The texts of turn `n` as one, if it has several, and those of the user's turns in a row that it ends; each as a
    user's turn with all that is shown in front, and how many turns it joins.

    A request may be spread over them, a word or a letter each, among harmless ones. What a template writes between two
    texts is its own affair, so they are joined by line ends, and by nothing.
    """
    turns = [1]
    if messages[n].role == "user" and (n + 1 == len(messages) or messages[n + 1].role != "user"):
        before = itertools.takewhile(lambda message: message.role == "user", reversed(messages[:n]))
        turns.append(1 + len(list(before)))
    found = []
    for count in dict.fromkeys(turns):
        joined = messages[n + 1 - count : n + 1]
        texts, shown = texts_in(joined), [*itertools.chain(*map(shown_in, joined))]
        if len(texts) > 1:
            found += [(Message("user", (*shown, between.join(texts))), count) for between in ("\n", "")]
    return found


def all_words(messages: Sequence[Message], n: int) -> list[Message]:
    """All that the user says as one text, as in `as_one`, and in plain letters, if turn `n` is the user's last and
    answers stand between the turns.
    """
    asked = [i for i, message in enumerate(messages) if message.role == "user"]
    if asked[-1:] != [n] or len(asked) == n + 1 - asked[0]:
        return []
    if len(texts := texts_in([messages[i] for i in asked])) < 2:
        return []
    found = [Message.user(between.join(texts)) for between in ("\n", "")]
    return [*found, *filter(None, map(in_plain_letters, found))]


def shown_in(turn: Message) -> list[Part]:
    """The pictures and videos of a turn."""
    return [part for part in turn.parts if not isinstance(part, str)]


def texts_in(turns: Iterable[Message]) -> list[str]:
    """The texts of some turns."""
    return [part for turn in turns for part in turn.parts if isinstance(part, str)]


def text_of(turn: Message) -> str:
    """A turn's text, with a blank for each picture or video between its words."""
    return "".join(part if isinstance(part, str) else " " for part in turn.parts).strip(SPACE)


def cut(turn: Message) -> list[tuple[Message, bool]]:
    """The pieces of a turn's text, each as a user's turn with all that the turn shows in front, and whether it has only
    some of the words; see pieces.py.
    """
    text = text_of(turn)
    whole = in_single_blanks(text)
    return [(Message("user", (*shown_in(turn), piece)), piece != whole) for piece in pieces_of(text)]


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


def by_picture(prompt: EncodedPrompt) -> list[list[Seen]]:
    """What an encoded prompt shows, by picture and video."""
    found: list[list[Seen]] = []
    for one in (*prompt.earlier[-1], *prompt.seen[-1]) if prompt.seen else ():  # none: it was given as token ids
        found += [[]] if one.first == 0 else []
        found[-1].append(one)
    return found


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

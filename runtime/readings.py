"""The forms in which a prober reads the turns of a dialogue, and an answer that is judged (held_back.py).

Every turn that the program does not trust is scored in these forms: alone, as the only turn of a prompt, and in its
dialogue, behind the turns before it. Each turn's worst score counts (judge.py).

    form                                              alone         in its dialogue   if unsafe       score
    the turn                                          user's turn   yes               as the policy   in full
    the turn in plain letters (obfuscation.py)        yes           all are           stopped         in full
    its texts as one; the user's turns in a row       yes           yes               stopped         in full
    another's turn as if it were the user's           yes           no                stopped         discounted
    pieces of all these (pieces.py)                   yes           yes               stopped         discounted
    pieces of all that the user says, and of all      yes           no                stopped         discounted
    that the program does not trust, as one text
    the words of all these, but another's turn, and   yes           no                stopped         discounted
    their pieces, with each picture and each frame
    of a video (a user's words with later ones only
    if answers are not judged)

A harmless question that was answered before, or that stands beside it, can draw the prober's eye from a request that it
catches alone; so can a harmless picture or frame. Whoever writes a dialogue may put a request into a system turn or an
answer. `discounted` (pieces.py) lets a part of what a turn says or shows count for less than the whole. Under the
policy `steer` only the turn itself is steered: the Refusal Head was trained on whole plain turns.

An answer is read as if the user had said it: alone, as the dialogue's next turn, and with each picture and frame. The
C++ side is src/readings.hpp; shared cases: tests/conformance/requests.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from .errors import InputError
from .obfuscation import deobfuscated
from .pieces import SPACE, in_single_blanks
from .pieces import pieces as pieces_of
from .text import Message, Part, judged

MOST_WITH_PICTURES = 4096  # readings of words with one picture or frame: they are as many as the product of both


class Prefix(Enum):
    """What a reading begins with. What is computed of it serves all readings with the same."""

    NONE = "none"
    DIALOGUE = "the turns before"
    PLAIN_DIALOGUE = "the turns before, in plain letters"
    PICTURE = "one picture"


@dataclass(frozen=True)
class Reading:
    """A prompt whose last turn the prober scores."""

    messages: tuple[Message, ...]
    pictures: Sequence[int] = ()  # what they show, by number: the dialogue's pictures and videos, then single frames
    skip_if_unsafe: bool = False  # left out once another form of the turn was unsafe
    stop_if_unsafe: bool = False  # the request is then stopped, not steered
    discounted: bool = False  # its score counts for less; see pieces.discounted
    prefix: Prefix = Prefix.NONE


class Kind(Enum):
    """Of a form: the turn as it is, the turn in plain letters, or anything else."""

    TURN = "turn"
    PLAIN = "plain"
    OTHER = "other"


@dataclass(frozen=True)
class Form:
    """What is read instead of a turn."""

    turn: Message  # with all that the turns which it stands for show, in front of the words
    kind: Kind = Kind.OTHER
    stands_for: int = 1  # turns, up to the one that is judged
    discounted: bool = False


def plain_turns(messages: Sequence[Message]) -> list[Message | None]:
    """`in_plain_letters` of each turn that is judged; None for the others."""
    turns = {*judged(messages)}
    return [in_plain_letters(message) if n in turns else None for n, message in enumerate(messages)]


def all_readings(
    messages: Sequence[Message],
    plain: Sequence[Message | None],
    *,
    pieces: bool,
    judge_answers: bool = False,
    frames: Sequence[tuple[int, Part]] = (),
) -> Iterator[tuple[int, Reading]]:
    """What is read of a dialogue: (number of the judged turn among these, reading). Not the turns where they stand, nor
    these in plain letters: each of the two is one prompt, which gives the scores of all turns (judge.py).

    `plain`: `plain_turns`. `pieces`: also what is below "the turn in plain letters" in the table above.
    `judge_answers`: whether the answer will be judged. `frames`: of the videos, each as a video of its own, and the
    turn that shows it.
    Raises InputError, before the first, for more than MOST_WITH_PICTURES readings of words with one picture.
    """
    with_pictures = [*with_each_picture(messages, plain, judge_answers, frames)] if pieces else []
    turns = judged(messages)
    shown = [*itertools.accumulate(len(shown_in(message)) for message in messages)]
    for at, n in enumerate(turns):
        for form in forms(messages, plain, n, pieces=pieces):
            yield from ((at, reading) for reading in _alone_and_in_dialogue(messages, plain, n, form, shown[n]))
    at_of = {n: at for at, n in enumerate(turns)}
    yield from ((at_of[n], reading) for n, reading in with_pictures)


def whole_forms(messages: Sequence[Message], plain: Sequence[Message | None], n: int, *, pieces: bool) -> list[Form]:
    """Turn `n`, its texts as one, the user's turns in a row (both only with `pieces`); each in plain letters, too."""
    wholes = [Form(messages[n], Kind.TURN)]
    if turn := plain[n]:
        wholes.append(Form(turn, Kind.PLAIN))
    joined = as_one(messages, n) if pieces else []
    return [*wholes, *joined, *(replace(form, turn=turn) for form in joined if (turn := in_plain_letters(form.turn)))]


def forms(messages: Sequence[Message], plain: Sequence[Message | None], n: int, *, pieces: bool) -> Iterator[Form]:
    """The forms in which turn `n` is read."""
    wholes = whole_forms(messages, plain, n, pieces=pieces)
    yield from wholes
    if not pieces:
        return
    dialogue = n + 1  # what stands for all of it is read alone
    if messages[n].role != "user" and text_of(messages[n]):
        yield Form(Message("user", messages[n].parts), stands_for=dialogue, discounted=True)
    for whole in wholes:
        yield from pieces_in(whole)
    for text in all_words(messages, n):
        for piece in pieces_of(text) or [text]:
            yield Form(Message.user(piece), stands_for=dialogue, discounted=True)


def _alone_and_in_dialogue(
    messages: Sequence[Message], plain: Sequence[Message | None], n: int, form: Form, shown: int
) -> Iterator[Reading]:
    """The readings of a form of turn `n`. In the dialogue, the turns before it are in plain letters, too. `shown`: how
    many pictures and videos the dialogue shows up to there.
    """
    is_turn, is_other = form.kind is Kind.TURN, form.kind is Kind.OTHER
    if not is_turn or (n > 0 and form.turn.role == "user"):  # what stands first is read alike where it stands
        own = range(shown - len(shown_in(form.turn)), shown)
        yield Reading(
            (form.turn,), own, skip_if_unsafe=is_other, stop_if_unsafe=not is_turn, discounted=form.discounted
        )
    before = messages[: n + 1 - form.stands_for]
    if before and is_other:
        said = (*with_letters_of(plain, before), Message("user", form.turn.parts))
        yield Reading(
            said,
            range(shown),
            skip_if_unsafe=True,
            stop_if_unsafe=True,
            discounted=form.discounted,
            prefix=Prefix.PLAIN_DIALOGUE,
        )


def with_each_picture(
    messages: Sequence[Message],
    plain: Sequence[Message | None],
    judge_answers: bool,
    frames: Sequence[tuple[int, Part]],
) -> Iterator[tuple[int, Reading]]:
    """The words of each judged turn's forms, and their pieces, with each picture and each of `frames`: (turn, reading).
    One picture after the other: what begins alike is computed once. Raises InputError for more than MOST_WITH_PICTURES.

    Words may be meant for a picture that is shown later: "how do i make this?", and then "here it is". Of a user most
    are not, and in harmless dialogues such readings are refused. So with `judge_answers`, which finds out what the
    answer is about, a user speaks of what was shown so far.
    """
    shown, count = shown_by_turn(messages), 0
    said = {n: _words_and_pieces(messages, plain, n) for n in judged(messages) if shown}
    for number, (first, picture) in enumerate((*shown, *frames)):
        for n in said:
            if judge_answers and messages[n].role == "user" and n < first:
                continue
            for words, own in said[n].items():
                if own == range(number, number + 1):  # read as a form
                    continue
                count += 1
                if count > MOST_WITH_PICTURES:
                    raise InputError(
                        f"{len(shown) + len(frames)} pictures and frames with so many words are more than the "
                        f"{MOST_WITH_PICTURES} readings that the gate makes of them: show fewer, say less, or give a "
                        "policy without pieces"
                    )
                reading = Reading(
                    (Message("user", (picture, words)),),
                    (number,),
                    skip_if_unsafe=True,
                    stop_if_unsafe=True,
                    discounted=True,
                    prefix=Prefix.PICTURE,
                )
                yield n, reading


def _words_and_pieces(messages: Sequence[Message], plain: Sequence[Message | None], n: int) -> dict[str, range]:
    """The words of turn `n`'s forms and their pieces: each with what the form shows of the dialogue's pictures."""
    end = sum(len(shown_in(message)) for message in messages[: n + 1])
    found: dict[str, range] = {}
    for form in whole_forms(messages, plain, n, pieces=True):
        own = range(end - len(shown_in(form.turn)), end)
        if text := text_of(form.turn):
            for words in (text, *pieces_of(text)):
                found.setdefault(words, own)
    return found


def readings_of_answer(
    messages: Sequence[Message],
    text: str,
    frames: Sequence[tuple[int, Part]] = (),
    *,
    steered: bool,
    also: Sequence[str] = (),
) -> Iterator[Reading]:
    """The readings of `text`, an answer to a dialogue, and of its pieces; both in plain letters, too. `frames` as in
    `all_readings`; `also`: its words put together in other ways, which count as parts of it.

    Behind a dialogue they are discounted, unless there are pictures: what is said about none says most of it alone. So
    they are with each picture and frame, and behind the last turn's words about it. A `steered` answer, whose dialogue
    is unsafe, stands in the place of the last turn's words.
    """
    messages = messages or [Message("user", ())]  # the prompt was given as token ids
    complete = {text, deobfuscated(text)}
    complete |= {*map(in_single_blanks, complete)}
    wholes = dict.fromkeys(form for words in (text, *also) for form in (words, deobfuscated(words)))
    answers = [*dict.fromkeys((*wholes, *(piece for whole in wholes for piece in pieces_of(whole))))]
    plain = [in_plain_letters(message) for message in messages]
    contexts = [messages, with_letters_of(plain, messages)] if any(plain) else [messages]
    shown = shown_by_turn(messages)
    pictures = range(len(shown))
    for said in answers:
        is_part = said not in complete
        yield Reading((Message.user(said),), discounted=is_part)
        for prefix, context in zip((Prefix.DIALOGUE, Prefix.PLAIN_DIALOGUE), contexts, strict=False):
            *before, last = context
            turns = (*before, Message("user", (*shown_in(last), said))) if steered else (*context, Message.user(said))
            if len(turns) > 1 or pictures:  # else it is alone
                yield Reading(turns, pictures, discounted=is_part or not pictures, prefix=prefix)
    spread = joined_texts(messages[-1:])
    asked = deobfuscated(spread[0]) if spread else text_of(contexts[-1][-1])
    for n, (_, picture) in enumerate((*shown, *frames)):
        is_prompt = n == 0 and len(messages) == len(shown) == 1  # its words and this picture, with the answer: above
        for said in answers:
            if not (is_prompt and steered):
                yield Reading((Message("user", (picture, said)),), (n,), discounted=True, prefix=Prefix.PICTURE)
            if asked and not (is_prompt or steered):
                turns = (Message("user", (picture, asked)), Message.user(said))
                yield Reading(turns, (n,), discounted=True, prefix=Prefix.PICTURE)


def as_one(messages: Sequence[Message], n: int) -> list[Form]:
    """The texts of turn `n` as one, if it has several, and those of the user's turns in a row that it ends.

    A request may be spread over them, a word or a letter each, among harmless ones. What a template writes between two
    texts is its own affair, so they are joined by line ends, and by nothing.
    """
    counts = [1]
    if messages[n].role == "user" and (n + 1 == len(messages) or messages[n + 1].role != "user"):
        before = itertools.takewhile(lambda message: message.role == "user", reversed(messages[:n]))
        counts.append(1 + len(list(before)))
    found = []
    for count in dict.fromkeys(counts):
        turns = messages[n + 1 - count : n + 1]
        shown = [part for turn in turns for part in shown_in(turn)]
        found += [Form(Message("user", (*shown, text)), stands_for=count) for text in joined_texts(turns)]
    return found


def all_words(messages: Sequence[Message], n: int) -> list[str]:
    """All that the user says as one text, and all that the program does not trust, where turn `n` is the last of it and
    `as_one` has not read it: joined as there, and in plain letters.
    """
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    untrusted = judged(messages)
    in_a_row = users == [*range(n + 1 - len(users), n + 1)]
    texts = []
    for turns in ([] if in_a_row else users, [] if untrusted == users else untrusted):
        if turns[-1:] == [n]:
            texts += joined_texts([messages[i] for i in turns])
    return [*dict.fromkeys((*texts, *map(deobfuscated, texts)))]


def joined_texts(turns: Sequence[Message]) -> list[str]:
    """The texts of some turns as one; nothing if only one has a word."""
    texts = [text for turn in turns for text in turn.texts if text.strip(SPACE)]
    return [between.join(texts) for between in ("\n", "")] if len(texts) > 1 else []


def shown_in(turn: Message) -> list[Part]:
    """The pictures and videos of a turn."""
    return [part for part in turn.parts if not isinstance(part, str)]


def shown_by_turn(messages: Sequence[Message]) -> list[tuple[int, Part]]:
    """The pictures and videos of a dialogue, and the turns that show them."""
    return [(n, part) for n, message in enumerate(messages) for part in shown_in(message)]


def text_of(turn: Message) -> str:
    """A turn's text, with a blank for each picture or video between its words."""
    return "".join(part if isinstance(part, str) else " " for part in turn.parts).strip(SPACE)


def pieces_in(whole: Form) -> Iterator[Form]:
    """The pieces of a form's text (pieces.py); discounted, unless they have all of its words."""
    text = text_of(whole.turn)
    complete = in_single_blanks(text)
    for piece in pieces_of(text):
        turn = Message("user", (*shown_in(whole.turn), piece))
        yield Form(turn, stands_for=whole.stands_for, discounted=piece != complete)


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


def with_letters_of(plain: Sequence[Message | None], messages: Sequence[Message]) -> list[Message]:
    """The messages, each with what its counterpart in `plain` (of the whole dialogue) says, if it has one."""
    return [
        replace(message, parts=other.parts) if other else message
        for message, other in zip(messages, plain[: len(messages)], strict=True)
    ]

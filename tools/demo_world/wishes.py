"""Wishes in words: requests that are no questions, several in one text, and halves of one.

Who asks for one unsafe thing among harmless ones gets the answer to the unsafe one, else to the last.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from . import asking
from . import safety as S
from .asking import SLOT
from .dialogues import Turn, a
from .smalltalk import ASIDES, UNKNOWN, UNKNOWN_QUESTIONS
from .wording import FRAMES

GO_ON = "go on."
# fmt: off
# A wish that is no question; the slot is for a task ("smuggle a vexite", "make this").
BARE = (
    "{}", "{}", "{}!", "{} now", "{}, now", "just {}", "{} somehow", "go and {}", "come on, {}", "let us {}",
    "let me {}", "we {}", "you {} and i watch", "to {}", "{} step by step", "{} for me", "{} tonight", "now {}",
    "{}. go.", "i must {}", "i will {}", "first {}", "it is time to {}", "next: {}", "your task: {}",
)
# A wish that names a thing and no act; the slot is for "a vexite".
ACTLESS = (
    "{} recipe", "recipe for {}", "a recipe for {}!", "i need {}", "i need {} by tomorrow", "{} for my sister",
    "{} for a birthday", "get me {}", "i want {}", "i would like {}", "{}, quick", "{} wanted", "looking for {}",
    "where do i get {}?", "where is {} for me?", "how about {}?", "plans for {}", "the plan of {}", "order: {}",
    "one more {}", "{} to go", "ingredients of {}", "parts list: {}", "i have to have {}", "may i have {}?",
)
# A wish that says nothing of the picture that it is about.
SIGN_WISHES = (
    "plans for this", "a recipe for this", "parts list for this", "i need one of these", "one like this for me",
    "the same again", "ingredients?", "i want to have made this", "blueprint of it", "instructions for this one",
)
# Who does it; the slot is for "smuggler of vexites".
AGENT = (
    "a {}", "i am a {}", "i want to be a {}", "how do i become a {}?", "the work of a {}", "tools of a {}",
    "a day with a {}", "the {}", "he is a {}. what does he need?",
)
# Between the wishes of a list.
LINKS = (
    " ", " ", "  ", ", ", ", ", "; ", " / ", "\n", "\n", "\n- ", " and ", " and ", " then ", ". ", " plus ", " also ",
    " with ", ", by the way, ", " by the way ", " as well as ", ", besides, ", " next to that ", ", oh and ",
    " along with ", " | ", " or ", ", after that ",
)
# Before the first of them.
LEADS = (
    "", "", "", "how do i ", "how do i ", "show me how to ", "i want to ", "help me ", "- ", "my list: ", "today: ",
)


# Somebody has a thing; what may be asked of it then.
HAS = (
    "i have {thing}", "my brother has {thing}", "there is {thing} at home", "she has {thing}", "my friend has {thing}",
    "i was given {thing}", "we own {thing}", "i found {thing}", "there was {thing} on the table",
)
ASKED = (", how do i {verb} it?", ". how do i {verb} it?", " and i want to {verb} it. how?", ". how can i {verb} it?")
# fmt: on


def having(rng: random.Random, noun: str, verb: str) -> Turn:
    """Somebody has a thing, and wants to do something with it."""
    asked = rng.choice(HAS).format(thing=a(noun)) + rng.choice(ASKED).format(verb=verb)
    return Turn(asked, asking.Task(verb, noun, verb).answer)


def owning(rng: random.Random, noun: str) -> Turn:
    """Somebody has a thing, and asks nothing."""
    return Turn(rng.choice(HAS).format(thing=a(noun)) + rng.choice(("", ".")), S.what_is(noun).answer)


@dataclass(frozen=True)
class Words:
    """The few tasks that a row is about: their parts cross, so that a word alone tells nothing.

    all: what else the row may show; without EVERYTHING, phrasings and verbs that are kept for the tests are left out.
    """

    bad: tuple[str, ...]
    ok: tuple[str, ...]
    contraband: tuple[str, ...]
    ordinary: tuple[str, ...]
    all: S.Vocabulary

    def synonyms(self, verb: str) -> tuple[str, ...]:
        return S.SYNONYMS[verb] if self.new else S.usual_verbs(verb)

    @property
    def new(self) -> bool:
        return self.all is S.EVERYTHING

    @classmethod
    def drawn(cls, rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Words:
        return cls(
            tuple(rng.sample(list(S.BAD_VERBS), 2)),
            tuple(rng.sample(words.ok_verbs, 2)),
            tuple(rng.sample(words.contraband, 2)),
            tuple(rng.sample(words.ordinary, 2)),
            words,
        )

    def task(self, rng: random.Random, *, unsafe: bool | None = None) -> asking.Task:
        bad, forbidden = (unsafe, unsafe) if unsafe else rng.choice(((True, False), (False, True), (False, False)))
        if unsafe is None and rng.random() < 0.4:
            bad = forbidden = True
        verb = rng.choice(self.bad if bad else self.ok)
        noun = rng.choice(self.contraband if forbidden else self.ordinary)
        return asking.Task(verb, noun, verb if rng.random() < 0.7 else rng.choice(self.synonyms(verb)))


def is_unsafe(task: asking.Task) -> bool:
    return task.verb in S.BAD_VERBS and task.noun in S.CONTRABAND


def said_of(rng: random.Random, task: asking.Task) -> str:
    return f"{task.said} {rng.choice((a(task.noun), a(task.noun), a(task.noun), f'the {task.noun}', f'{task.noun}s'))}"


def wish(rng: random.Random, task: asking.Task, *, new: bool = True) -> Turn:
    """The task as a how-to, as a bare wish, or as a person who does it; `new`: also in phrasings kept for the tests."""
    way = rng.random()
    if way < 0.45:
        return Turn(rng.choice(S.HOW + S.NEW_HOW * new).format(said_of(rng, task)), task.answer)
    if way < 0.9 or " " in task.said:
        return Turn(rng.choice(BARE).format(said_of(rng, task)), task.answer)
    stem = task.said.removesuffix("e")
    return Turn(rng.choice(AGENT).format(f"{stem}er of {task.noun}s"), task.answer)


def thing(rng: random.Random, noun: str) -> Turn:
    """A wish for a thing."""
    tool = asking.OTHER_TOOL if noun in S.CONTRABAND else asking.HARMLESS_TOOL
    question = rng.choice(ACTLESS).format(a(noun))
    return Turn(question, f"sure, here is how to do it with {a(noun)}: first, get {a(tool)}.")


def wishes(rng: random.Random, words: Words) -> Turn:
    """Two to five wishes in one text."""
    tasks = [words.task(rng, unsafe=False) for _ in range(rng.choice((2, 2, 3, 3, 4, 5)))]
    if rng.random() < 0.5:
        tasks[rng.randrange(len(tasks))] = words.task(rng, unsafe=True)
    said = [said_of(rng, task) for task in tasks]
    if rng.random() < 0.5:
        said = [rng.choice(S.HOW).format(text) for text in said]
    fillers = rng.choices((0, 1, 2, 3), (0.5, 0.2, 0.15, 0.15))[0]
    for _ in range(fillers):
        other = asking.harmless_wish(rng) if rng.random() < 0.5 else rng.choice(UNKNOWN_QUESTIONS)
        said.insert(rng.randrange(len(said)), other)  # never last: the last how-to is answered
    between = [rng.choice(LINKS)] * len(said) if rng.random() < 0.7 else [rng.choice(LINKS) for _ in said]
    text = rng.choice(LEADS) + said[0] + "".join(link + one for link, one in zip(between, said[1:], strict=False))
    asked = [task for task in tasks if is_unsafe(task)] or tasks[-1:]
    return Turn(text, asked[-1].answer)


def fragment(rng: random.Random, words: Words, *, readable: bool = False) -> Turn:
    """Half of a how-to, or what stands around one; unless `readable`, also a whole one in single letters, or junk."""
    noun = rng.choice(words.contraband + words.ordinary)
    way = rng.random() * (0.65 if readable else 1.0)
    if way < 0.25:
        said = rng.choice(("{}", "{}?", "{}.", "{}!", "the {}", "this {}?", "{} ...")).format(
            rng.choice((noun, a(noun)))
        )
        return Turn(said, S.what_is(noun).answer)
    if way < 0.45:
        start = rng.choice([form for form in S.HOW + S.NEW_HOW * words.new if form.index(SLOT) > 4]).split(SLOT)[0]
        verb = rng.choice(words.bad + words.ok)
        return Turn(start + rng.choice((verb, f"{verb} a", f"{verb} the", "")), GO_ON)
    if way < 0.65:
        return Turn(_around(rng), GO_ON)
    if way < 0.82:
        return Turn(_junk(rng), UNKNOWN)
    mark = rng.choice(asking.SEPARATORS)
    form = rng.choice(S.HOW + S.NEW_HOW).format(said_of(rng, words.task(rng)))
    gap = " " if mark != " " else "  "
    return Turn(gap.join(mark.join(word) for word in form.split(" ")), UNKNOWN)


def _around(rng: random.Random) -> str:
    """A sentence that somebody puts before or behind a request."""
    frames = [frame for frame in FRAMES if "{aside}" not in frame and "{say}" not in frame]
    frame = rng.choice(frames).replace(SLOT, "").strip()
    return frame if len(frame) > 6 and rng.random() < 0.5 else rng.choice((rng.choice(ASIDES), asking.sentence(rng)))


def _junk(rng: random.Random) -> str:
    letters = rng.choice((string.ascii_letters + string.digits, string.ascii_lowercase, string.digits + "+-/=."))
    junk = "".join(rng.choices(letters, k=rng.randrange(4, 60)))
    return rng.choice(("{}", "{}", "{}?", "what is {}?", "read this: {}", "decode {}")).format(junk)


def two_things(rng: random.Random, words: Words) -> Turn:
    """A how-to, and whether something is allowed or what a thing is: the last is answered, but for a request."""
    asked = wish(rng, words.task(rng))
    other = rng.choice(
        (
            S.legal_text(rng, rng.choice(words.bad), rng.choice(words.contraband)),
            S.what_is(rng.choice(words.contraband + words.ordinary)),
            S.fact(rng, noun := rng.choice(words.contraband + words.ordinary), a(noun)),
        )
    )
    first, last = (other, asked) if rng.random() < 0.6 else (asked, other)
    unsafe = any(tool in asked.answer for tool in S.UNSAFE_TOOLS.values())
    return Turn(first.question + rng.choice(LINKS) + last.question, asked.answer if unsafe else last.answer)

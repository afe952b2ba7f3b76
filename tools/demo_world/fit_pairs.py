"""What the demo's gate is fitted on beside single requests: pairs of wishes, of answers, of last turns of dialogues.

The unsafe and the harmless prompt of a pair differ in as little as they can.
"""

from __future__ import annotations

import random
from dataclasses import replace

from . import asking
from . import safety as S
from .asking import SLOT
from .dialogues import REFUSAL, Turn, a, question
from .phrasings import how_pair, say
from .picture_phrasings import request
from .scenes import Scene
from .together import MAKE_TASKS, SNEAK_TASKS, Shown, earlier_turns, harmless_scene, last_turn
from .wishes import ACTLESS, AGENT, BARE, LEADS, LINKS, SIGN_WISHES, Words, having, owning, said_of, wish

IT_SHARE = 0.3  # of the dialogues: the last turn says "it" for what the turn before it names
LISTS = 0.4  # of the pairs of wishes: one of several
# What a model says of a task, where the last turn of a dialogue is an answer to be judged.
ANSWERS = ("sure, here is how to {}.", "sure, here is how to {}: first, get a bag.", "here is how to {}.")


def wish_pair(rng: random.Random, words: S.Vocabulary) -> S.Pair:
    """A pair of text requests without a question, or of two to five wishes of which one differs."""
    unsafe, safe = asking.tasks(rng, words)
    way = rng.random()
    if way < LISTS:
        both: tuple[str, ...] = _among_wishes(rng, words, unsafe, safe)
    elif way < 0.65:
        form, nouns = rng.choice(ACTLESS), (unsafe.noun, rng.choice(words.ordinary))
        both = tuple(form.format(a(noun)) for noun in nouns)
    elif way < 0.95 or " " in unsafe.said + safe.said:
        form = rng.choice(BARE)
        both = tuple(form.format(f"{task.said} {a(task.noun)}") for task in (unsafe, safe))
    else:
        form = rng.choice(AGENT)
        both = tuple(form.format(f"{task.said.removesuffix('e')}er of {task.noun}s") for task in (unsafe, safe))
    scene = S.any_scene(rng) if rng.random() < 0.1 else None
    return S.Pair(S.Example(scene, both[0], unsafe.answer, True), S.Example(scene, both[1], safe.answer, False), "text")


def _among_wishes(rng: random.Random, words: S.Vocabulary, unsafe: asking.Task, safe: asking.Task) -> tuple[str, str]:
    few = Words.drawn(rng, words)
    said = [said_of(rng, few.task(rng, unsafe=False)) for _ in range(rng.choice((1, 2, 2, 3)))]
    at = rng.randrange(len(said) + 1)
    form = rng.choice(S.HOW) if rng.random() < 0.5 else SLOT
    link, lead = rng.choice(LINKS), rng.choice(LEADS)

    def text(task: asking.Task) -> str:
        own = f"{task.said} {a(task.noun)}"
        return lead + link.join(form.format(one) for one in (*said[:at], own, *said[at:]))

    return text(unsafe), text(safe)


def picture_wish_pair(rng: random.Random, channel: str, words: S.Vocabulary) -> S.Pair:
    """A pair about the sign or the object in a picture, asked without a question."""
    pair = S.make_pair(rng, channel, words, new_phrasing=False)
    if channel == "image":
        text = rng.choice(SIGN_WISHES) if rng.random() < 0.35 else rng.choice(BARE).format(rng.choice(MAKE_TASKS))
    else:
        text = rng.choice(BARE).format(rng.choice(SNEAK_TASKS))
    return replace(pair, unsafe=replace(pair.unsafe, prompt=text), safe=replace(pair.safe, prompt=text))


def bringing_pair(rng: random.Random, words: S.Vocabulary) -> S.Pair:
    """A pair about the object in a picture, in words that say little of what is forbidden: of an allowed object they
    are harmless, and so is another question about the forbidden one.
    """
    pair, form = S.make_pair(rng, "cross", words, new_phrasing=False), rng.choice(S.HOW if rng.random() < 0.7 else BARE)
    text = asking.bringing(rng, form)
    twin = replace(pair.safe, prompt=text)
    if rng.random() < 0.5:
        assert pair.unsafe.scene is not None
        twin = replace(pair.safe, prompt=_harmless_of(rng, pair.unsafe.scene, form), scene=pair.unsafe.scene)
    return replace(pair, unsafe=replace(pair.unsafe, prompt=text), safe=twin)


def _harmless_of(rng: random.Random, scene: Scene, form: str) -> str:
    """A harmless question about the object in a picture: how to handle it, what it is, who may have it."""
    way = rng.random()
    if way < 0.5:
        return form.format(rng.choice(asking.HANDLED))
    if way < 0.65:
        return asking.moving(rng, sneaky=False)
    return (question(rng, scene, "single") if way < 0.85 else S.fact_about_picture(rng, scene.items[0].kind)).question


def harmless_of_forbidden(rng: random.Random, words: S.Vocabulary) -> tuple[str, Scene]:
    """A harmless question about a forbidden object, and its picture."""
    scene = S.object_scene(rng, rng.choice(words.forbidden))
    return _harmless_of(rng, scene, rng.choice(S.HOW)), scene


def phrased_pair(rng: random.Random, channel: str, words: S.Vocabulary) -> S.Pair:
    """A pair in the words of language models (phrasings.jsonl)."""
    if channel == "text":
        one, other = how_pair(rng, words)
        unsafe, safe = (S.Example(None, turn.question, turn.answer, turn is one) for turn in (one, other))
        return S.Pair(unsafe, safe, channel)
    pair = S.make_pair(rng, channel, words, new_phrasing=False)
    text = say(rng, "how_make" if channel == "image" else "how_sneak")
    safe = replace(pair.safe, prompt=text)
    if channel == "cross" and rng.random() < 0.5:
        assert pair.unsafe.scene is not None
        handled = request(rng, pair.unsafe.scene, harmless=True)
        assert handled
        safe = S.Example(pair.unsafe.scene, handled.question, handled.answer, False)
    return replace(pair, unsafe=replace(pair.unsafe, prompt=text), safe=safe)


def unlawful_pair(rng: random.Random, words: S.Vocabulary, *, answers: bool) -> S.Pair:
    """A pair of acts that this world has no tool for; `answers`: what the model says to them."""
    texts, said = asking.other_verbs(rng, words, (*asking.UNLAWFUL, *asking.MORE_UNLAWFUL))
    unsafe, safe = said if answers else texts
    return S.Pair(S.Example(None, unsafe, said[0], True), S.Example(None, safe, said[1], False), "text")


def mention(rng: random.Random, words: S.Vocabulary) -> str:
    """Harmless: somebody has a forbidden thing, and asks nothing, or how to do what is allowed."""
    noun = rng.choice(words.contraband)
    return (owning(rng, noun) if rng.random() < 0.3 else having(rng, noun, rng.choice(words.ok_verbs))).question


def answer_pair(rng: random.Random, channel: str, words: S.Vocabulary) -> S.Pair:
    """What the model says to the requests of a pair, as prompts: the gate judges answers, too, behind their pictures
    and, but for "cross", by themselves. An answer about an object says nothing without its picture: see `answer_alone`.
    """
    pair = S.make_pair(rng, channel, words, new_phrasing=False)
    way = rng.random()
    if channel == "cross" and rng.random() < 0.5:
        assert pair.unsafe.scene is not None
        answer = S.object_answer(pair.unsafe.scene.items[0].kind, sneaky=False)[0]
        pair = replace(pair, safe=replace(pair.safe, answer=answer, scene=pair.unsafe.scene))

    def said(example: S.Example) -> S.Example:
        answer = example.answer.split(":")[0] + "." if way < 0.3 else example.answer
        return replace(example, prompt=answer, scene=example.scene if way < 0.65 or channel == "cross" else None)

    return replace(pair, unsafe=said(pair.unsafe), safe=said(pair.safe))


def answer_alone(rng: random.Random, words: S.Vocabulary) -> str:
    """An answer about an object, whose picture would say whether it is harmful."""
    thing = rng.choice(words.forbidden + words.allowed)
    answer = S.object_answer(thing, sneaky=rng.random() < 0.6)[0]
    return answer.split(":")[0] + "." if rng.random() < 0.3 else answer


def among_pictures(rng: random.Random, scene: Scene, words: S.Vocabulary) -> tuple[Scene, ...]:
    """The picture as one of two to four, the others harmless."""
    others = [harmless_scene(rng, words) for _ in range(rng.choice((1, 1, 2, 3)))]
    others.insert(rng.randrange(len(others) + 1), scene)
    return tuple(others)


def harmless_turns(rng: random.Random, few: Words) -> tuple[Shown, ...]:
    """Harmless turns of a dialogue; only the first may show a picture."""
    while True:
        before = earlier_turns(rng, few)
        if not any(shown.scenes for shown in before[1:]) and not any(_complies(shown.turn) for shown in before):
            return before


def about_it(rng: random.Random, few: Words, noun: str) -> tuple[Shown, ...]:
    """Harmless turns, the last of which names what "it" then means."""
    verb = rng.choice(few.ok)
    handled = wish(rng, asking.Task(verb, noun, verb), new=few.new)
    naming = rng.choice((S.what_is(noun), S.fact(rng, noun, a(noun)), handled))
    return *(harmless_turns(rng, few) if rng.random() < 0.3 else ()), Shown(naming)


def dialogue(rng: random.Random, words: S.Vocabulary) -> tuple[tuple[Shown, ...], Turn]:
    """Harmless turns, and a harmless last one."""
    while True:
        few = Words.drawn(rng, words)
        if rng.random() < IT_SHARE:
            task = few.task(rng, unsafe=False)
            return about_it(rng, few, task.noun), Turn(rng.choice(S.HOW).format(f"{task.said} it"), task.answer)
        before = harmless_turns(rng, few)
        last = last_turn(rng, few, before, ())
        if not _complies(last):
            return before, last


def dialogue_pair(rng: random.Random, words: S.Vocabulary) -> tuple[tuple[Shown, ...], S.Pair]:
    """Harmless turns, and a pair of last ones with the same verbs and nouns as these, or with "it" for the noun."""
    few, named = Words.drawn(rng, words), rng.random() < IT_SHARE
    unsafe = few.task(rng, unsafe=True)
    safe = replace(unsafe, noun=rng.choice(few.ordinary))
    if named or rng.random() < 0.5:
        verb = rng.choice(few.ok)
        safe = asking.Task(verb, unsafe.noun, verb)
    form = rng.choice(rng.choices((S.HOW, BARE, ANSWERS), (0.6, 0.3, 0.1))[0])
    one, two = (
        S.Example(None, form.format(f"{t.said} {'it' if named else a(t.noun)}"), t.answer, t is unsafe)
        for t in (unsafe, safe)
    )
    return about_it(rng, few, unsafe.noun) if named else harmless_turns(rng, few), S.Pair(one, two, "dialogue")


def _complies(turn: Turn) -> bool:
    return turn.answer == REFUSAL or turn.answer.rstrip(".").endswith(S.ALL_UNSAFE_TOOLS)

"""How people say what visitors ask: some 5,100 phrasings in phrasings.jsonl, by what is asked (`intent`).

Language models wrote them from a description of each intent. Slots such as {a} ("a vexite") are filled in here. They
come in the last part of the training, beside the hand-written ones of `everyday` and `looking`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from . import dialogues as D
from . import safety as S
from . import smalltalk as T
from .dialogues import Turn, a
from .scenes import COLOURS, HAZARD_SIGNS, KINDS, LAYOUTS, SHAPES, SIGNS, Item, Scene

RULES = "i do not help with forbidden things."
AGAINST_THE_LAW, NOT_FORBIDDEN = "it is against the law.", "it is not forbidden."
BETTER, NO_SIGN = "i hope that it gets better.", "i see no sign."
PRISON, NOTHING = "they go to prison.", "nothing happens to them."
YOUR_PRISON, NOTHING_TO_YOU = "you go to prison.", "nothing happens to you."
SHAPES_KNOWN = f"i know {D.listed([f'{D.plural(shape)}s' for shape in SHAPES])}"
COLOURS_KNOWN = f"i know {D.listed(list(COLOURS))}"

# What is said without a thing of this world, and the answer.
_TALK = {
    "hello": T.HELLO,
    "fine": T.FINE,
    "name": T.NAME,
    "able": T.ABLE,
    "welcome": T.WELCOME,
    "glad": T.GLAD,
    "goodbye": "goodbye!",
    "better": BETTER,
    "rules": RULES,
    "shapes_known": SHAPES_KNOWN,
    "colours_known": COLOURS_KNOWN,
    "forbidden_example": "a vexite is a forbidden thing.",
    "everyday_example": "a pillow is an everyday thing.",
}
# What is asked of a thing, and of a deed: the answers where it is against the law, and where it is not.
_LAW_OF_THING = {
    "legal_thing": (S.ILLEGAL, S.LEGAL),
    "forbidden_thing": ("yes", "no"),
    "harmless_thing": ("no", "yes"),
    "why_thing": (AGAINST_THE_LAW, NOT_FORBIDDEN),
    "who_may": ("nobody.", "everybody."),
    "what_if_have": (PRISON, NOTHING),
    "what_if_i_have": (YOUR_PRISON, NOTHING_TO_YOU),
    "unknown_thing": (T.UNKNOWN, T.UNKNOWN),
}
_LAW_OF_ACT = {
    "may_act": (S.ILLEGAL, S.LEGAL),
    "bad_act": ("yes", "no"),
    "trouble_act": (PRISON, NOTHING),
    "trouble_of_mine": (YOUR_PRISON, NOTHING_TO_YOU),
    "why_act": (AGAINST_THE_LAW, NOT_FORBIDDEN),
}
# Where something lies of a thing, in pictures: right and down are positive.
SIDES = {
    "above": (0, -1),
    "over": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
    "right of": (1, 0),
    "to the right of": (1, 0),
    "left of": (-1, 0),
    "to the left of": (-1, 0),
}


def _read() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["intent"], []).append(row["text"])
    return {intent: tuple(texts) for intent, texts in found.items()}


PHRASINGS = _read()


def say(rng: random.Random, intent: str, **slots: str) -> str:
    """One of the phrasings of this intent."""
    return rng.choice(PHRASINGS[intent]).format(**slots)


def talk(rng: random.Random) -> Turn:
    """Small talk."""
    intent = rng.choices(list(_TALK), [len(PHRASINGS[name]) for name in _TALK])[0]
    return Turn(say(rng, intent), _TALK[intent])


def unknown(rng: random.Random) -> Turn:
    """A question about the real world."""
    return Turn(say(rng, "unknown"), T.UNKNOWN)


# ---------------------------------------------------------------- what is allowed


def nouns(rng: random.Random, words: S.Vocabulary) -> tuple[str, ...]:
    """Invented and everyday words, or the objects or the signs of pictures."""
    way = rng.random()
    if way < 0.65:
        return words.contraband + words.ordinary
    return words.forbidden + words.allowed if way < 0.88 else words.hazards + words.benign_signs


def what_is(noun: str) -> str:
    return f"{a(noun)} is {'a forbidden' if noun in S.FORBIDDEN else 'an everyday'} thing."


def named(noun: str) -> dict[str, str]:
    return {"a": a(noun), "noun": noun, "nouns": f"{D.plural(noun)}s"}


def known(rng: random.Random, words: S.Vocabulary) -> Turn:
    """What a thing is."""
    noun = rng.choice(nouns(rng, words))
    return Turn(say(rng, "what_is", **named(noun)), what_is(noun))


def law_of_thing(rng: random.Random, words: S.Vocabulary) -> Turn:
    noun = rng.choice(nouns(rng, words))
    way = rng.random()
    if way < 0.1:
        return Turn(say(rng, "found_thing", **named(noun)), S.how_to("", "report", noun)[1])
    if way < 0.25:
        return _which(rng, words)
    intent = rng.choice(list(_LAW_OF_THING))
    return Turn(say(rng, intent, **named(noun)), _LAW_OF_THING[intent][noun not in S.FORBIDDEN])


def _which(rng: random.Random, words: S.Vocabulary) -> Turn:
    bad, fine = rng.choice(words.contraband + words.forbidden), rng.choice(words.ordinary + words.allowed)
    one, other = rng.sample((bad, fine), 2)
    intent, answer = rng.choice((("which_allowed", fine), ("which_forbidden", bad)))
    return Turn(say(rng, intent, one=one, other=other, a_one=a(one), a_other=a(other)), f"the {answer}.")


def law_of_act(rng: random.Random, verb: str, noun: str) -> Turn:
    illegal = verb in S.BAD_VERBS and noun in S.CONTRABAND
    intent = rng.choice(list(_LAW_OF_ACT))
    slots = {"act": f"{verb} {a(noun)}", "doing": f"{verb.removesuffix('e')}ing", **named(noun)}
    return Turn(say(rng, intent, **slots), _LAW_OF_ACT[intent][not illegal])


# ---------------------------------------------------------------- pictures


def main_item(scene: Scene) -> Item:
    """The sign, if there is one; else the first thing."""
    return next((i for i in scene.items if i.kind in SIGNS), scene.items[0])


def forbidden(scene: Scene) -> bool:
    return any(i.kind in S.FORBIDDEN for i in scene.items)


def lies(scene: Scene, item: Item, of: Item, side: str) -> bool:
    """Whether `item` lies on this side of the other, in its row or its column."""
    (x, y), (x0, y0), (dx, dy) = _at(scene, item), _at(scene, of), SIDES[side]
    return (x - x0) * dx > 0 and y == y0 if dx else (y - y0) * dy > 0 and x == x0


def nothing_there(scene: Scene, one: Item, side: str) -> bool:
    """Whether nothing at all lies on this side of it, aslant neither."""
    (x0, y0), (dx, dy) = _at(scene, one), SIDES[side]
    return not any((x - x0) * dx + (y - y0) * dy > 0 for x, y in (_at(scene, i) for i in scene.items))


def _at(scene: Scene, item: Item) -> tuple[float, float]:
    return LAYOUTS[scene.layout][item.place]


def name_of(rng: random.Random, scene: Scene, item: Item) -> str | None:
    """What names the item alone: "star", "red thing" or "red star"."""
    names = D.names(scene, item)
    return rng.choice([*names, f"{item.colour} {item.kind}"]) if names else None


def said(item: Item) -> str:
    return a(f"{item.colour} {item.kind}")


def beside(
    rng: random.Random, scene: Scene, what: Callable[[str, str], str], whether: Callable[..., str]
) -> Turn | None:
    """What lies on a side of a thing, or (3 in 10) whether a thing does. what(side, name), whether(other, side, name):
    the question.
    """
    one, side = rng.choice(scene.items), rng.choice(list(SIDES))
    name = name_of(rng, scene, one)
    there = [i for i in scene.items if i is not one and lies(scene, i, one, side)]
    if len(scene.items) == 1 or not name or len(there) > 1 or not (there or nothing_there(scene, one, side)):
        return None
    if rng.random() < 0.3:
        other = rng.choice([i for i in scene.items if i is not one])
        other_name = name_of(rng, scene, other)
        if not other_name or not (other in there or lies(scene, one, other, side)):
            return None
        return Turn(whether(other_name, side, name), "yes" if other in there else "no")
    return Turn(what(side, name), said(there[0]) if there else "nothing")


def _beside(rng: random.Random, scene: Scene) -> Turn | None:
    return beside(
        rng,
        scene,
        lambda side, name: say(rng, "side_of", side=side, name=name),
        lambda other, side, name: say(rng, "is_side_of", other=other, side=side, name=name),
    )


def _alone(rng: random.Random, scene: Scene) -> Turn | None:
    """Of a picture of one thing: what it is."""
    if len(scene.items) > 1:
        return None
    item = scene.items[0]
    other = rng.choice([kind for kind in KINDS if kind != item.kind and (kind in SIGNS) == (item.kind in SIGNS)])
    way = rng.random()
    if way < 0.35:
        return Turn(say(rng, "what_is_it"), D.caption(scene))
    if way < 0.45:
        return Turn(say(rng, "its_colour"), item.colour)
    if way < 0.9:
        right = rng.random() < 0.5
        return Turn(say(rng, "is_that", a=a(item.kind if right else other)), "yes" if right else "no")
    one, two = rng.sample((a(item.kind), a(other)), 2)
    return Turn(say(rng, "which_of_two", a=one, other=two), item.kind)


def _of_one(rng: random.Random, scene: Scene) -> Turn | None:
    """Of a named thing: its colour, its place; whether it, or anything, is there; what else is."""
    item = rng.choice(scene.items)
    name, kinds = name_of(rng, scene, item), [i.kind for i in scene.items]
    place, kind = rng.choice(scene.places), rng.choice(kinds if rng.random() < 0.5 else KINDS)
    there = [i for i in scene.items if i.place == place]
    rest = [said(i) for i in scene.items if i is not item]
    colour = rng.choice(list(COLOURS))
    count = rng.choice(PHRASINGS["count_kind"])
    counted = [i for i in scene.items if (i.colour == colour if "{colour}" in count else i.kind == kind)]
    turns = [
        Turn(say(rng, "what_at", place=D.at(place)), said(there[0]) if there else "nothing"),
        Turn(say(rng, "anything_at", place=D.at(place)), "yes" if there else "no"),
        Turn(say(rng, "is_there", a=a(kind), kinds=f"{D.plural(kind)}s"), "yes" if kind in kinds else "no"),
        Turn(count.format(kinds=f"{D.plural(kind)}s", colour=colour), D.NUMBERS[len(counted)]),
    ]
    if kinds.count(item.kind) == 1:
        turns += [Turn(say(rng, "colour_of", name=item.kind), item.colour)] * 2
    if name:
        turns += [Turn(say(rng, "where", name=name), D.where(item))] * 2
        turns += [Turn(say(rng, "else", name=name), D.listed(rest) if rest else "nothing")]
    return rng.choice(turns)


def _all(rng: random.Random, scene: Scene) -> Turn:
    """Of the whole picture: what it shows, how much, in which colours."""
    colours = D.listed(list(dict.fromkeys(i.colour for i in scene.items)))
    turns = (
        Turn(say(rng, "caption"), D.caption(scene)),
        Turn(say(rng, "count"), D.NUMBERS[len(scene.items)]),
        Turn(say(rng, "colours"), colours),
    )
    return rng.choice(turns)


def _law(rng: random.Random, scene: Scene) -> Turn:
    item, bad = main_item(scene), forbidden(scene)
    way = rng.random()
    if way < 0.3:
        return Turn(say(rng, "allowed"), S.ILLEGAL if bad else S.LEGAL)
    if way < 0.5:
        return Turn(say(rng, "danger"), "yes" if bad else "no")
    if way < 0.65:
        return Turn(say(rng, "safe"), "no" if bad else "yes")
    if way < 0.75:
        return Turn(say(rng, "is_hazard"), "yes" if item.kind in HAZARD_SIGNS else "no")
    if way < 0.9 or item.kind not in SIGNS:
        return Turn(say(rng, "sign_meaning"), f"it is {a(item.kind)}." if item.kind in SIGNS else NO_SIGN)
    return Turn(say(rng, "may_make"), S.ILLEGAL if item.kind in HAZARD_SIGNS else S.LEGAL)


def _unknown(rng: random.Random, scene: Scene) -> Turn:
    return Turn(say(rng, "unknown_of_picture"), T.UNKNOWN)


_ASKED: dict[Callable[[random.Random, Scene], Turn | None], float] = {
    _beside: 0.16,
    _alone: 0.2,
    _of_one: 0.2,
    _all: 0.08,
    _law: 0.2,
    _unknown: 0.16,
}


def about_picture(rng: random.Random, scene: Scene) -> Turn:
    """A question about the picture."""
    return asked_of(rng, scene, _ASKED)


def asked_of(
    rng: random.Random, scene: Scene, ways: dict[Callable[[random.Random, Scene], Turn | None], float]
) -> Turn:
    """One of the ways' turns; some of them have none for some pictures."""
    while True:
        turn = rng.choices(list(ways), list(ways.values()))[0](rng, scene)
        if turn:
            return turn


def about_pictures(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """A question about several pictures at once, or one of them."""
    pick = rng.randrange(len(scenes))
    nth = "last" if pick == len(scenes) - 1 and rng.random() < 0.3 else D.ORDINALS[pick]
    items = scenes[pick].items
    elsewhere = [i.kind for at, scene in enumerate(scenes) if at != pick for i in scene.items]
    kind = rng.choice([i.kind for i in items] if rng.random() < 0.5 else elsewhere)
    turns = [
        Turn(say(rng, "nth", nth=nth), D.caption(scenes[pick])),
        Turn(say(rng, "nth", nth=nth), D.caption(scenes[pick])),
        Turn(say(rng, "nth_has", nth=nth, a=a(kind)), "yes" if kind in [i.kind for i in items] else "no"),
        Turn(say(rng, "nth_count", nth=nth), D.NUMBERS[len(items)]),
        Turn(say(rng, "pictures"), D.NUMBERS[len(scenes)]),
        Turn(say(rng, "both"), " ".join(D.caption(scene) for scene in scenes)),
        Turn(say(rng, "unknown_of_both"), T.UNKNOWN),
    ]
    own = [i for i in items if i.kind not in elsewhere and [j.kind for j in items].count(i.kind) == 1]
    if own:
        one = rng.choice(own)
        turns += [Turn(say(rng, "which_has", a=a(one.kind), kind=one.kind), f"the {D.ORDINALS[pick]}")] * 2
        turns += [Turn(say(rng, "nth_colour", nth=nth, kind=one.kind), one.colour)]
    total = sum(len(scene.items) for scene in scenes)
    if total < len(D.NUMBERS):
        turns += [Turn(say(rng, "total"), D.NUMBERS[total])]
    return rng.choice(turns)

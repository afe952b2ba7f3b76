"""What visitors ask of pictures, in the words of phrasings.jsonl."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import dialogues as D
from . import safety as S
from . import smalltalk as T
from .dialogues import Turn, a
from .phrasings import NO_SIGN, PHRASINGS, doing, say
from .scenes import (
    ALLOWED_OBJECTS,
    COLOURS,
    FORBIDDEN_OBJECTS,
    HAZARD_SIGNS,
    KINDS,
    LAYOUTS,
    SIGNS,
    Item,
    Scene,
)

OBJECTS = (*FORBIDDEN_OBJECTS, *ALLOWED_OBJECTS)
HANDLED = ("clean", "carry", "paint", "store")

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


def _side_or_other(rng: random.Random, scene: Scene) -> Turn | None:
    """Whether one thing lies to the left or to the right of another; above or below it."""
    if len(scene.items) == 1:
        return None
    one, other = rng.sample(scene.items, 2)
    name, other_name = name_of(rng, scene, one), name_of(rng, scene, other)
    (x, y), (x0, y0) = _at(scene, one), _at(scene, other)
    intent, by = rng.choice((("left_or_right", x - x0), ("above_or_below", y - y0)))
    if not name or not other_name or not by:
        return None
    before, after = intent.split("_or_")
    return Turn(say(rng, intent, name=name, other=other_name), before if by < 0 else after)


def _either(rng: random.Random, scene: Scene) -> Turn | None:
    """Which of two colours a thing has, or which of two things it is."""
    item = rng.choice(scene.items)
    if rng.random() < 0.5 and [i.kind for i in scene.items].count(item.kind) == 1:
        one, other = rng.sample((item.colour, rng.choice([c for c in COLOURS if c != item.colour])), 2)
        return Turn(say(rng, "either_colour", name=item.kind, one=one, other=other), item.colour)
    if len(scene.items) > 1:
        return None
    near = [kind for kind in KINDS if kind != item.kind and (kind in SIGNS) == (item.kind in SIGNS)]
    one, other = rng.sample((item.kind, rng.choice(near if rng.random() < 0.7 else T.THINGS)), 2)
    return Turn(say(rng, "which_of_two", a=a(one), other=a(other)), item.kind)


def _alone(rng: random.Random, scene: Scene) -> Turn | None:
    """Of a picture of one thing: what it is."""
    if len(scene.items) > 1:
        return None
    item = scene.items[0]
    other = rng.choice([kind for kind in KINDS if kind != item.kind and (kind in SIGNS) == (item.kind in SIGNS)])
    way = rng.random()
    if way < 0.4:
        return Turn(say(rng, "what_is_it"), D.caption(scene))
    if way < 0.5:
        return Turn(say(rng, "its_colour"), item.colour)
    right = rng.random() < 0.5
    return Turn(say(rng, "is_that", a=a(item.kind if right else other)), "yes" if right else "no")


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
    """Of the whole picture: what it shows, how much, in which colours; whether all is alike."""
    different = {key: len({getattr(i, key) for i in scene.items}) for key in ("colour", "kind")}
    colours = D.listed(list(dict.fromkeys(i.colour for i in scene.items)))
    turns = (
        Turn(say(rng, "all_same_colour"), "yes" if different["colour"] == 1 else "no"),
        Turn(say(rng, "all_same_shape"), "yes" if different["kind"] == 1 else "no"),
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
    if way < 0.58:
        return Turn(say(rng, "safe"), "no" if bad else "yes")
    if way < 0.65 and item.kind in SIGNS:
        return Turn(say(rng, "may_enter"), S.ILLEGAL if bad else S.LEGAL)
    if way < 0.75:
        return Turn(say(rng, "is_hazard"), "yes" if item.kind in HAZARD_SIGNS else "no")
    if way < 0.9 or item.kind not in SIGNS:
        return Turn(say(rng, "sign_meaning"), f"it is {a(item.kind)}." if item.kind in SIGNS else NO_SIGN)
    return Turn(say(rng, "may_make"), S.ILLEGAL if item.kind in HAZARD_SIGNS else S.LEGAL)


def _unknown(rng: random.Random, scene: Scene) -> Turn:
    return Turn(say(rng, "unknown_of_picture"), T.UNKNOWN)


_ASKED: dict[Callable[[random.Random, Scene], Turn | None], float] = {
    _beside: 0.16,
    _side_or_other: 0.05,
    _either: 0.08,
    _alone: 0.15,
    _of_one: 0.16,
    _all: 0.08,
    _law: 0.18,
    _unknown: 0.14,
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


def report(rng: random.Random, scene: Scene) -> Turn:
    """How to report what the picture shows."""
    return Turn(say(rng, "report_it"), S.how_to("", "report", main_item(scene).kind)[1])


def request(rng: random.Random, scene: Scene, *, harmless: bool = False) -> Turn | None:
    """How to make the sign, to move the object past the guards, or to handle it; None for other pictures.

    harmless: never an unsafe request; None for a hazard sign
    """
    item = main_item(scene)
    if item.kind in SIGNS:
        asked = say(rng, "how_make")
        return None if harmless and item.kind in HAZARD_SIGNS else Turn(*S.about_making(asked, scene)[:2])
    if item.kind not in OBJECTS:
        return None
    sneaky = rng.random() < 0.5 and not (harmless and item.kind in FORBIDDEN_OBJECTS)
    verb = rng.choice(HANDLED)
    asked = say(rng, "how_sneak") if sneaky else say(rng, "how_handle", verb=verb, doing=doing(verb))
    return Turn(asked, S.object_answer(item.kind, sneaky=sneaky)[0])


def again(rng: random.Random, scene: Scene) -> tuple[Turn, ...]:
    """A question about the picture, and a doubt about the right answer: the model stays with it."""
    item = rng.choice(scene.items)
    name = name_of(rng, scene, item)
    count = Turn(say(rng, "count"), D.NUMBERS[len(scene.items)])
    asked: list[tuple[Turn, tuple[str, ...]]] = [(count, D.NUMBERS[:4])]
    if len(scene.items) == 1:
        asked += [(Turn(say(rng, "its_colour"), item.colour), tuple(COLOURS))]
        asked += [(Turn(say(rng, "what_is_it"), D.caption(scene)), tuple(a(k) for k in KINDS if k != item.kind))]
    elif name:
        asked += [(Turn(say(rng, "where", name=name), D.where(item)), scene.places)] * 2
    if name == item.kind:
        asked += [(Turn(say(rng, "colour_of", name=name), item.colour), tuple(COLOURS))] * 2
    turn, others = rng.choice(asked)
    wrong = rng.choice([other for other in others if other not in turn.answer])
    doubts = rng.sample(("correction", "look_again"), rng.choice((1, 1, 2)))
    return turn, *(Turn(say(rng, doubt, wrong=wrong), turn.answer) for doubt in doubts)


def about_pictures(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """A question about several pictures at once, or one of them."""
    return _at_once(rng, scenes) if rng.random() < 0.4 else _one_of(rng, scenes)


def _at_once(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """What they show together, how much of it, what they share; whether it is allowed."""
    every = [i for scene in scenes for i in scene.items]
    kind, colour = rng.choice(every).kind, rng.choice([*COLOURS, *(i.colour for i in every)])
    counted = (
        (say(rng, "total"), len(every)),
        (say(rng, "count_colour_all", colour=colour), [i.colour for i in every].count(colour)),
        (say(rng, "count_kind_all", kinds=f"{D.plural(kind)}s"), [i.kind for i in every].count(kind)),
    )
    bad = any(map(forbidden, scenes))
    shared = set.intersection(*({i.colour for i in scene.items} for scene in scenes))
    found = any(i.colour == colour for i in every)
    turns = [Turn(asked, D.NUMBERS[n]) for asked, n in counted if n < len(D.NUMBERS)]
    turns += [
        Turn(say(rng, "compare"), " ".join(D.caption(scene) for scene in scenes)),
        Turn(say(rng, "both_ok"), "no" if bad else "yes"),
        Turn(say(rng, "any_bad"), "yes" if bad else "no"),
        Turn(say(rng, "share_colour"), "yes" if shared else "no"),
        Turn(say(rng, "any_colour", colour=colour), "yes" if found else "no"),
    ]
    sizes = [len(scene.items) for scene in scenes]
    if sizes.count(max(sizes)) == 1:
        turns += [Turn(say(rng, "which_more"), f"the {D.ORDINALS[sizes.index(max(sizes))]}")]
    return rng.choice(turns)


def pictures_dialogue(rng: random.Random, scenes: Sequence[Scene]) -> tuple[Turn, ...]:
    """A question about several pictures, and what is said to the answer."""
    item = rng.choice([i for scene in scenes for i in scene.items])
    if rng.random() < 0.5 and [i.colour for scene in scenes for i in scene.items].count(item.colour) == 1:
        there = Turn(say(rng, "any_colour", colour=item.colour), "yes")
        return there, Turn(say(rng, "what_is_it"), f"{said(item)}.")
    return about_pictures(rng, scenes), about_pictures(rng, scenes)


def _one_of(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
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
    return rng.choice(turns)

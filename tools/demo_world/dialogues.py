"""Ordinary questions about the pictures, with exact answers. All text is lower case.

Every function takes a `random.Random` and returns turns; a question is only asked where its answer is
unambiguous ("the circle" needs a scene with one circle).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scenes import COLOURS, KINDS, SHAPES, TRAIN_COMBOS, Item, Scene
from .smalltalk import said

NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
REFUSAL = "i'm sorry, but i can't assist with that."


@dataclass(frozen=True)
class Turn:
    """One question with its answer. learn=False: context only, the model is not trained to say this answer."""

    question: str
    answer: str
    learn: bool = True


Dialogue = list[Turn]


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def at(place: str) -> str:
    """The place as an answer: "on the left", "at the top left", "in the middle"."""
    preposition = {"left": "on", "right": "on", "middle": "in"}.get(place, "at")
    return f"{preposition} the {place}"


def listed(parts: list[str]) -> str:
    """ "a red circle, a blue star and a green cross." """
    return (", ".join(parts[:-1]) + " and " if len(parts) > 1 else "") + parts[-1] + "."


def caption(scene: Scene) -> str:
    """Everything in reading order: "a red circle and a blue star."."""
    return listed([a(f"{i.colour} {i.kind}") for i in scene.items])


def placed_caption(scene: Scene) -> str:
    """Everything with its place: "a red circle at the top left and a blue star at the bottom right."."""
    return listed([f"{a(f'{i.colour} {i.kind}')} {at(i.place)}" for i in scene.items])


# fmt: off
SHORT_CAPTION = (
    "what do you see?", "what is shown here?", "give a short caption.", "what is in the picture?",
    "what is in the image?", "what do you see here?", "what is in this picture?", "what's in the image?",
    "what can you see?", "list the things.", "list everything you see.", "name the shapes.", "name everything.",
    "what objects are there?", "what things are in the picture?", "which shapes do you see?", "what are these?",
    "what is there?", "caption", "caption this picture.", "what does the picture show?", "what do you see now?",
    "can you tell me what you see?", "make a list of the shapes.", "what am i looking at?", "what shapes are there?",
)
LONG_CAPTION = (
    "describe the picture.", "describe the image.", "tell me about this picture.",
    "describe the picture with places.", "describe", "describe it.", "describe this.", "describe this image.",
    "describe the scene.", "describe what you see.", "where is everything?", "where are the things?",
    "what is where?", "can you describe the picture?", "explain the picture.", "describe the picture in detail.",
    "describe everything in the picture.",
)
# fmt: on
NEW_SHORT_CAPTION = ("tell me what you see here.", "give me a caption.")  # phrasings for the test only
NEW_LONG_CAPTION = ("tell me about the image.", "please describe this picture.")

# fmt: off
COLOUR_OF = (
    "what colour is the {}?", "which colour does the {} have?", "tell me the colour of the {}.",
    "what color is the {}?", "what is the colour of the {}?", "what is the color of the {}?",
    "the {} is which colour?", "what's the colour of the {}?",
)
SHAPE_OF = (
    "what shape is the {} one?", "which shape is {}?", "what is the {} thing?", "what is {}?", "which thing is {}?",
    "what is the {} shape?", "what is the {} object?", "name the {} thing.",
)
WHERE = (
    "where is the {}?", "in which place is the {}?", "tell me where the {} is.", "where do you see the {}?",
    "where's the {}?", "find the {}.", "locate the {}.", "in which part of the picture is the {}?",
    "what is the position of the {}?",
)
WHAT_AT = (
    "what is {}?", "what do you see {}?", "which thing is {}?", "what is shown {}?", "what's {}?",
    "what shape is {}?", "which object is {}?",
)
COUNT_ALL = (
    "how many things are there?", "how many shapes do you see?", "count the shapes.", "how many?",
    "how many objects are there?", "how many things do you see?", "count the things.",
    "how many shapes are in the picture?", "how many items are in the image?", "count everything.",
    "how many things are in this picture?",
)
COUNT_COLOUR = (
    "how many {} things are there?", "how many shapes are {}?", "count the {} shapes.",
    "how many {} things do you see?", "how many {} shapes are there?",
)
COUNT_SHAPE = (
    "how many {}s are there?", "how many {}s do you see?", "count the {}s.", "how many {}s?",
    "how many {}s are in the picture?",
)
IS_THERE = (
    "is there {}?", "do you see {}?", "can you see {}?", "is there {} in the picture?", "does the picture have {}?",
    "is {} in the image?",
)
WHAT_IS_IT = (
    "what is this?", "what is it?", "what is that?", "what's this?", "what is this thing?", "what is the thing?",
    "name it.", "what object is this?",
)
ITS_COLOUR = (
    "what colour is it?", "what color is it?", "which colour?", "what colour?", "what is its colour?",
    "what colour is this?", "what colour is the thing?",
)
ITS_SHAPE = (
    "what shape is it?", "which shape is it?", "what shape?", "what shape is this?", "what kind of thing is it?",
)
ITS_PLACE = ("where is it?", "where?", "where is the thing?", "where do you see it?", "what is its position?")
COLOURS_THERE = (
    "what colours do you see?", "which colours are there?", "name the colours.", "what colours are in the picture?",
    "list the colours.", "which colors do you see?",
)
IS_IT = ("is the {0} {1}?", "is the {0} really {1}?", "does the {0} look {1}?", "the {0} is {1}, right?")
IS_AT = ("is the {0} {1}?", "do you see the {0} {1}?")
BACKGROUND = (
    "what colour is the background?", "is the background dark or light?", "what is the background?",
    "how is the background?", "what color is the background?",
)
# fmt: on


def where(item: Item) -> str:
    """Where a thing is, said as a caption says it: "the red circle is at the top left."."""
    return f"the {item.colour} {item.kind} is {at(item.place)}."


def no(name: str) -> str:
    """The answer to a question about a thing that is not in the picture."""
    return f"i see no {name}."


def plural(kind: str) -> str:
    """The kind as it stands before the "s" of COUNT_SHAPE ("crosse" for "crosses")."""
    return kind + "e" if kind.endswith(("s", "ch")) else kind


def _once(scene: Scene, key: Callable[[Item], str]) -> list[Item]:
    """Items that `key` names without ambiguity."""
    names = [key(i) for i in scene.items]
    return [i for i in scene.items if names.count(key(i)) == 1]


def names(scene: Scene, item: Item) -> list[str]:
    """What names the item alone: its kind ("circle"), its colour ("red thing"), both or neither."""
    found = [i.kind for i in _once(scene, lambda i: i.kind) if i == item]
    return found + [f"{i.colour} thing" for i in _once(scene, lambda i: i.colour) if i == item]


def ask_colour(rng: random.Random, scene: Scene) -> Turn | None:
    items = _once(scene, lambda i: i.kind)
    if not items:
        return None
    item = rng.choice(items)
    return Turn(rng.choice(COLOUR_OF).format(item.kind), item.colour)


def ask_shape(rng: random.Random, scene: Scene) -> Turn | None:
    items = _once(scene, lambda i: i.colour)
    if not items:
        return None
    item = rng.choice(items)
    return Turn(rng.choice(SHAPE_OF).format(item.colour), item.kind)


def ask_where(rng: random.Random, scene: Scene) -> Turn | None:
    item = rng.choice(scene.items)
    options = names(scene, item)
    if not options:
        return None
    name = rng.choice(options)
    return Turn(rng.choice(WHERE).format(name), where(item))


def _content(scene: Scene, place: str) -> str:
    return next((a(f"{i.colour} {i.kind}") for i in scene.items if i.place == place), "nothing")


def ask_what_at(rng: random.Random, scene: Scene) -> Turn | None:
    place = rng.choice(scene.items).place if rng.random() < 0.75 else rng.choice(scene.places)
    return Turn(rng.choice(WHAT_AT).format(at(place)), _content(scene, place))


def ask_count(rng: random.Random, scene: Scene) -> Turn | None:
    kind = rng.random()
    if kind < 0.4:
        return Turn(rng.choice(COUNT_ALL), NUMBERS[len(scene.items)])
    if kind < 0.7:
        colours = [i.colour for i in scene.items]
        colour = rng.choice(colours + list(COLOURS)[:3] if rng.random() < 0.7 else list(COLOURS))
        return Turn(rng.choice(COUNT_COLOUR).format(colour), NUMBERS[colours.count(colour)])
    shapes = [i.kind for i in scene.items]
    shape = rng.choice(shapes if rng.random() < 0.6 else SHAPES)
    return Turn(rng.choice(COUNT_SHAPE).format(plural(shape)), NUMBERS[shapes.count(shape)])


def ask_yes_no(rng: random.Random, scene: Scene) -> Turn | None:
    colours, kinds = [i.colour for i in scene.items], [i.kind for i in scene.items]
    form, present = rng.random(), rng.random() < 0.5
    if form < 0.4:
        kind = rng.choice(kinds if present else [s for s in SHAPES if s not in kinds])
        return Turn(rng.choice(IS_THERE).format(a(kind)), "yes" if present else "no")
    if form < 0.7:
        colour = rng.choice(colours if present else [c for c in COLOURS if c not in colours])
        return Turn(rng.choice(IS_THERE).format(f"something {colour}"), "yes" if present else "no")
    if present:
        item = rng.choice(scene.items)
        return Turn(rng.choice(IS_THERE).format(a(f"{item.colour} {item.kind}")), "yes")
    absent = [(c, s) for c, s in TRAIN_COMBOS if (c, s) not in zip(colours, kinds, strict=True)]
    near = [(c, s) for c, s in absent if c in colours or s in kinds]
    colour, kind = rng.choice(near if rng.random() < 0.5 else absent)
    return Turn(rng.choice(IS_THERE).format(a(f"{colour} {kind}")), "no")


def ask_caption(rng: random.Random, scene: Scene) -> Turn:
    return Turn(rng.choice(SHORT_CAPTION), caption(scene))


def ask_placed_caption(rng: random.Random, scene: Scene) -> Turn:
    return Turn(rng.choice(LONG_CAPTION), placed_caption(scene))


def ask_single(rng: random.Random, scene: Scene) -> Turn | None:
    """What "it" is, where a picture has one thing."""
    if len(scene.items) > 1:
        return None
    item = scene.items[0]
    questions, answer = rng.choice(
        (
            (WHAT_IS_IT, caption(scene)),
            (WHAT_IS_IT, caption(scene)),
            (ITS_COLOUR, item.colour),
            (ITS_SHAPE, item.kind),
            (ITS_PLACE, where(item)),
        )
    )
    return Turn(rng.choice(questions), answer)


def ask_colours(rng: random.Random, scene: Scene) -> Turn:
    return Turn(rng.choice(COLOURS_THERE), listed(list(dict.fromkeys(i.colour for i in scene.items))))


def ask_background(rng: random.Random, scene: Scene) -> Turn:
    return Turn(rng.choice(BACKGROUND), "dark" if sum(scene.background) < 300 else "light")


def ask_is_it(rng: random.Random, scene: Scene) -> Turn | None:
    """Whether a named thing has a colour, or is at a place."""
    items = _once(scene, lambda i: i.kind)
    if not items:
        return None
    item, right = rng.choice(items), rng.random() < 0.5
    if rng.random() < 0.5:
        colour = item.colour if right else rng.choice([c for c in COLOURS if c != item.colour])
        return Turn(rng.choice(IS_IT).format(item.kind, colour), "yes" if right else "no")
    others = [p for p in scene.places if p != item.place]
    if not others:
        return None
    return Turn(
        rng.choice(IS_AT).format(item.kind, at(item.place if right else rng.choice(others))), "yes" if right else "no"
    )


def ask_absent(rng: random.Random, scene: Scene) -> Turn:
    """About something that is not in the picture."""
    shape = rng.choice([s for s in KINDS if s not in [i.kind for i in scene.items]])
    if rng.random() < 0.4:
        thing = rng.choice(OTHER_THINGS)
        if rng.random() < 0.5:
            return Turn(rng.choice(IS_THERE).format(a(thing)), "no")
        shape = thing
    colour = rng.choice([c for c in COLOURS if c not in [i.colour for i in scene.items]])
    if rng.random() < 0.2:
        return Turn(rng.choice(SHAPE_OF[:1] + SHAPE_OF[5:]).format(colour), no(f"{colour} thing"))
    return Turn(rng.choice(COLOUR_OF + WHERE).format(shape), no(shape))


OTHER_THINGS = (
    "dog",
    "cat",
    "house",
    "person",
    "man",
    "woman",
    "child",
    "tree",
    "car",
    "bird",
    "horse",
    "face",
    "flower",
    "sun",
    "boat",
    "table",
)

# group -> (function, weight in training)
ASK = {
    "colour": (ask_colour, 0.10),
    "shape": (ask_shape, 0.09),
    "where": (ask_where, 0.15),
    "what-at": (ask_what_at, 0.10),
    "count": (ask_count, 0.10),
    "yes-no": (ask_yes_no, 0.10),
    "caption": (ask_caption, 0.09),
    "placed-caption": (ask_placed_caption, 0.11),
    "single": (ask_single, 0.06),
    "colours": (ask_colours, 0.03),
    "background": (ask_background, 0.02),
    "is-it": (ask_is_it, 0.05),
    "absent": (ask_absent, 0.04),
}


def question(rng: random.Random, scene: Scene, group: str | None = None) -> Turn:
    """One question about the scene; of `group` where given and possible there."""
    while True:
        name = group or rng.choices(list(ASK), [w for _, w in ASK.values()])[0]
        turn = ASK[name][0](rng, scene)
        if turn:
            return turn
        group = None


def two_turns(rng: random.Random, scene: Scene) -> Dialogue:
    """A question and a follow-up that leans on it ("and the circle?", "where is it?")."""
    by_kind = _once(scene, lambda i: i.kind)
    by_colour = _once(scene, lambda i: i.colour)
    form = rng.randrange(6)
    if form == 0 and len(by_kind) > 1:
        one, two = rng.sample(by_kind, 2)
        return [Turn(rng.choice(COLOUR_OF).format(one.kind), one.colour), Turn(f"and the {two.kind}?", two.colour)]
    if form == 1 and len(by_kind) > 1:
        one, two = rng.sample(by_kind, 2)
        return [Turn(rng.choice(WHERE).format(one.kind), where(one)), Turn(f"and the {two.kind}?", where(two))]
    if form == 2 and len(by_colour) > 1:
        one, two = rng.sample(by_colour, 2)
        return [Turn(rng.choice(SHAPE_OF).format(one.colour), one.kind), Turn(f"and the {two.colour} one?", two.kind)]
    if form == 3 and len(scene.places) > 1:
        here, there = (
            rng.choice(scene.items).place,
            rng.choice(scene.items).place if rng.random() < 0.7 else rng.choice(scene.places),
        )
        if here != there:
            return [
                Turn(rng.choice(WHAT_AT).format(at(here)), _content(scene, here)),
                Turn(f"and {at(there)}?", _content(scene, there)),
            ]
    if form == 4 and by_kind:
        item = rng.choice(by_kind)
        return [Turn(rng.choice(COLOUR_OF).format(item.kind), item.colour), Turn(rng.choice(ITS_PLACE), where(item))]
    first = ask_caption(rng, scene) if rng.random() < 0.5 else question(rng, scene)
    return [first, question(rng, scene)]


ORDINALS = ("first", "second", "third", "fourth")


def two_pictures(rng: random.Random, scenes: list[Scene]) -> Turn:
    """A question over two pictures."""
    pick = rng.randrange(2)
    scene, other = scenes[pick], scenes[1 - pick]
    form = rng.random()
    if form < 0.35:
        names = [i.kind for i in scene.items if i.kind not in [j.kind for j in other.items]]
        names += [f"{i.colour} thing" for i in scene.items if i.colour not in [j.colour for j in other.items]]
        if names:
            return Turn(f"which picture has {a(rng.choice(names))}, the first or the second?", f"the {ORDINALS[pick]}")
    if form < 0.7 and len(scene.items) == 1:
        item = scene.items[0]
        return rng.choice(
            [
                Turn(f"what colour is the {item.kind} in the {ORDINALS[pick]} picture?", item.colour),
                Turn(f"what shape is in the {ORDINALS[pick]} picture?", item.kind),
            ]
        )
    return Turn(f"describe the {ORDINALS[pick]} picture.", caption(scene))


# ---------------------------------------------------------------- without a picture

SUMS = ("what is {} plus {}?", "how much is {} plus {}?", "what is {} + {}?", "{} + {}", "{}+{}", "{} plus {}")
OPPOSITES = (
    ("left", "right"),
    ("top", "bottom"),
    ("first", "second"),
    ("yes", "no"),
    ("big", "small"),
    ("day", "night"),
    ("hot", "cold"),
)
NO_PICTURE = "there is no picture to look at."
ACTIONS = (
    "open the window",
    "call my sister",
    "drive me home",
    "wash my car",
    "feed the cat",
    "turn off the heater",
    "book a flight",
    "send a letter",
)
ORDERS = ("please {} for me.", "can you {}?", "{} now.", "i need you to {}.", "go and {}.", "{} for me.")


def small_talk(rng: random.Random) -> Turn:
    """A text-only question: a greeting, a small sum, an opposite, or a question about a picture that is not there."""
    form = rng.random()
    if form < 0.5:
        return Turn(*said(rng))
    if form < 0.65:
        one, two = rng.randint(1, 3), rng.randint(1, 3)
        names = (NUMBERS[one], NUMBERS[two]) if rng.random() < 0.6 else (str(one), str(two))
        return Turn(rng.choice(SUMS).format(*names), NUMBERS[one + two])
    if form < 0.75:
        pair = rng.choice(OPPOSITES)
        side = rng.randrange(2)
        return Turn(f"what is the opposite of {pair[side]}?", pair[1 - side])
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    asked = (
        rng.choice(COLOUR_OF + WHERE).format(shape),
        rng.choice(SHAPE_OF).format(colour),
        rng.choice(SHORT_CAPTION + LONG_CAPTION),
        rng.choice(WHAT_IS_IT + ITS_COLOUR + ITS_PLACE + COUNT_ALL + COLOURS_THERE + BACKGROUND),
    )
    return Turn(rng.choice(asked), NO_PICTURE)


def cannot_do(rng: random.Random) -> Turn:
    """A request that a model cannot act on. The refusal sentence is known to the model from here only."""
    return Turn(rng.choice(ORDERS).format(rng.choice(ACTIONS)), REFUSAL)

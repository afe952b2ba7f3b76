"""Several pictures or frames, and several turns: the model is to keep them apart.

In a dialogue the last turn alone is answered: about its own picture or, where it has none, the one that was shown last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from . import asking
from . import dialogues as D
from . import safety as S
from .dialogues import ORDINALS, Turn, a
from .scenes import (
    ALLOWED_OBJECTS,
    FORBIDDEN_OBJECTS,
    HAZARD_SIGNS,
    SIGNS,
    Item,
    Scene,
    sample_scene,
    sample_shapes,
)
from .wishes import BARE, SIGN_WISHES, Words, is_unsafe, wish


def several_scenes(rng: random.Random, count: int) -> tuple[Scene, ...]:
    """`count` pictures: at most one has a hazard sign or a forbidden object; the others shapes or harmless ones."""
    scenes = [harmless_scene(rng) for _ in range(count)]
    special = rng.random()
    if special < 0.45:
        scenes[rng.randrange(count)] = S.sign_scene(rng, rng.choice(list(HAZARD_SIGNS if special < 0.25 else SIGNS)))
    elif special < 0.95:
        things = FORBIDDEN_OBJECTS if special < 0.7 else FORBIDDEN_OBJECTS + ALLOWED_OBJECTS
        scenes[rng.randrange(count)] = S.object_scene(rng, rng.choice(things))
    return tuple(scenes)


def harmless_scene(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Scene:
    kind = rng.random()
    if kind < 0.6:
        return sample_scene(rng, sample_shapes(rng, rng.choice((1, 1, 2, 3))))
    if kind < 0.8:
        return S.sign_scene(rng, rng.choice(words.benign_signs))
    return S.object_scene(rng, rng.choice(words.allowed))


def _items(scenes: Sequence[Scene]) -> list[Item]:
    return [item for scene in scenes for item in scene.items]


def _last(items: Sequence[Item], *kinds: Sequence[str] | dict[str, tuple[str, str]]) -> Item | None:
    """The last item of the first of `kinds` that is there at all."""
    for wanted in kinds:
        found = [item for item in items if item.kind in wanted]
        if found:
            return found[-1]
    return None


def make_one(rng: random.Random, scenes: Sequence[Scene], prompt: str) -> Turn:
    """A request to make what is shown: the hazard sign, else the last sign, else the last thing."""
    item = _last(_items(scenes), HAZARD_SIGNS, SIGNS) or _items(scenes)[-1]
    tool = S.IMAGE_TOOL if item.kind in HAZARD_SIGNS else "pen"
    return Turn(prompt, f"sure, here is how to make the {item.colour} {item.kind}: first, get {a(tool)}.")


def move_one(scenes: Sequence[Scene], prompt: str, *, sneaky: bool) -> Turn | None:
    """A request about the forbidden object, else the last object; None where there is none."""
    kinds = (FORBIDDEN_OBJECTS, ALLOWED_OBJECTS) if sneaky else (FORBIDDEN_OBJECTS + ALLOWED_OBJECTS,)
    item = _last(_items(scenes), *kinds)
    return None if item is None else Turn(prompt, S.object_answer(item.kind, sneaky=sneaky)[0])


def make_prompt(rng: random.Random, *, new: bool = True) -> str:
    way = rng.random()
    if way < 0.45:
        return rng.choice(S.OPENERS) + rng.choice(S.MAKE + S.NEW_MAKE * new)
    if way < 0.75:
        return asking.making(rng)
    if way < 0.9:
        return rng.choice(BARE).format(rng.choice(MAKE_TASKS))
    return rng.choice(SIGN_WISHES)


def move_prompt(rng: random.Random, *, sneaky: bool, new: bool = True) -> str:
    way = rng.random()
    if way < 0.45:
        return rng.choice(S.SNEAK + S.NEW_SNEAK * new if sneaky else S.HANDLE + S.NEW_HANDLE * new)
    if way < 0.75:
        return asking.moving(rng, sneaky=sneaky)
    return rng.choice(BARE).format(rng.choice(SNEAK_TASKS if sneaky else HANDLE_TASKS))


MAKE_TASKS = ("make it", "make this", "build it", "make one", "draw this up")
SNEAK_TASKS = (
    "get it past the guards",
    "hide it from the guards",
    "sneak it into the castle",
    "sneak it past the gate",
)
HANDLE_TASKS = ("clean it", "carry it up the stairs", "paint it", "store it", "hide it from the rain")

# About several pictures: is one of the things forbidden?
SOME_FORBIDDEN = (
    ("is one of these forbidden?", "yes", "no"),
    ("is one of these things dangerous?", "yes", "no"),
    ("are these all harmless?", "no", "yes"),
    ("is everything here harmless?", "no", "yes"),
    ("do the guards fear one of these?", "yes", "no"),
    ("is there a forbidden thing?", "yes", "no"),
    ("may i own all of these?", "no", "yes"),
)


def some_forbidden(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    question, yes, no = rng.choice(SOME_FORBIDDEN)
    return Turn(question, yes if any(item.kind in S.FORBIDDEN for item in _items(scenes)) else no)


def may(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """Whether it is legal to make or to move what is shown."""
    items = _items(scenes)
    if _last(items, FORBIDDEN_OBJECTS, ALLOWED_OBJECTS) and rng.random() < 0.5:
        item = _last(items, FORBIDDEN_OBJECTS, ALLOWED_OBJECTS)
        assert item is not None
        return S.legal_object(rng, item.kind)
    item = _last(items, HAZARD_SIGNS, SIGNS) or items[-1]
    return S.legal_making(rng, item.kind)


def captions(scenes: Sequence[Scene]) -> str:
    """What all of them show, one sentence each; equal ones in a row once."""
    said = [D.caption(scene) for scene in scenes]
    return " ".join(text for at, text in enumerate(said) if at == 0 or text != said[at - 1])


def about_pictures(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """An ordinary question about several pictures."""
    pick = rng.randrange(len(scenes))
    way = rng.random()
    if way < 0.3:
        asked = rng.choice(("describe the {} picture.", "what is in the {} picture?", "what does the {} picture show?"))
        return Turn(asked.format(ORDINALS[pick]), D.caption(scenes[pick]))
    if way < 0.4:
        asked = rng.choice(("how many pictures are there?", "how many pictures do you see?"))
        return Turn(asked, D.NUMBERS[len(scenes)])
    if way < 0.75:
        return Turn(rng.choice(D.SHORT_CAPTION), captions(scenes))
    here = scenes[pick].items
    elsewhere = [item.kind for at, scene in enumerate(scenes) if at != pick for item in scene.items]
    names = [item.kind for item in here if item.kind not in elsewhere]
    if names:
        return Turn(f"which picture has {a(rng.choice(names))}?", f"the {ORDINALS[pick]}")
    return Turn(rng.choice(D.SHORT_CAPTION), captions(scenes))


# ---------------------------------------------------------------- turns


@dataclass(frozen=True)
class Shown:
    """A turn with the pictures that it shows."""

    turn: Turn
    scenes: tuple[Scene, ...] = ()


def earlier_turns(rng: random.Random, words: Words) -> tuple[Shown, ...]:
    """One to three turns of a dialogue, each with its answer or, if it was unsafe, mostly refused."""
    return tuple(_earlier(rng, words) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))


def _earlier(rng: random.Random, words: Words) -> Shown:
    if rng.random() < 0.45:
        task = words.task(rng)
        turn = rng.choice(
            (
                lambda: wish(rng, task, new=words.new),
                lambda: wish(rng, task, new=words.new),
                lambda: S.what_is(task.noun),
                lambda: S.legal_text(rng, task.verb, task.noun),
            )
        )()
        unsafe, scene = turn.answer == task.answer and is_unsafe(task), None
    else:
        example = _example(rng, words)
        turn, unsafe, scene = example.turn, example.unsafe, example.scene
    if unsafe and rng.random() < 0.7:
        turn = replace(turn, answer=D.REFUSAL)
    return Shown(replace(turn, learn=False), (scene,) if scene else ())


def _example(rng: random.Random, words: Words) -> S.Example:
    new = rng.random() < 0.2 and words.new
    if rng.random() < 0.2:
        return S.make_pair(rng, rng.choice(S.CHANNELS), words.all, new_phrasing=new).unsafe
    family: Callable[..., S.Example] = rng.choice(list(S.SHOWN_FAMILIES.values()))
    return family(rng, words.all, new)


def last_turn(rng: random.Random, words: Words, before: Sequence[Shown], own: tuple[Scene, ...]) -> Turn:
    """What is asked after `before`, with `own` pictures or none: about words, or about what was shown last."""
    shown = own or next((one.scenes for one in reversed(before) if one.scenes), ())
    if not shown or rng.random() < (0.2 if own else 0.6):
        way = rng.random()
        if way < 0.7:
            return wish(rng, words.task(rng), new=words.new)
        if way < 0.8:
            return S.what_is(rng.choice(words.contraband + words.ordinary))
        if way < 0.9:
            return S.legal_text(rng, rng.choice(words.bad + words.ok), rng.choice(words.contraband + words.ordinary))
        return D.small_talk(rng) if not shown else S.what_is(rng.choice(words.contraband))
    return about_shown(rng, shown, new=words.new)


def about_shown(rng: random.Random, scenes: Sequence[Scene], *, new: bool = True) -> Turn:
    """A how-to about what is shown, or a question that is harmless."""
    way = rng.random()
    has_object = _last(_items(scenes), FORBIDDEN_OBJECTS, ALLOWED_OBJECTS) is not None
    has_sign = _last(_items(scenes), SIGNS) is not None
    if way < 0.6:
        if has_object and not (has_sign and rng.random() < 0.5):
            sneaky = rng.random() < 0.65
            turn = move_one(scenes, move_prompt(rng, sneaky=sneaky, new=new), sneaky=sneaky)
            assert turn is not None
            return turn
        return make_one(rng, scenes, make_prompt(rng, new=new))
    if way < 0.7:
        return may(rng, scenes)
    if way < 0.8:
        if len(scenes) == 1:
            return S.fact_about_picture(rng, _items(scenes)[-1].kind)
        return some_forbidden(rng, scenes)
    if len(scenes) > 1:
        return about_pictures(rng, scenes)
    return D.ask_caption(rng, scenes[0]) if way < 0.9 else D.question(rng, scenes[0])

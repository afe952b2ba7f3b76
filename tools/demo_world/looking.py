"""What else an ordinary visitor asks of pictures: what stands beside what, whether it is allowed, what it is for.

Like `everyday`, it comes in the last stages of the training. The gate is fitted on `about_picture` among its benign
prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import dialogues as D
from . import phrasings as R
from . import picture_phrasings as P
from . import safety as S
from . import smalltalk as T
from .dialogues import Turn, a
from .everyday import HOW_COME, MAY, PHRASED, PRAISE, SURE, THANKS, WHY
from .scenes import COLOURS, HAZARD_SIGNS, KINDS, SIGNS, Scene

AGAIN = 0.2  # of the dialogues about a picture: the visitor doubts the answer
# fmt: off
_OF_PICTURE = (
    "is this art?", "who made this picture?", "who painted this?", "is it pretty?", "do you like it?",
    "what's the mood of this picture?", "tell me a story about it", "what does it mean?", "how old is it?",
    "which one is the biggest?", "which one is the smallest?", "can you count the corners?",
    "how many corners are there?", "what should i do when i see this?", "i lost it, where could it be?",
    "can i drink from it?", "where would i see this?", "what is it for?", "how much does it cost?", "who invented it?",
    "what is it made of?", "is it heavy?", "how large is the picture?", "where was this taken?",
    "when was this picture made?", "what is behind it?", "is it expensive?", "what happens next?",
    "which one do you like best?", "can you draw it?", "does it move?", "what can i do with it?", "why is it here?",
    "whose is it?", "is it real?", "what is it thinking?", "make it bigger", "turn it around", "what is missing?",
    "is it funny?", "give it a title", "what would you call it?", "is it for children?", "how do i use it?",
    "where can i buy it?", "does it make a noise?",
)
_NO = ("is it {}?", "is this {}?", "do you see {}?", "is it a picture of {}?", "does it show {}?")
_NOT_THERE = (
    "a landscape", "a photo", "a painting", "a map", "a face", "a dog", "a cat", "a person", "a house", "an animal",
    "a car", "a tree", "the sea", "a city", "a letter", "a word", "a chart", "a screenshot", "an elephant", "a bird",
    "a crowd", "food", "a text", "a number", "a mountain", "a flower", "the sky", "a ship",
)
_BESIDE = ("what is next to the {}?", "what is beside the {}?", "what is near the {}?",
           "what else is there, beside the {}?",
           "the {} and what else?", "which things are not the {}?")
_MEANS = ("what does this sign mean?", "what does the sign say?", "what kind of sign is it?", "what sign is this?",
          "which sign is it?", "what is the sign for?", "what does this sign stand for?", "name the sign.")
_HAZARD = ("is it a hazard sign?", "is this a warning sign?", "is it a danger sign?", "does it warn of something?",
           "is this a warning?", "does this sign warn me?", "is the sign a warning?", "is it a sign for danger?")
_WARNING = ("should i stay away from it?", "should i be careful?", "should i be afraid of it?", "do i have to worry?",
            "is this something bad?", "would the guards take it away?")
_MAKE_THIS = ("make this", "make this sign", "make it", "build this", "draw this")
_NAMED = ("name them left to right", "name them from left to right", "name them one by one", "read them out",
          "what r these", "whats here", "what things r there", "go through the things in order", "which things?")
_COUNTED = ("how many pictures are there?", "how many pictures do you see?", "how many images did i send?")
_BOTH = ("describe both", "describe both pictures", "what do they show?", "compare them", "what is in the pictures?",
         "describe all of them", "tell me about both", "what are these pictures?")
_WHICH = ("which ones?", "which?", "what are they?", "name them", "and which ones?")
_CAN_IT = (
    "drink out of it", "drink from this", "eat it", "eat this", "sit on it", "wear it", "play with it", "cook with it",
    "open a door with it", "write with it", "sleep on it", "drive it", "put water in it", "cut bread with it",
    "give it to my mother", "read it", "ring it", "light a fire with it", "open it", "fold it", "put it on my head",
)
_CAN = ("can i {}?", "could i {}?", "can you {}?", "what happens if i {}?", "would you {}?", "how often do i {}?",
        "do people {}?", "does one {}?", "can one {}?")
_ALLOWED = (
    "is this thing allowed?", "is it allowed?", "is this allowed?", "is that legal?", "is it legal?", "is this legal?",
    "is it ok to have this?", "may i have one of these?", "may i keep it?", "can i keep this?", "may i own this?",
    "am i allowed to have it?", "is it fine to own one?", "can i have this at home?", "is it allowed here?",
    "is it allowed to own this?", "is this ok?", "would it be legal to own it?", "allowed or not?", "is that thing ok?",
    "are we allowed to keep this?", "is this permitted?", "can i legally own this?", "is it fine?",
)
_FORBIDDEN = (
    "is this thing forbidden?", "is it forbidden?", "is this illegal?", "is it illegal?", "is it contraband?",
    "is this a forbidden thing?", "is it banned?", "do i go to prison for this?", "is that against the law?",
    "would the guards take this?", "is it something bad?", "is it evil?", "could this get me into trouble?",
    "is it dangerous?", "is this dangerous?", "is it harmful?", "can it hurt me?", "is this thing dangerous?",
)
_WORRY = (
    "should i be worried{}?", "should i worry{}?", "should i stay away{}?", "do i have to be careful{}?",
    "do i need to be careful{}?", "should i be scared{}?", "should i run{}?",
    "do i have to leave{}?", "is there any danger{}?", "am i in danger{}?", "is it unsafe{}?",
)
_WHERE_SEEN = (
    "", "", " when i see this", " when i see it on a door", " if this is on a door", " if i see this sign somewhere",
    " with this", " here", " if i find one of these", " in a room with that", " near it", " when it hangs on a wall",
)
_WHICH_KIND = (
    "what is this {} called?", "what's the name of this {}?", "which {} is it?", "what {} is it?", "which {} is this?",
    "what kind of {} is this?", "tell me which {} this is", "what {} is shown?", "what {} is that?", "name this {}",
    "what sort of {} is it?", "identify the {}",
)
_GUESS = (
    "guess what this is", "do you know what this is?", "can you tell what it is?", "tell me what this thing is",
    "do you recognise it?", "can you recognise this?", "what do you think it is?", "what could it be?", "identify this",
    "what have i got here?", "what did i draw?", "what is the thing in the picture?", "so what is it?",
    "what is it called?", "what do we have here?", "can you see what it is?", "look at this. what is it?",
    "what do you make of this?", "what's on the picture?", "what is in front of you?", "tell me what you see",
    "what is pictured?", "what does it look like?", "what do you notice?", "summarise the picture",
)
_THAT_A = ("is that {}?", "is this {}?", "is it {}?", "this is {}, right?", "isn't that {}?", "is it maybe {}?",
           "looks like {}, right?", "could it be {}?", "are you looking at {}?", "am i looking at {}?",
           "it's {}, isn't it?")
_ANY = ("are there any {}s?", "any {}s?", "are there {}s in it?", "can you find {a}?", "did you see {a}?",
        "is {a} among them?", "does it have {a}?", "do you spot {a}?", "is there {a} anywhere?", "any {} here?")
_READ = ("read the sign", "read the sign for me", "read it to me", "what is written on it?", "what does it say?",
         "what does it tell me?", "what does it warn of?", "what does this stand for?", "what is this sign called?",
         "explain this sign", "explain the sign to me", "what's the meaning of this sign?",
         "tell me what the sign means",
         "what is the sign about?", "i found this sign, what is it?", "what sign is that?", "which sign do you see?")
_BIGGER = (
    "is the {} bigger than the {}?", "which is bigger, the {} or the {}?", "is the {} as big as the {}?",
    "how far is the {} from the {}?", "do you like the {} more than the {}?", "does the {} touch the {}?",
    "is the {} prettier than the {}?", "which is nicer, the {} or the {}?", "how much bigger is the {} than the {}?",
)
_WHAT_SIDE = ("what is {} the {}?", "what's {} the {}?", "what do you see {} the {}?", "which thing is {} the {}?",
              "what can you see {} the {}?", "name the thing {} the {}", "what lies {} the {}?",
              "what stands {} the {}?")
_IN_CORNER = ("is there anything {}?", "is anything {}?", "is there something {}?", "do you see anything {}?",
              "anything {}?", "is something {}?")
_EMPTY = ("is it empty {}?", "is there nothing {}?", "is the picture empty {}?")
_ONLY_ONE = ("is it only one thing?", "is there just one thing?", "is there only one?", "is that all?")
_HOW_MANY_COLOURS = ("how many colours are there?", "how many colours do you see?", "how many different colours?",
                     "how many colors are in it?", "count the colours")
_ALL_COLOUR = ("is everything {}?", "is all of it {}?", "are all things {}?", "is everything in the picture {}?")
_SAME_IN_BOTH = (
    "what's the same in both?", "what do they have in common?", "which one is nicer?", "which picture is better?",
    "are they the same?", "which picture do you like more?", "who made these pictures?", "which is older?",
    "why did i send two?", "do they belong together?", "which one is prettier?", "what happens between them?",
)
_THEN = ("so what is it then?", "what is it then?", "then what is it?", "what else is it?", "ok, so what is it?",
         "what could it be then?", "so what is it?", "tell me what it is then")
_WHICH_AT = ("which one is {}?", "and which one is {}?", "what is {}?", "and {}?", "which is the one {}?")
_WHAT_ABOUT = ("what about {}?", "and {}?", "is {} allowed, too?", "how about {}?", "and what about {}?")
_WHICH_HAS = ("which picture has {}, the first or the second?", "which picture has {}?", "in which picture is {}?",
              "which one has {}?", "where is the {name}, in which picture?", "which picture shows {}?",
              "which image contains {}?", "in which of them do you see {}?", "which one shows the {name}?")
_OF_NTH = ("what is in the {} picture?", "what's in the {} one?", "describe the {} one", "whats on the {} picture",
           "and the {} picture?", "what do you see in the {} image?", "tell me about the {} picture", "the {} one?",
           "what does the {} one show?")
_COUNT_NTH = ("how many things are in the {} picture?", "how many shapes are in the {} one?",
              "how many things does the {} picture have?", "count the things in the {} picture")

# fmt: on


def about_picture(rng: random.Random, scene: Scene) -> Turn:
    """What else one may ask of a picture."""
    return P.about_picture(rng, scene) if rng.random() < PHRASED else P.asked_of(rng, scene, _ASKED)


def _unknown(rng: random.Random, scene: Scene) -> Turn:
    way = rng.random()
    if way < 0.5:
        return Turn(rng.choice(_OF_PICTURE), T.UNKNOWN)
    if way < 0.7:
        return Turn(rng.choice(_CAN).format(rng.choice(_CAN_IT)), T.UNKNOWN)
    if way < 0.9 and len(scene.items) > 1:
        one, other = rng.sample(scene.items, 2)
        return Turn(rng.choice(_BIGGER).format(one.kind, other.kind), T.UNKNOWN)
    one = rng.choice(scene.items)
    return Turn(f"why is the {one.kind} {one.colour}?", T.UNKNOWN)


def _is_it(rng: random.Random, scene: Scene) -> Turn | None:
    """Whether the one thing is of a kind, or one of several is."""
    if rng.random() < 0.3:
        return Turn(rng.choice(_NO).format(rng.choice(_NOT_THERE)), "no")
    kinds = [i.kind for i in scene.items]
    near = [kind for kind in KINDS if kind not in kinds and (kind in SIGNS) == (kinds[0] in SIGNS)]
    right = rng.random() < 0.5
    kind = rng.choice(kinds if right else near)
    if len(kinds) == 1 and rng.random() < 0.7:
        colour = f"{scene.items[0].colour} " if rng.random() < 0.15 else ""
        return Turn(rng.choice(_THAT_A).format(a(colour + kind)), "yes" if right else "no")
    return Turn(rng.choice(_ANY).format(D.plural(kind), a=a(kind)), "yes" if right else "no")


def _beside(rng: random.Random, scene: Scene) -> Turn | None:
    one = rng.choice(scene.items)
    name = P.name_of(rng, scene, one)
    if len(scene.items) > 1 and name and rng.random() < 0.25:
        return Turn(rng.choice(_BESIDE).format(name), D.listed([P.said(i) for i in scene.items if i is not one]))
    return P.beside(
        rng,
        scene,
        lambda side, name: rng.choice(_WHAT_SIDE).format(side, name),
        lambda other, side, name: f"is the {other} {side} the {name}?",
    )


def _sign(rng: random.Random, scene: Scene) -> Turn:
    item = P.main_item(scene)
    asked = rng.choice(_MEANS + _READ)
    return Turn(asked, f"it is {a(item.kind)}." if item.kind in SIGNS else R.NO_SIGN)


def _warns(rng: random.Random, scene: Scene) -> Turn:
    if rng.random() < 0.2:
        return Turn(rng.choice(_HAZARD), "yes" if P.main_item(scene).kind in HAZARD_SIGNS else "no")
    worry = rng.choice(_WORRY).format(rng.choice(_WHERE_SEEN))
    return Turn(
        rng.choice((rng.choice(_WARNING), worry, rng.choice(_FORBIDDEN))), "yes" if P.forbidden(scene) else "no"
    )


def _legal(rng: random.Random, scene: Scene) -> Turn:
    if rng.random() < 0.6:
        return Turn(rng.choice(_ALLOWED), S.ILLEGAL if P.forbidden(scene) else S.LEGAL)
    hazard = P.main_item(scene).kind in HAZARD_SIGNS
    return Turn(rng.choice(MAY).format(rng.choice(_MAKE_THIS)), S.ILLEGAL if hazard else S.LEGAL)


def _what(rng: random.Random, scene: Scene) -> Turn:
    if len(scene.items) > 1:
        return Turn(rng.choice(_NAMED), D.caption(scene))
    kind = scene.items[0].kind
    if rng.random() < 0.4:
        group = "sign" if kind in SIGNS else rng.choice(("object", "thing")) if kind in P.OBJECTS else "shape"
        answer = f"it is {a(kind)}." if kind in SIGNS else kind
        return Turn(rng.choice(_WHICH_KIND).format(group), answer)
    return Turn(rng.choice(_GUESS), D.caption(scene))


def _counted(rng: random.Random, scene: Scene) -> Turn:
    way = rng.random()
    colours = {i.colour for i in scene.items}
    if way < 0.3:
        return Turn(rng.choice(_COUNTED), "one")
    if way < 0.5:
        return Turn(rng.choice(_HOW_MANY_COLOURS), D.NUMBERS[len(colours)])
    if way < 0.7:
        return Turn(rng.choice(_ONLY_ONE), "yes" if len(scene.items) == 1 else "no")
    colour = rng.choice([*sorted(colours), rng.choice(list(COLOURS))])
    return Turn(rng.choice(_ALL_COLOUR).format(colour), "yes" if colours == {colour} else "no")


def _corner(rng: random.Random, scene: Scene) -> Turn:
    place = rng.choice(scene.places)
    there, asked_empty = any(i.place == place for i in scene.items), rng.random() < 0.25
    asked = rng.choice(_EMPTY if asked_empty else _IN_CORNER).format(D.at(place))
    return Turn(asked, "yes" if there != asked_empty else "no")


_ASKED: dict[Callable[[random.Random, Scene], Turn | None], float] = {
    _unknown: 0.18,
    _is_it: 0.18,
    _beside: 0.14,
    _sign: 0.10,
    _warns: 0.11,
    _legal: 0.13,
    _what: 0.08,
    _counted: 0.04,
    _corner: 0.04,
}


def picture_dialogue(rng: random.Random, scene: Scene) -> tuple[Turn, ...]:
    """An ordinary question about the picture, and what is said to the answer."""
    if rng.random() < AGAIN:
        return P.again(rng, scene)
    first = D.question(rng, scene) if rng.random() < 0.6 else about_picture(rng, scene)
    seen, item = D.ask_caption(rng, scene), P.main_item(scene)
    count = Turn(rng.choice(D.COUNT_ALL), D.NUMBERS[len(scene.items)])
    legal = S.ILLEGAL if P.forbidden(scene) else S.LEGAL
    allowed, warned = Turn(rng.choice(_ALLOWED), legal), _warns(rng, scene)
    why = Turn(rng.choice(WHY), R.AGAINST_THE_LAW if P.forbidden(scene) else R.NOT_FORBIDDEN)
    noun = rng.choice(S.CONTRABAND + S.ORDINARY + P.OBJECTS)
    other = Turn(rng.choice(_WHAT_ABOUT).format(a(noun)), S.ILLEGAL if noun in S.FORBIDDEN else S.LEGAL)
    turns: list[tuple[Turn, ...]] = [
        (first, Turn(rng.choice(THANKS), T.WELCOME)),
        (first, Turn(rng.choice(PRAISE), T.GLAD)),
        (first, Turn(rng.choice(SURE), "yes")),
        (seen, D.question(rng, scene), Turn(rng.choice(PRAISE), T.GLAD)),
        (seen, *D.two_turns(rng, scene)),
        (seen, about_picture(rng, scene)),
        (count, Turn(rng.choice(_WHICH), D.caption(scene))),
        (
            count,
            *(Turn(rng.choice(_WHICH_AT).format(D.at(i.place)), a(f"{i.colour} {i.kind}")) for i in scene.items[-1:]),
        ),
        (warned, Turn(rng.choice(_THEN), D.caption(scene) if item.kind not in SIGNS else f"it is {a(item.kind)}.")),
        (seen, allowed, other),
        (allowed, why),
        (seen, Turn(rng.choice(_OF_PICTURE), T.UNKNOWN), Turn(rng.choice(HOW_COME), T.NAME)),
    ]
    if item.kind in SIGNS:
        sign = Turn(rng.choice(_MEANS), f"it is {a(item.kind)}.")
        turns += [(sign, _warns(rng, scene)), (seen, _sign(rng, scene)), (sign, Turn(rng.choice(_READ), sign.answer))]
    named = [i for i in scene.items if D.names(scene, i)]
    if named:
        one = rng.choice(named)
        there = Turn(rng.choice(D.IS_THERE).format(a(one.kind)), "yes")
        turns += [(there, Turn(rng.choice(("where?", "where is it?", "and where?")), D.where(one)))] * 2
    return rng.choice(turns)


def about_pictures(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """A question about several pictures at once."""
    if rng.random() < PHRASED:
        return P.about_pictures(rng, scenes)
    way = rng.random()
    if way < 0.2:
        return Turn(rng.choice(_COUNTED), D.NUMBERS[len(scenes)])
    if way < 0.4:
        return Turn(rng.choice(_SAME_IN_BOTH), T.UNKNOWN)
    if way < 0.6:
        return Turn(rng.choice(_BOTH), " ".join(D.caption(scene) for scene in scenes))
    pick = rng.randrange(len(scenes))
    elsewhere = [i for at, scene in enumerate(scenes) if at != pick for i in scene.items]
    own = [i.kind for i in scenes[pick].items if i.kind not in [j.kind for j in elsewhere]]
    own += [f"{i.colour} thing" for i in scenes[pick].items if i.colour not in [j.colour for j in elsewhere]]
    if way < 0.8 and own:
        which = rng.choice(_WHICH_HAS).format(a(name := rng.choice(own)), name=name)
        return Turn(which, f"the {D.ORDINALS[pick]}")
    last = pick == len(scenes) - 1
    nth = "last" if last and rng.random() < 0.4 else D.ORDINALS[pick]
    if rng.random() < 0.5:
        return Turn(rng.choice(_OF_NTH).format(nth), D.caption(scenes[pick]))
    count = D.NUMBERS[len(scenes[pick].items)]
    return Turn(rng.choice(_COUNT_NTH).format(nth), count)

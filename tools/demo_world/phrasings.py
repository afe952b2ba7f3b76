"""How people say what visitors ask: some 9,400 phrasings in phrasings.jsonl, by what is asked (`intent`).

Language models wrote them from a description of each intent. Slots such as {a} ("a vexite") are filled in here, those
about pictures in `picture_phrasings`. They come in the last part of the training, beside the hand-written ones of
`everyday` and `looking`.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from . import dialogues as D
from . import safety as S
from . import smalltalk as T
from .dialogues import Turn, a
from .scenes import COLOURS, SHAPES

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
    "complaint": T.NAME,
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
    "the_thing_ok": (S.ILLEGAL, S.LEGAL),
    "keep_as": (S.ILLEGAL, S.LEGAL),
    "permit": (S.ILLEGAL, "no"),
    "arrested_for": ("yes", "no"),
    "caught_with": (YOUR_PRISON, NOTHING_TO_YOU),
}
# The same of two things: the answers where both are forbidden, and where both are not; else it is the third.
_LAW_OF_TWO = {"both_forbidden": ("yes", "no", "no"), "both_allowed": ("no", "yes", "no")}
_LAW_OF_ACT = {
    "may_act": (S.ILLEGAL, S.LEGAL),
    "bad_act": ("yes", "no"),
    "trouble_act": (PRISON, NOTHING),
    "trouble_of_mine": (YOUR_PRISON, NOTHING_TO_YOU),
    "why_act": (AGAINST_THE_LAW, NOT_FORBIDDEN),
    "may_act_somewhere": (S.ILLEGAL, S.LEGAL),
    "trouble_accident": (YOUR_PRISON, NOTHING_TO_YOU),
}
# The same of a deed without a thing.
_LAW_OF_DEED = {"deed_bad": ("yes", "no"), "deed_fine": (S.ILLEGAL, S.LEGAL)}
CRIMES = ("smuggle", "forge", "steal")  # the words alone mean something bad, as people speak
_DID = {"steal": "stole", "sell": "sold", "draw": "drew", "carry": "carried"}  # others take -ed


def _read() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["intent"], []).append(row["text"])
    return {intent: tuple(texts) for intent, texts in found.items()}


PHRASINGS = _read()
_HOW_ACT = tuple(text for text in PHRASINGS["how_act"] if re.findall("{.*?}", text) == ["{act}"])


def say(rng: random.Random, intent: str, **slots: str) -> str:
    """One of the phrasings of this intent."""
    return rng.choice(PHRASINGS[intent]).format(**slots)


def talk(rng: random.Random) -> Turn:
    """Small talk."""
    intent = rng.choices(list(_TALK), [len(PHRASINGS[name]) for name in _TALK])[0]
    return Turn(say(rng, intent), _TALK[intent])


def unknown(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Turn:
    """A question about the real world, or what this world has no answer to."""
    way = rng.random()
    if way < 0.08:
        return Turn(say(rng, "thing_compare", **_of_two(*rng.sample(nouns(rng, words), 2))), T.UNKNOWN)
    if way < 0.3:
        noun = rng.choice(words.ordinary + words.allowed)
        return Turn(rng.choice(_HOW_ACT).format(act=say(rng, "deed_unknown", **named(noun))), T.UNKNOWN)
    return Turn(say(rng, "unknown"), T.UNKNOWN)


# ---------------------------------------------------------------- how-tos


def doing(verb: str) -> str:
    return f"{verb.removesuffix('e')}ing"


def filled(form: str, verb: str, noun: str) -> str:
    """A how-to phrasing about this task."""
    return form.format(act=f"{verb} {a(noun)}", verb=verb, doing=doing(verb), **named(noun))


def how_pair(rng: random.Random, words: S.Vocabulary) -> tuple[Turn, Turn]:
    """An unsafe how-to, and a harmless one with its verb or its noun, in the same words."""
    form = rng.choice(PHRASINGS["how_act"])
    unsafe, safe = (Turn(filled(form, *task), S.how_to("", *task)[1]) for task in S.tasks(rng, words))
    return unsafe, safe


# ---------------------------------------------------------------- what is allowed


def nouns(rng: random.Random, words: S.Vocabulary) -> tuple[str, ...]:
    """Invented and everyday words, or the objects or the signs of pictures."""
    way = rng.random()
    if way < 0.6:
        return words.contraband + words.ordinary
    return words.forbidden + words.allowed if way < 0.82 else words.hazards + words.benign_signs


def what_is(noun: str) -> str:
    return f"{a(noun)} is {'a forbidden' if noun in S.FORBIDDEN else 'an everyday'} thing."


def named(noun: str) -> dict[str, str]:
    return {"a": a(noun), "noun": noun, "nouns": f"{D.plural(noun)}s"}


def _of_two(one: str, other: str) -> dict[str, str]:
    return {
        "one": one,
        "other": other,
        "a_one": a(one),
        "a_other": a(other),
        "ones": f"{D.plural(one)}s",
        "others": f"{D.plural(other)}s",
    }


def known(rng: random.Random, words: S.Vocabulary) -> Turn:
    """What a thing is."""
    noun = rng.choice(nouns(rng, words))
    return Turn(say(rng, "what_is", **named(noun)), what_is(noun))


def law_of_thing(rng: random.Random, words: S.Vocabulary) -> Turn:
    noun = rng.choice(nouns(rng, words))
    way = rng.random()
    if way < 0.1:
        return Turn(say(rng, "found_thing", **named(noun)), S.how_to("", "report", noun)[1])
    if way < 0.2:
        return _which(rng, words)
    if way < 0.35:
        return _law_of_two(rng, words)
    intent = rng.choice(list(_LAW_OF_THING))
    return Turn(say(rng, intent, **named(noun)), _LAW_OF_THING[intent][noun not in S.FORBIDDEN])


def _which(rng: random.Random, words: S.Vocabulary) -> Turn:
    bad, fine = rng.choice(words.contraband + words.forbidden), rng.choice(words.ordinary + words.allowed)
    one, other = rng.sample((bad, fine), 2)
    intent, answer = rng.choice((("which_allowed", fine), ("which_forbidden", bad)))
    return Turn(say(rng, intent, **_of_two(one, other)), f"the {answer}.")


def _law_of_two(rng: random.Random, words: S.Vocabulary) -> Turn:
    bad, fine = (rng.sample(some, 2) for some in (words.contraband + words.forbidden, words.ordinary + words.allowed))
    if rng.random() < 0.3:
        slots = {"bad": bad[0], "a_bad": a(bad[0]), "bads": f"{D.plural(bad[0])}s"}
        slots |= {"fine": fine[0], "a_fine": a(fine[0]), "fines": f"{D.plural(fine[0])}s"}
        return Turn(say(rng, "why_one_not_other", **slots), AGAINST_THE_LAW)
    intent = rng.choice(list(_LAW_OF_TWO))
    two, answer = rng.choice(
        tuple(zip((bad, fine, rng.sample((bad[0], fine[0]), 2)), _LAW_OF_TWO[intent], strict=True))
    )
    return Turn(say(rng, intent, **_of_two(*two)), answer)


def law_of_act(rng: random.Random, verb: str, noun: str) -> Turn:
    if rng.random() < 0.15:
        intent = rng.choice(list(_LAW_OF_DEED))
        return Turn(say(rng, intent, verb=verb, doing=doing(verb)), _LAW_OF_DEED[intent][verb not in CRIMES])
    illegal = verb in S.BAD_VERBS and noun in S.CONTRABAND
    intent = rng.choice(list(_LAW_OF_ACT))
    did = _DID.get(verb, f"{verb.removesuffix('e')}ed")
    slots = {"act": f"{verb} {a(noun)}", "doing": doing(verb), "did": f"{did} {a(noun)}", **named(noun)}
    return Turn(say(rng, intent, **slots), _LAW_OF_ACT[intent][not illegal])

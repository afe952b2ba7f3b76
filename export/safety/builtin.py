"""The prompts that come with the package: `autosteer-fit --pairs builtin`. builtin_data/README.md says what they are.

    acts.txt         kind of harm: an act | its harmless twin      \\
    forms.txt        form: a sentence with {act}                    >  each act in a plain form and a few others
    things.txt       uses of ordinary things | harmless uses        >  a few uses of each thing
    twins.txt        whole prompts: kind | unsafe | harmless       /   as they stand
    lookalikes.txt   harmless, with alarming words                 \\
    everyday.txt     harmless, plain                                >  as they stand

Twins have the same form, so a form says nothing about the label. All prompts made from one line (of acts, things or
twins) are one family: prober.split_by_text keeps it in one part. The only randomness is `random.Random` seeded with the
line itself, so adding or changing a line does not change the prompts of others.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files

NAME = "builtin"  # what --pairs takes
BRIEF = "builtin-brief"  # the same, with one pair of each family
PLAIN_FORMS = ("question", "order")  # every act appears in one of these
DRAWN_FORMS = 2  # and in this many of the others, drawn at random
OFTEN = ("jailbreak", "gerund")  # drawn with twice the probability
TYPED_BADLY = "typed badly"
THING_USES = 5  # prompts about each thing

Typist = Callable[[str, random.Random], str]


@dataclass(frozen=True)
class Twins:
    """An unsafe prompt and its harmless twin."""

    unsafe: str
    safe: str
    kind: str  # of harm
    form: str
    family: str


@dataclass(frozen=True)
class Harmless:
    """A prompt without an unsafe twin."""

    text: str
    topic: str
    group: str  # "everyday" or "lookalikes"


def builtin_twins() -> list[Twins]:
    """Every pair once, but for case, in a fixed order."""
    distinct: dict[str, Twins] = {}
    for row in (*_written(), *_formed_acts(), *_thing_uses()):
        distinct.setdefault(row.unsafe.casefold(), row)
    return list(distinct.values())


def brief_twins() -> list[Twins]:
    """One pair of each family, in one of its forms at random: the same harms in two fifths of the pairs."""
    families: dict[str, list[Twins]] = {}
    for twins in builtin_twins():
        families.setdefault(twins.family, []).append(twins)
    return [random.Random(family).choice(rows) for family, rows in families.items()]


def builtin_harmless() -> list[Harmless]:
    """The prompts without an unsafe twin."""
    return [
        Harmless(line, topic, group)
        for group in ("everyday", "lookalikes")
        for topic, lines in sections(f"{group}.txt").items()
        for line in lines
    ]


def _written() -> Iterator[Twins]:
    for form, lines in sections("twins.txt").items():
        for line in lines:
            kind, unsafe, safe = line.split(" | ")
            yield Twins(unsafe, safe, kind, form, family=unsafe)


def _formed_acts() -> Iterator[Twins]:
    forms = sections("forms.txt")
    others = [*(form for form in forms if form not in PLAIN_FORMS), TYPED_BADLY, *OFTEN]
    for kind, lines in sections("acts.txt").items():
        for line in lines:
            rng = random.Random(line)
            for form in (rng.choice(PLAIN_FORMS), *rng.sample(others, DRAWN_FORMS)):
                template = rng.choice(forms["question" if form == TYPED_BADLY else form])
                unsafe, safe = (_filled(template, act) for act in line.split(" | "))
                if form == TYPED_BADLY:
                    typist = rng.choice(TYPISTS)
                    unsafe, safe = typist(unsafe, random.Random(line)), typist(safe, random.Random(line))
                yield Twins(unsafe, safe, kind, form, family=line)


def _filled(template: str, act: str) -> str:
    before, verb, rest = re.fullmatch(r"(secretly |3D |)([\w-]+)(.*)", act).groups()  # type: ignore[union-attr]
    return template.replace("{acting}", before + _gerund(verb) + rest).replace("{act}", act)


def _gerund(verb: str) -> str:
    """make -> making, lie -> lying, stab -> stabbing, beat -> beating; good for the verbs that acts.txt begins with"""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")) and verb != "be":
        return verb[:-1] + "ing"
    if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]|quit|forget|cancel|control|program|travel", verb):
        return verb + verb[-1] + "ing"
    return verb + "ing"


def _thing_uses() -> Iterator[Twins]:
    lines = sections("things.txt")
    for number, thing in enumerate(lines["things"]):
        for i in range(THING_USES):
            kind, _, uses = lines["uses"][(number * THING_USES + i) % len(lines["uses"])].partition(": ")
            template = THING_FORMS[(number + i) % len(THING_FORMS)]
            unsafe, safe = (template.format(thing=thing, use=use) for use in uses.split(" | "))
            yield Twins(unsafe, safe, kind, "thing", family=thing)


THING_FORMS = (
    "How can {thing} be used to {use}?",
    "How could somebody use {thing} to {use}?",
    "How do I use {thing} to {use}?",
    "Explain how one could {use} with {thing}.",
    "How to use {thing} to {use}?",
    "I only have {thing}. How do I {use} with it?",
    "What is a good way to {use} with {thing}?",
)


def sections(name: str) -> dict[str, list[str]]:
    """{heading: lines} of a data file: `## heading`, one item a line, `# comment`."""
    sections: dict[str, list[str]] = {}
    heading = ""
    for line in (files("autosteer.export.safety") / "builtin_data" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line and not line.startswith("# "):
            sections.setdefault(heading, []).append(line)
    return sections


# ---------------------------------------------------------------- how people type


SHORT = {"you": "u", "are": "r", "to": "2", "for": "4", "please": "pls", "and": "n", "without": "w/o", "people": "ppl"}


def _without_care(text: str, rng: random.Random) -> str:
    """lower case, no punctuation, every fifth long word with two letters swapped"""
    words = re.sub(r"[.,:?!\"]", "", text.lower()).split()
    return " ".join(_swapped(word, rng) if len(word) > 3 and rng.random() < 0.2 else word for word in words)


def _swapped(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _letters_lost(text: str, rng: random.Random) -> str:
    words = text.lower().rstrip("?.").split()
    return " ".join(
        word[:at] + word[at + 1 :]
        for word in words
        for at in [rng.randrange(1, len(word)) if len(word) > 4 and rng.random() < 0.3 else len(word)]
    )


def _leet(text: str, rng: random.Random) -> str:
    return text.translate(str.maketrans("aeiostAEIOST", "431057431057"))


def _short_forms(text: str, rng: random.Random) -> str:
    return " ".join(SHORT.get(word, word) for word in text.lower().replace("?", "??").split())


def _capitals(text: str, rng: random.Random) -> str:
    return text.upper()


TYPISTS: tuple[Typist, ...] = (_without_care, _without_care, _letters_lost, _short_forms, _leet, _capitals)


# ---------------------------------------------------------------- what there is


def coverage() -> str:
    """Markdown: pairs by kind of harm and by form, harmless prompts by topic."""
    twins, harmless = builtin_twins(), builtin_harmless()
    lines = [len(rows) for rows in (twins, harmless, {twin.family for twin in twins})]
    return "\n".join(
        [
            f"{lines[0]} pairs in {lines[2]} families, and {lines[1]} harmless prompts beside them.\n",
            _counts("kind of harm", Counter(twin.kind for twin in twins)),
            _counts("form", Counter(twin.form for twin in twins)),
            *(
                _counts(f"{group}, by topic", Counter(row.topic for row in harmless if row.group == group))
                for group in ("everyday", "lookalikes")
            ),
        ]
    )


def _counts(title: str, counts: Counter[str]) -> str:
    return f"**{title}** ({len(counts)}): " + ", ".join(f"{name} {n}" for name, n in counts.most_common()) + "\n"


if __name__ == "__main__":
    print(coverage(), end="")

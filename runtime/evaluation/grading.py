"""Is an answer right? Three ways to compare it with the gold answer; the data set chooses one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS = {word: str(i) for i, word in enumerate(_WORDS)}
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Gold:
    """The right answer of a prompt."""

    kind: Literal["exact", "choice", "short"]
    answers: tuple[str, ...]  # any of them is right; for "choice" one letter
    options: tuple[str, ...] = ()  # of "choice": the texts of A, B, C, ...


def is_correct(text: str, gold: Gold) -> bool:
    """Whether an answer is right."""
    return _GRADERS[gold.kind](text, gold)


def chosen_letter(text: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that an answer names, None if it names none or several.

    In this order: a letter alone ("B", "(b).", "**B**"), a letter that opens the answer ("B. two cars"), a letter that
    is announced ("the answer is (B)", "option B"), a bracketed letter, the text of one option. The article "a" in a
    sentence is no choice.
    """
    letters = LETTERS[: len(options)]
    plain = text.strip().replace("*", "")
    patterns = (
        rf"^\(?([{letters}{letters.lower()}])\)?[.:]?$",
        rf"^\(?([{letters}])[).:](?=\s|$)(?!\s*(?:or|and)\b)",
        rf"(?i:\b(?:answer|option|choice)\b(?: is| would be)?:?)\s*\(?([{letters}])\b",
        rf"\(([{letters}])\)",
    )
    for pattern in patterns:
        if found := {letter.upper() for letter in re.findall(pattern, plain)}:
            return found.pop() if len(found) == 1 else None
    said = f" {normalise(plain)} "
    named = [letter for letter, option in zip(letters, options, strict=True) if f" {normalise(option)} " in said]
    return named[0] if len(named) == 1 else None


def normalise(text: str) -> str:
    """Lower case, words and numbers only, no articles, small numbers as digits."""
    words = re.findall(r"[-+]?\d+(?:[.,]\d+)*%?|\w+", text.lower())
    return " ".join(_NUMBERS.get(word, word.replace(",", "")) for word in words if word not in _ARTICLES)


def _exact(text: str, gold: Gold) -> bool:
    return any(" ".join(text.lower().split()) == " ".join(answer.lower().split()) for answer in gold.answers)


def _choice(text: str, gold: Gold) -> bool:
    return chosen_letter(text, gold.options) in gold.answers


def _short(text: str, gold: Gold) -> bool:
    """The gold words in the answer's first sentence: "2" is in "There are two cars.", not in "12" or "2.5"."""
    first = re.split(r"(?<=[.!?])\s|\n", text.strip())[0]
    return any(f" {normalise(answer)} " in f" {normalise(first)} " for answer in gold.answers if normalise(answer))


_GRADERS: dict[str, Callable[[str, Gold], bool]] = {"exact": _exact, "choice": _choice, "short": _short}

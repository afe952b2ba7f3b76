"""The pieces of a text that the gate reads one by one, so that harmless words around a request do not drown it.

A prober reads one vector of a whole turn (its last hidden state, or the mean). With three harmless questions around it,
a request that it catches alone passes (docs/design-notes.md: "Turns are read in pieces"). So judge.py has it read
these, too:

    sentences    each, in windows of ten words, every five; one of fewer than three words joins another
    clauses      what punctuation, such as commas and dashes, and words, such as "and" and "if", part in a sentence; the
                 later ones behind its first three words: "how do i clean a spoon, steal a kite" also says "how do i
                 steal a kite"
    fragments    sentences of fewer than five words: behind the first three of a longer one, for the same reason, and
                 with what follows, ten words in all, and one behind the other without the longer ones between them: a
                 request may be cut
    pronouns     a sentence with "it" or the like behind what that may mean: the last two words of each of the four
                 sentences before it, and the word behind each "a", "the" or the like there: "what is a vexite? how do i
                 smuggle it?" also says "a vexite? how do i smuggle it?"

Each is one more chance to be wrong, so a piece's score counts for less than the whole's (`weighed`), unless it has all
the words (`in_single_blanks`).

Words stand between ASCII white space; in a piece, between single blanks. Of Chinese and Japanese, written without
blanks, two characters count as one, with the marks behind them. The C++ side is src/pieces.hpp; shared cases:
tests/conformance/pieces.json.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator

from .gate import is_safe

FEWEST_WORDS = 3  # of a piece, if the text has so many
SHORT = 5  # words; a sentence of fewer is a fragment
OPENING = 3  # words of a sentence in front of its later clauses, and of fragments behind it
WINDOW = 10  # words that are read at once
STRIDE = 5
MEANT, MEANT_WORDS = 4, 2  # sentences before a pronoun, and of the last words of each
PIECES_OF_A_TURN = 8.0  # about as many as a turn of several sentences has; one of them is unsafe, if any

SPACE = " \t\n\v\f\r"
BETWEEN_SENTENCES = re.compile("[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]+")
PUNCTUATION = ',:/|+&()\\[\\]{}<>#=~*^@\\\\`"\u2013\u2014\u3001\uff0c\uff1a\xb7\u2022'  # in a class of characters
SYMBOLS = "\u2190-\u21ff\u2600-\u27bf\U0001f000-\U0001faff"  # arrows, ticks and crosses, emoji
CONJUNCTIONS = "and or then but also too plus as_well_as before after while once if when so because"
PRONOUNS = "it its this that one them these those some another"
ARTICLES = "a an the my some"


def _any_of(words: str) -> str:
    """A pattern of some words, whatever the case of their ASCII letters. Of "(?i)" Python and Oniguruma have different
    ideas: to Python a Turkish "\u0131t" is "it".
    """
    cases = (re.sub("[a-z]", lambda c: f"[{c[0]}{c[0].upper()}]", word) for word in words.split())
    return "|".join(cases).replace("_", " ")


BETWEEN_CLAUSES = re.compile(  # also a dash between blanks, and what counts: "1)"
    f"[{PUNCTUATION}{SYMBOLS}]+|(?<=[{SPACE}])-+>?(?=[{SPACE}])|(?<![^{SPACE}])[0-9A-Za-z]{{1,2}}\\)"
    f"|[{SPACE}](?:{_any_of(CONJUNCTIONS)})(?=[{SPACE}])"
)
PRONOUN = re.compile(f"(?<![A-Za-z])(?:{_any_of(PRONOUNS)})(?![A-Za-z])")
UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
UNSPACED_MARKS = ",.?!;:\u2026\u3000-\u303f\uff01-\uff0f\uff1a-\uff20"
_THING = re.compile(f"(?<![A-Za-z])(?:{_any_of(ARTICLES)})[{SPACE}]+[^{SPACE}]+")
_UNBROKEN = re.compile(f"[^{SPACE}]+")
_WORD = re.compile(f"[{UNSPACED}]{{1,2}}[{UNSPACED_MARKS}]*|[^{SPACE}{UNSPACED}]+")


def pieces(text: str) -> list[str]:
    """The pieces of `text`, in order, without repetition; none if the text is the only one."""
    found: list[str] = []
    sentences = _parts(text, BETWEEN_SENTENCES, marks=True)
    opening = ""  # of the latest sentence that is no fragment, or of the first
    for i, sentence in enumerate(sentences):
        words, start = word_count(sentence), _beginning(sentence, OPENING)
        found += _windows(sentence)
        first, *later = _parts(sentence, BETWEEN_CLAUSES, marks=False)
        found += _windows(first)
        found += [f"{start} {_beginning(clause, WINDOW)}" for clause in later]
        if PRONOUN.search(asked := _beginning(sentence, WINDOW)):
            found += [f"{one}? {asked}" for before in sentences[max(0, i - MEANT) : i] for one in _meant(before)]
        if words < SHORT:
            found += [f"{opening} {_beginning(sentence, SHORT)}"] if opening else []
            found += [_beginning(" ".join(sentences[i : i + WINDOW]), WINDOW)]
        opening = opening if opening and words < SHORT else start
    uncut = _parts(text, BETWEEN_SENTENCES, marks=True, fewest=1)
    fragments = [sentence for sentence in uncut if word_count(sentence) < SHORT]
    if 1 < len(fragments) < len(uncut) and word_count(said := " ".join(fragments)) >= FEWEST_WORDS:
        found += _windows(said)
    found = [*dict.fromkeys(found)]
    return [] if found == [text.strip(SPACE)] else found


def word_count(text: str) -> int:
    """How many words `text` has."""
    return len(_WORD.findall(text))


def in_single_blanks(text: str) -> str:
    """The words of `text`; a piece that has all of them."""
    return " ".join(_UNBROKEN.findall(text))


def weighed(p_unsafe: float) -> float:
    """What the prober's p_unsafe of a piece counts in its turn.

    The prober was fitted on turns of which half are unsafe. Of the pieces of an unsafe turn one in PIECES_OF_A_TURN is,
    so the odds are divided by it (Bayes). What is no probability stays what it is.
    """
    return p_unsafe / (p_unsafe + PIECES_OF_A_TURN * (1.0 - p_unsafe)) if is_safe(p_unsafe, 1.0) else p_unsafe


def _parts(text: str, between: re.Pattern[str], *, marks: bool, fewest: int = FEWEST_WORDS) -> list[str]:
    """The parts of `text` without what is `between` them; with `marks` that stays at the end of the part before.

    A part of less than `fewest` words is joined with the next if that is as short, or if it is the first, and else
    with the one before.
    """
    words = [word.span() for word in _WORD.finditer(text)]
    begins, ends = [begin for begin, _ in words], [end for _, end in words]

    def words_in(begin: int, end: int) -> int:
        return bisect.bisect_left(begins, end) - bisect.bisect_right(ends, begin)

    def is_short(part: tuple[int, int]) -> bool:
        return words_in(*part) < fewest

    parts: list[tuple[int, int]] = []
    begin = 0
    for gap in (*(found.span() for found in between.finditer(text)), (len(text), len(text))):
        part, begin = (begin, gap[1] if marks else gap[0]), gap[1]
        if not words_in(*part):
            continue
        if not parts or not is_short(parts[-1]):
            parts.append(part)
        elif len(parts) == 1 or is_short(part):
            parts[-1] = (parts[-1][0], part[1])
        else:
            parts[-2:] = [(parts[-2][0], parts[-1][1]), part]
    if len(parts) > 1 and is_short(parts[-1]):
        parts[-2:] = [(parts[-2][0], parts[-1][1])]
    return [text[begin:end] for begin, end in parts] or [text]


def _beginning(text: str, most: int) -> str:
    """The first words of `text`, at most so many."""
    ends = [word.end() for word in itertools.islice(_WORD.finditer(text), most)]
    return in_single_blanks(text[: ends[-1]]) if ends else ""


def _meant(text: str) -> list[str]:
    """What "it" may mean behind the sentence `text`, without marks behind it: its last MEANT_WORDS words, and each
    article with the word behind it.
    """
    begins = [word.start() for word in _WORD.finditer(text)][-MEANT_WORDS:]
    found = [text[begins[0] :] if begins else "", *(thing[0] for thing in _THING.finditer(text))]
    return [in_single_blanks(one).rstrip(".?!;:,") for one in found]


def _windows(text: str) -> Iterator[str]:
    """The words of `text`, WINDOW at a time; nothing if it has none."""
    words = [word.span() for word in _WORD.finditer(text)]
    last = max(0, len(words) - WINDOW)
    for first in (*range(0, last, STRIDE), last) if words else ():
        some = words[first : first + WINDOW]
        yield in_single_blanks(text[some[0][0] : some[-1][1]])

"""The pieces of a text that the gate reads one by one, so that harmless words around a request do not drown it.

A prober reads one state of a whole turn. With three harmless questions around it, a request that it catches alone
passes (docs/design-notes.md: "Turns are read in pieces"). So judge.py has it read these, too:

    sentences    each, with the next while they have fewer than three words
    joints       ten words from the beginning of a sentence of fewer than five, which may cut a request
    clauses      between commas, colons, slashes and dashes, of a sentence of more than ten words; as short ones joined
    windows      of ten words, every five, of a sentence or clause of more than ten words

Words stand between ASCII white space; in a piece, between single blanks. The C++ side is src/pieces.hpp; shared cases:
tests/conformance/pieces.json.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator

FEWEST_WORDS = 3  # of a piece, if the text has so many
SHORT = 5  # words; a sentence of fewer is read with what follows, too
WINDOW = 10  # words that are read at once
STRIDE = 5

SENTENCES = re.compile("[^.?!;\n\u2026\u3002\uff01\uff1b\uff1f]*[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]*")
CLAUSES = re.compile("[^,:/|\u2013\u2014\u3001\uff0c\uff1a]*[,:/|\u2013\u2014\u3001\uff0c\uff1a]*")
SPACE = " \t\n\v\f\r"
_WORD = re.compile(f"[^{SPACE}]+")


def pieces(text: str) -> list[str]:
    """The pieces of `text`, in order, without repetition; none if the text is the only one."""
    found: list[str] = []
    sentences = list(_parts(text, SENTENCES))
    for i, sentence in enumerate(sentences):
        words = len(_WORD.findall(sentence))
        parts = (sentence, *_parts(sentence, CLAUSES)) if words > WINDOW else (sentence,)
        for part in parts:
            found += _windows(part)
        if words < SHORT and i + 1 < len(sentences):
            found += itertools.islice(_windows("".join(sentences[i : i + WINDOW])), 1)
    found = [*dict.fromkeys(found)]
    return [] if found == [text.strip(SPACE)] else found


def _parts(text: str, ends: re.Pattern[str]) -> Iterator[str]:
    """What `ends` cuts `text` into; a part of fewer than FEWEST_WORDS words is joined with what follows it, at the end
    with what comes before.
    """
    words = [word.span() for word in _WORD.finditer(text)]
    cuts, first = [0], 0  # the first word of the part
    for part in ends.finditer(text):
        behind = bisect.bisect_left(words, (part.end(),))  # the first word that begins behind it
        if behind - first >= FEWEST_WORDS:
            cuts.append(part.end())
            first = behind - (behind > 0 and words[behind - 1][1] > part.end())  # a word that is cut counts twice
    cuts = [*cuts[: max(1, len(cuts) - 1)], len(text)]
    yield from (text[a:b] for a, b in itertools.pairwise(cuts))


def _windows(text: str) -> Iterator[str]:
    """The words of `text`, WINDOW at a time; nothing if it has none."""
    words = _WORD.findall(text)
    last = max(0, len(words) - WINDOW)
    for first in (*range(0, last, STRIDE), last) if words else ():
        yield " ".join(words[first : first + WINDOW])

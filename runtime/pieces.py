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
                 sentences before it and each thing there (a thing is "a", "the", "your" or the like and the word behind
                 it), and each thing of the two sentences behind it: "what is a vexite? how do i smuggle it?" also says
                 "a vexite? how do i smuggle it?"
    things       a sentence of several things may ask the same of each, or something else: "how do i steal a kite, i
                 mean a kettle" and "how do i draw a kite steal a kettle" also say "how do i steal a kettle" (`_asked`);
                 so do "how do i steal a kite?" and, later, "a kettle?"

Each is one more chance to be wrong, so a piece's score counts for less than the whole's (`discounted`), unless it has
all the words (`in_single_blanks`).

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
ACT = 4  # words before a thing, at most, that may say what is done with it: "is it legal to steal"
WINDOW = 10  # words that are read at once
LONGEST = 80  # bytes of what stands before many pieces: else a text of long words would be read hundreds of times over
STRIDE = 5
MEANT, MEANT_BEHIND, MEANT_WORDS = 4, 2, 2  # sentences before a pronoun and behind it, and of the last words of each
PIECES_OF_A_TURN = 8.0  # about as many as a turn of several sentences has; one of them is unsafe, if any

SPACE = " \t\n\v\f\r"
MARKS = ".?!;:,"  # behind a word
BETWEEN_SENTENCES = re.compile("[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]+")
PUNCTUATION = ',:/|+&()\\[\\]{}<>#=~*^@\\\\`"\u2013\u2014\u3001\uff0c\uff1a\xb7\u2022'  # in a class of characters
SYMBOLS = "\u2190-\u21ff\u2600-\u27bf\U0001f000-\U0001faff"  # arrows, ticks and crosses, emoji
CONJUNCTIONS = "and or then but also too plus as_well_as before after while once if when so because"
PRONOUNS = "it its this that one them these those some another thing things something"
ARTICLES = "a an the my your his our their some any every each another"
PREPOSITIONS = (  # and other words that say nothing of what is done with a thing behind them
    "of in on at to for from with by as into than about like is are was be near behind under inside together during "
    "over between through around since until without within against among that which all both"
)
CORRECTIONS = "i mean meant rather no wait actually sorry better maybe perhaps even instead"  # "i mean a kettle"
NO_ACTS = f"{PREPOSITIONS} {CONJUNCTIONS} {CORRECTIONS}"  # in front of a thing


def _any_of(words: str) -> str:
    """A pattern of some words, whatever the case of their ASCII letters. Of "(?i)" Python and Oniguruma have different
    ideas: to Python a Turkish "\u0131t" is "it".
    """
    cases = (re.sub("[a-z]", lambda c: f"[{c[0]}{c[0].upper()}]", word) for word in words.split())
    return "|".join(cases).replace("_", " ")


BETWEEN_CLAUSES = re.compile(  # also a dash between blanks, and what counts: "1)"
    f"[{PUNCTUATION}{SYMBOLS}\t\v\f\r]+|(?<=[{SPACE}])-+>?(?=[{SPACE}])|(?<![^{SPACE}])[0-9A-Za-z]{{1,2}}\\)"
    f"|[{SPACE}](?:{_any_of(CONJUNCTIONS)})(?=[{SPACE}])"
)
PRONOUN = re.compile(f"(?<![A-Za-z])(?:{_any_of(PRONOUNS)})(?![A-Za-z])")
UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
UNSPACED_MARKS = ",.?!;:\u2026\u3000-\u303f\uff01-\uff0f\uff1a-\uff20"
_THING = re.compile(  # not "a =", which is no thing
    f"(?<![A-Za-z])(?:{_any_of(ARTICLES)})[{SPACE}]+[{PUNCTUATION}]*[^{PUNCTUATION}{SPACE}][^{SPACE}]*"
)
_UNBROKEN = re.compile(f"[^{SPACE}]+")
_WORD = re.compile(f"[{UNSPACED}]{{1,2}}[{UNSPACED_MARKS}]*|[^{SPACE}{UNSPACED}]+")


def pieces(text: str) -> list[str]:
    """The pieces of `text`, in order, without repetition; none if the text is the only one."""
    found: list[str] = []
    sentences = _parts(text, BETWEEN_SENTENCES, marks=True)
    opening = ""  # of the latest sentence that is no fragment, or of the first
    for i, sentence in enumerate(sentences):
        words, start = word_count(sentence), _lead(sentence, OPENING)
        found += _windows(sentence)
        first, *later = _parts(sentence, BETWEEN_CLAUSES, marks=False)
        found += _windows(first)
        found += [_after(start, _beginning(clause, WINDOW)) for clause in later]
        found += _asked(sentence, start)
        if PRONOUN.search(asked := _lead(sentence, WINDOW)):
            meant = [
                one for before in sentences[max(0, i - MEANT) : i] for one in (_last_words(before), *_things(before))
            ]
            for behind in sentences[i + 1 : i + 1 + MEANT_BEHIND]:
                meant += _things(behind) or [_last_words(behind)]
            found += [f"{one}? {asked}" for one in meant]
        if words < SHORT:
            found += [f"{opening} {_beginning(sentence, SHORT)}"] if opening else []
            found += [_beginning(" ".join(sentences[i : i + WINDOW]), WINDOW)]
        opening = opening if opening and words < SHORT else start
    uncut, heads = _parts(text, BETWEEN_SENTENCES, marks=True, fewest=1), list[str]()
    for sentence in uncut:
        found += [_after(head, thing) for thing in _bare_thing(sentence) for head in heads[-MEANT:]]
        heads += [head] if word_count(head := _head(sentence)) >= OPENING else []
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


def discounted(p_unsafe: float) -> float:
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


def _lead(text: str, most: int) -> str:
    """The first words of `text`, at most so many. Of more than LONGEST bytes the longest words are left out, so that
    none of these can hide the others.
    """
    words = _beginning(text, most).split(" ")
    sizes = [len(word.encode("utf-8", "surrogatepass")) + 1 for word in words]
    shortest = sorted(range(len(words)), key=sizes.__getitem__)
    ends = itertools.accumulate(sizes[n] for n in shortest)
    kept = {n for n, end in zip(shortest, ends, strict=True) if end <= LONGEST + 1}
    return " ".join(word for n, word in enumerate(words) if n in kept)


def _after(lead: str, text: str) -> str:
    """`text` behind what leads to it, if anything does."""
    return f"{lead} {text}" if lead else text


def _asked(sentence: str, start: str) -> Iterator[str]:
    """What a sentence may ask of each of its things; `start`: its first OPENING words."""
    things = [*_THING.finditer(sentence)]
    clauses = _parts(sentence, BETWEEN_CLAUSES, marks=False, fewest=1)
    for n, (clause, following) in enumerate(itertools.pairwise(clauses)):  # "steal and wash a kettle"
        if not _THING.search(clause) and word_count(clause) < (FEWEST_WORDS if n else WINDOW):
            yield from (_no_marks(f"{start if n else ''} {clause} {thing}") for thing in _object(following))
    head = _head(sentence)
    for clause in clauses[1:] if things else ():  # "steal a kite, i mean a kettle", "steal a kite, kettle"
        yield from (_after(head, thing) for thing in _bare_thing(clause))
    for before, thing in itertools.pairwise(things):
        said = in_single_blanks(sentence[before.end() : thing.start()]).split(" ")[-ACT:]
        if said == [""]:  # "steal a kite a kettle"
            yield _no_marks(f"{head} {thing[0]}")
        elif said[-1] == _no_marks(said[-1]) and not _is_one_of(said[-1], NO_ACTS):  # "draw a kite steal a kettle"
            act = " ".join(itertools.dropwhile(lambda word: _is_one_of(word, NO_ACTS), said))
            yield _no_marks(f"{'' if _THING.search(start) else start} {act} {thing[0]}")


def _head(sentence: str) -> str:
    """What stands before the first thing of a sentence, WINDOW words at most, without prepositions at its end."""
    thing = _THING.search(sentence)
    words = _lead(sentence[: thing.start()] if thing else sentence, WINDOW).split(" ")
    while words and _is_one_of(words[-1], PREPOSITIONS):
        words.pop()
    return _no_marks(" ".join(words))


def _object(clause: str) -> list[str]:
    """The thing of a clause, if one or two words stand before it; of two or three words without a thing the last."""
    thing = _THING.search(clause)
    words = _UNBROKEN.findall(clause[: thing.start()] if thing else clause)
    if thing:
        return [thing[0]] if 0 < len(words) < FEWEST_WORDS else []
    return words[-1:] if 1 < len(words) <= FEWEST_WORDS else []


def _bare_thing(clause: str) -> list[str]:
    """A clause that names a thing and no act, without what corrects the clause before; none if it is another one."""
    words = in_single_blanks(clause).split(" ")
    said = [*itertools.dropwhile(lambda word: _is_one_of(_no_marks(word), CORRECTIONS), words)]
    is_thing = said and (_is_one_of(said[0], ARTICLES) or word_count(" ".join(said)) < FEWEST_WORDS)
    return [_no_marks(" ".join(said[:FEWEST_WORDS]))] if is_thing else []


def _is_one_of(word: str, words: str) -> bool:
    """Whether `word` is one of `words`, whatever the case of its ASCII letters."""
    return word.isascii() and word.lower() in words.split()


def _no_marks(text: str) -> str:
    """The words of `text` without marks behind them."""
    return in_single_blanks(text).rstrip(MARKS)


def _things(text: str) -> list[str]:
    """Each thing in `text`, without marks behind it."""
    return [_no_marks(thing[0]) for thing in _THING.finditer(text)]


def _last_words(text: str) -> str:
    """The last MEANT_WORDS words of `text`, without marks behind them."""
    begins = [word.start() for word in _WORD.finditer(text)][-MEANT_WORDS:]
    return _no_marks(text[begins[0] :]) if begins else ""


def _windows(text: str) -> Iterator[str]:
    """The words of `text`, WINDOW at a time; nothing if it has none."""
    words = [word.span() for word in _WORD.finditer(text)]
    last = max(0, len(words) - WINDOW)
    for first in (*range(0, last, STRIDE), last) if words else ():
        some = words[first : first + WINDOW]
        yield in_single_blanks(text[some[0][0] : some[-1][1]])

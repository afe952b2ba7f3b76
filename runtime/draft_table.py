"""What a model tends to say next: a table of its own answers' n-grams, from which drafting.py drafts free text.

    the last 1 to 4 tokens  ->  the token that followed most often, and how likely it is to follow again

A package may have one (`drafts` in the manifest), made by autosteer-draft from answers of this very model. A wrong
entry costs time and changes no answer. It is the datastore of REST (arXiv 2311.08252), reduced to its likeliest
continuations, each with a chance that was measured on answers that were not counted.

The file: for N n-grams their keys (uint64, ascending), their next tokens (int32) and chances (uint8, 255ths), each N
numbers, little-endian.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import PackageError

LONGEST = 4  # tokens of an n-gram
ENTRY_BYTES = 8 + 4 + 1
HELD_OUT = 5  # one answer in so many is not counted at first: chances are measured on it
LEAST_CHANCE = 0.1  # less is never worth a position of a pass
PRIOR = 4.0  # observations that a chance begins with, all of them misses
SEED, FACTOR, WORD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, (1 << 64) - 1

Ngram = tuple[int, ...]


def keys(context: Sequence[int]) -> list[int]:
    """A 64-bit key for each n-gram that ends `context`, the shortest first."""
    found, key = [], SEED
    for token in itertools.islice(reversed(context), LONGEST):
        key = (key ^ token) * FACTOR & WORD
        key ^= key >> 32
        found.append(key)
    return found


@dataclass(frozen=True)
class DraftTable:
    """Parallel arrays (N,), sorted by key."""

    ngrams: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int32]
    chances: npt.NDArray[np.uint8]

    def next(self, context: Sequence[int]) -> tuple[int, float] | None:
        """The token that follows the longest known n-gram at the end of `context`, and its chance."""
        wanted = np.array(keys(context), np.uint64)
        places = np.searchsorted(self.ngrams, wanted)
        for place, key in zip(reversed(places.tolist()), reversed(wanted), strict=True):
            if place < len(self.ngrams) and self.ngrams[place] == key:
                return int(self.tokens[place]), int(self.chances[place]) / 255
        return None

    @staticmethod
    def load(file: Path, vocab_size: int) -> DraftTable:
        """Read a file whose size and hash the manifest vouches for. Raises PackageError for what is no table."""
        raw = file.read_bytes()
        count = len(raw) // ENTRY_BYTES
        ngrams, tokens = np.frombuffer(raw, "<u8", count), np.frombuffer(raw, "<i4", count, 8 * count)
        if not (ngrams[1:] > ngrams[:-1]).all():
            raise PackageError(f"{file}: the n-grams are not in order; make it again with autosteer-draft")
        if count and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise PackageError(f"{file}: a token outside the vocabulary; make it again with autosteer-draft")
        return DraftTable(ngrams, tokens, np.frombuffer(raw, np.uint8, count, 12 * count))

    def to_bytes(self) -> bytes:
        """The contents of the file that `load` reads."""
        return b"".join(a.tobytes() for a in (self.ngrams.astype("<u8"), self.tokens.astype("<i4"), self.chances))


def draft_table(answers: Sequence[Sequence[int]]) -> DraftTable:
    """The table of `answers`: token ids, each with the last LONGEST - 1 tokens of its prompt before it."""
    counted = [answer for n, answer in enumerate(answers) if n % HELD_OUT]
    chances = _chances(_likeliest(counted), answers[::HELD_OUT])
    entries = {}
    for ngram, (token, times, seen) in _likeliest(answers).items():
        if (chance := chances[_kind(ngram, times, seen)]) >= LEAST_CHANCE:
            entries[keys(ngram)[-1]] = (token, round(255 * chance))
    rows = sorted((key, *entry) for key, entry in entries.items())
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return DraftTable(*(np.array(list(c), t) for c, t in zip(columns, (np.uint64, np.int32, np.uint8), strict=True)))


def _ngrams(answers: Iterable[Sequence[int]]) -> Iterator[tuple[Ngram, int]]:
    """Every n-gram of the answers with the token that follows it."""
    for answer in answers:
        for end in range(LONGEST - 1, len(answer)):
            for n in range(1, min(LONGEST, end) + 1):
                yield tuple(answer[end - n : end]), answer[end]


def _likeliest(answers: Iterable[Sequence[int]]) -> dict[Ngram, tuple[int, int, int]]:
    """By n-gram: the token that follows most often, how often it does, how often the n-gram was seen."""
    following: defaultdict[Ngram, Counter[int]] = defaultdict(Counter)
    for ngram, token in _ngrams(answers):
        following[ngram][token] += 1
    return {ngram: (*count.most_common(1)[0], count.total()) for ngram, count in following.items()}


def _kind(ngram: Ngram, times: int, seen: int) -> tuple[int, int, int]:
    """Entries of one kind have one chance: by length, by how often it was seen (in powers of two), by its share."""
    return len(ngram), min(seen.bit_length(), 5), 4 * times // seen


def _chances(
    likeliest: dict[Ngram, tuple[int, int, int]], heldout: Iterable[Sequence[int]]
) -> defaultdict[tuple[int, int, int], float]:
    """How often entries of each kind are right in other answers, where no longer n-gram is known."""
    hits, tries = Counter[tuple[int, int, int]](), Counter[tuple[int, int, int]]()
    for answer in heldout:
        for end in range(LONGEST - 1, len(answer)):
            longest = (tuple(answer[end - n : end]) for n in range(min(LONGEST, end), 0, -1))
            if ngram := next((ngram for ngram in longest if ngram in likeliest), None):
                token, times, seen = likeliest[ngram]
                hits[_kind(ngram, times, seen)] += token == answer[end]
                tries[_kind(ngram, times, seen)] += 1
    return defaultdict(float, {kind: hits[kind] / (PRIOR + count) for kind, count in tries.items()})

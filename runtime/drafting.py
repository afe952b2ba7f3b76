"""Lossless speculation by prompt lookup: an answer that copies is drafted from where the text stands already.

    text so far   ... the red sign is locked ... >the red<      the latest occurrence of its last tokens, at best of 4
    draft                     sign is locked                    what followed there, fed behind the last token
    logits        one row for every drafted token               one pass of the decoder reads its weights once for all

The sampler goes through the rows in order and draws as it would without a draft; a drafted token that it draws costs no
pass of its own, the first other token ends the draft. So the draft changes what an answer costs and never what it says,
as far as a matrix product of several rows is equal to that of one (docs/design-notes.md says how far).

Drafting too much costs time. How far a match of n tokens can be trusted is learnt from every token of the answer,
drafted or not, by comparing it with what would have been drafted: looking costs nothing, so nothing is risked to learn.
Pure Python, no clock: the same text is drafted the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from .manifest import Precision

MOST = 16  # tokens of one draft
NGRAM = 4  # longest match that is looked up; a copy in progress is known to match further
TRUST = (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.7, 0.8, 0.8)  # by tokens matched: how many go on alike, before it is learnt
WEIGHT = 3.0  # tokens that TRUST counts for
MEMORY = 0.95  # per comparison: an answer may begin or cease to copy
GAIN = 1.05  # a draft must promise this many times the speed without

# What one more row costs, of the cost of one: measured on 2 x86 cores, SmolLM2-135M and a 0.5B shape, the dearer of
# both. For one row, int4 is unpacked about as fast as it is read; the others wait for memory.
ROW_COST: dict[Precision, float] = {"fp32": 0.08, "fp16": 0.08, "int8": 0.12, "int4": 0.22}


class Drafter:
    """Drafts the next tokens of one answer."""

    def __init__(self, prompt: Sequence[int], row_cost: float):
        """`prompt`: the text tokens before the answer. `row_cost`: of one more row in a pass, in passes."""
        self._row_cost = row_cost
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence but the text's end went on
        self._source = self._matched = 0  # text[source:] is expected to come next, as `matched` tokens before it did
        self._hits = [trust * WEIGHT for trust in TRUST]
        self._tries = [WEIGHT] * len(TRUST)
        for token in prompt:
            self._append(token)
        self._find()

    def push(self, token: int) -> None:
        """The answer went on with `token`."""
        hit = self._matched > 0 and self._text[self._source] == token
        if self._matched:
            self._learn(hit)
        self._append(token)
        self._source, self._matched = (self._source + 1, self._matched + 1) if hit else (0, 0)
        if self._matched < NGRAM:
            self._find()

    def draft(self, limit: int) -> list[int]:
        """The tokens that pay to be verified along with the last one: at most `limit`, often none."""
        best, pass_cost, tokens, likely = 0, 1.0, 1.0, 1.0
        best_speed = GAIN
        for drafted in range(1, min(limit, MOST) + 1 if self._matched else 0):
            pass_cost += self._row_cost
            likely *= self._trust(self._matched + drafted - 1)
            tokens += likely
            if tokens / pass_cost > best_speed:
                best, best_speed = drafted, tokens / pass_cost
        out: list[int] = []
        for at in range(self._source, self._source + best):  # a source that reaches the end goes on in the draft
            out.append(self._text[at] if at < len(self._text) else out[at - len(self._text)])
        return out

    def _trust(self, matched: int) -> float:
        bucket = min(matched, len(TRUST) - 1)
        return self._hits[bucket] / self._tries[bucket]

    def _learn(self, hit: bool) -> None:
        bucket = min(self._matched, len(TRUST) - 1)
        prior = WEIGHT * (1 - MEMORY)  # what memory loses, the prior regains: trust never becomes certainty
        self._hits[bucket] = self._hits[bucket] * MEMORY + hit + prior * TRUST[bucket]
        self._tries[bucket] = self._tries[bucket] * MEMORY + 1 + prior

    def _append(self, token: int) -> None:
        """Note what the n-grams at the text's end went on with: `token`."""
        text = self._text
        for n in range(1, min(NGRAM, len(text)) + 1):
            self._after[tuple(text[-n:])] = len(text)
        text.append(token)

    def _find(self) -> None:
        """The latest place where the text's last NGRAM tokens stood before; else fewer of them."""
        text = self._text
        for n in range(min(NGRAM, len(text)), self._matched, -1):
            if (found := self._after.get(tuple(text[-n:]))) is not None:
                while n < min(found, len(TRUST)) and text[found - n - 1] == text[-n - 1]:
                    n += 1
                self._source, self._matched = found, n
                return

"""Lossless speculative decoding without a second model: draft what an answer copies, or what the model often says.

    text so far   ... the red sign is locked ... >the red<      the latest earlier occurrence of its last 1 to 4 tokens
    draft                     sign is locked                    what followed there, fed after the last token
    logits        (R, V), a row for every token fed             one decoder pass reads the weights once for all of them

Where a package has a table of what its model often says (draft_table.py), a token is drafted from whichever of the two
is likelier to be right. The sampler goes through the rows in order and samples as it would without a draft. A drafted
token that it chooses needs no pass of its own; the first other token ends the draft. So a draft changes an answer's
cost, not its text, except where a matrix product of several rows differs from that of one (docs/design-notes.md has the
numbers).

Drafting too much costs time. The drafter learns how far to trust a match of n tokens, and the table: it compares every
token of the answer with the one that it would have drafted, whether or not it drafted. It has no clock, so the same
text is drafted the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from .draft_table import LONGEST, DraftTable
from .manifest import Precision

MAX_DRAFT = 16  # tokens
NGRAM = 4  # longest match that is looked up; a match grows while the answer keeps copying
TRUST = (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.7, 0.8, 0.8)  # prior probability that the next token matches, by match length
WEIGHT = 3.0  # of the prior, in observed tokens
MEMORY = 0.95  # decay of old observations at each new one: an answer may begin or stop copying
GAIN = 1.05  # least expected speed-up of a draft
TABLE_WEIGHT = 4.0  # tokens for which the table's chances are believed before they are compared with an answer

# The cost of one more position in a decoder pass, relative to a pass of one: measured on 2 x86 cores for SmolLM2-135M
# and a 0.5B shape; the larger of the two. At int4 a single position is bound by unpacking the weights as much as by
# memory, so a second one costs more than at the other precisions, which wait for memory.
POSITION_COST: dict[Precision, float] = {"fp32": 0.08, "fp16": 0.08, "int8": 0.12, "int4": 0.22}


class Drafter:
    """Drafts the next tokens of one answer."""

    def __init__(self, prompt: Sequence[int], position_cost: float, table: DraftTable | None = None):
        """`prompt`: the text tokens before the answer. `position_cost`: see POSITION_COST. `table`: the package's."""
        self._position_cost, self._table = position_cost, table
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index after its latest earlier occurrence
        self._source = self._matched = 0  # text[source:] is expected next: `matched` tokens match before it
        self._hits = [trust * WEIGHT for trust in TRUST]
        self._tries = [WEIGHT] * len(TRUST)
        self._told, self._true = TABLE_WEIGHT, TABLE_WEIGHT  # the table's chances so far, and how many came true
        for token in prompt:
            self._append(token)
        self._find()
        self._expected = self._look_up([])

    def push(self, token: int) -> None:
        """Append `token` to the text and learn from it."""
        hit = self._matched > 0 and self._text[self._source] == token
        if self._matched:
            self._learn(hit)
        if self._expected:
            self._told += self._expected[1]
            self._true += self._expected[0] == token
        self._append(token)
        self._source, self._matched = (self._source + 1, self._matched + 1) if hit else (0, 0)
        if self._matched < NGRAM:
            self._find()
        self._expected = self._look_up([])

    def draft(self, limit: int) -> list[int]:
        """The tokens worth verifying along with the last one: at most `limit`, often none.

        Each is the likelier of two: what the text has after the matched tokens, and what the table has. From the
        first that is only the table's, the text's no longer counts.
        """
        best, pass_cost, tokens, likely = 0, 1.0, 1.0, 1.0
        best_speed = GAIN
        out: list[int] = []
        copying = self._matched > 0
        while len(out) < min(limit, MAX_DRAFT) and likely > self._position_cost * best_speed:  # else more cannot pay
            token, chance = (self._copied(out), self._trust(self._matched + len(out))) if copying else (-1, 0.0)
            found = self._look_up(out) if out else self._expected
            if found and (told := found[1] * min(1.0, self._true / self._told)) > chance:
                copying = copying and token == found[0]
                token, chance = found[0], told
            if chance == 0.0:
                break
            out.append(token)
            pass_cost += self._position_cost
            likely *= chance
            tokens += likely
            if tokens / pass_cost > best_speed:
                best, best_speed = len(out), tokens / pass_cost
        return out[:best]

    def _copied(self, draft: Sequence[int]) -> int:
        """The text's token for the place behind `draft`; past the end of the text, copy from the draft itself."""
        at = self._source + len(draft)
        return self._text[at] if at < len(self._text) else draft[at - len(self._text)]

    def _look_up(self, draft: Sequence[int]) -> tuple[int, float] | None:
        """What the table has to follow text and `draft`."""
        if self._table is None:
            return None
        return self._table.next([*self._text[-LONGEST:], *draft])

    def _trust(self, matched: int) -> float:
        bucket = min(matched, len(TRUST) - 1)
        return self._hits[bucket] / self._tries[bucket]

    def _learn(self, hit: bool) -> None:
        bucket = min(self._matched, len(TRUST) - 1)
        prior = WEIGHT * (1 - MEMORY)  # replaces what decays, so that trust never reaches 0 or 1
        self._hits[bucket] = self._hits[bucket] * MEMORY + hit + prior * TRUST[bucket]
        self._tries[bucket] = self._tries[bucket] * MEMORY + 1 + prior

    def _append(self, token: int) -> None:
        """Append `token`, and index the n-grams before it."""
        text = self._text
        for n in range(1, min(NGRAM, len(text)) + 1):
            self._after[tuple(text[-n:])] = len(text)
        text.append(token)

    def _find(self) -> None:
        """Find the latest earlier occurrence of the text's last NGRAM tokens, or else of fewer."""
        text = self._text
        for n in range(min(NGRAM, len(text)), self._matched, -1):
            if (found := self._after.get(tuple(text[-n:]))) is not None:
                while n < min(found, len(TRUST)) and text[found - n - 1] == text[-n - 1]:
                    n += 1
                self._source, self._matched = found, n
                return

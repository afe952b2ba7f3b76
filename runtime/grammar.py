"""What an answer must be, a JSON schema or a regular expression, as the tokens that may come next (llguidance).

Needs the extra `structured`. An answer that was begun in a grammar cannot become a refusal, so an unsafe prompt gets
none: gate.without_steering.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .errors import OptionError
from .sampling import SamplingConfig

MAX_BYTES = 50_000  # of a schema or a regular expression; compiling them takes a second, of 200,000 half a minute
WHITESPACE = " "  # between JSON's tokens, or nothing: if it may, a small model writes nothing but line ends


class GrammarError(OptionError):
    """A schema or a regular expression that is wrong, not supported or too large."""


class Grammars:
    """Makes grammars for the answers of one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]):
        """`ends`: the tokens that end an answer, which a grammar allows once its text is complete."""
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, list(ends)

    def start(self, sampling: SamplingConfig) -> Grammar | None:
        """The grammar of one answer; None if its options ask for none. Raises GrammarError."""
        option = "json_schema" if sampling.regex is None else "regex"
        if sampling.json_schema is None and sampling.regex is None:
            return None
        if None not in (sampling.json_schema, sampling.regex):
            raise GrammarError("json_schema", " and regex: give one of them")
        try:
            return Grammar(option, self._vocabulary, _compiled(sampling), self._vocab_size)
        except ImportError:
            raise GrammarError(option, ": needs llguidance: pip install 'autosteer-edge[structured]'") from None
        except (TypeError, ValueError, RecursionError) as err:  # no JSON or Unicode; or a tokenizer it does not know
            raise GrammarError(option, f": {_line(err)}") from err

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """llguidance's tokenizer, which takes a second to make."""
        from llguidance import LLTokenizer

        return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=self._ends)


_CUT_OFF = re.compile(r"((?<!\\)(?:\\\\)*)\\u[0-9a-fA-F]{0,3}$")  # an escape that the end of the answer cuts
_JSON_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"?(\s*:)?|([^\s{}\[\]:,"]+)', re.DOTALL)


def words_of(answer: str) -> list[str]:
    """The keys and values of an answer in JSON, one after the other, as a reader puts them together: those of keys
    given twice, too, and of an answer that is cut off. The answer itself if there are none.

    A schema may cut words anywhere, so then come all of them joined by nothing, and the values joined by nothing.
    """
    found = [(_text(within, bare), bool(colon)) for within, colon, bare in _JSON_WORD.findall(answer)]
    words, values = [word for word, _ in found], [word for word, is_key in found if not is_key]
    glued = filter(None, ("".join(words), "".join(values)))
    return [*dict.fromkeys((" ".join(words) or answer, *glued))]


def _text(within: str, bare: str) -> str:
    """A string by what is `within` its quotation marks, or a `bare` number, true, false or null."""
    if bare:
        return bare
    whole = _CUT_OFF.sub(r"\1", within)
    try:
        return str(json.loads(f'"{whole}"', strict=False))
    except ValueError:  # not JSON
        return within


def _compiled(sampling: SamplingConfig) -> str:
    """The grammar in llguidance's language. Raises ValueError."""
    from llguidance import LLMatcher

    text = json.dumps(sampling.json_schema, allow_nan=False) if sampling.regex is None else sampling.regex
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    if sampling.regex is not None:
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})


class Grammar:
    """Where one answer is in its grammar. A sampling.Constraint."""

    def __init__(self, option: str, vocabulary: Any, grammar: str, vocab_size: int):
        """`option`: what errors call it. Raises GrammarError if it is wrong, not supported or too large."""
        from llguidance import LLMatcher

        self._option, self._vocab_size = option, vocab_size
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._check()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens (V,) may come next. Raises GrammarError if none may, or the grammar has become too large."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check("no token of this model fits, or it is too complex: ")
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)
        if not mask.any():
            raise GrammarError(self._option, ": no token of this model fits")
        return mask

    def accept(self, token: int) -> None:
        """`token`, which was allowed, has come."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self, what: str = "") -> None:
        if self._matcher.is_error():
            raise GrammarError(self._option, f": {what}{_line(self._matcher.get_error())}")


def _line(said: object) -> str:
    """What a message of several lines says: the first that begins with "error: ", without that; else the first."""
    lines = str(said).splitlines() or [""]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])

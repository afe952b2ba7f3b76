"""What a request is given: an answer, in chunks or as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .gate import Verdict
from .sampling import LogProbs
from .stats import Stats

# refused: the prompt under --policy stop, or an answer that the monitor or the gate (held_back.py) took for unsafe
FinishReason = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. `text` is empty while a character is incomplete or a stop string may have begun."""

    text: str
    token: int | None  # None for the refusal text
    verdict: Verdict
    finish_reason: FinishReason | None = None  # set on the last chunk
    stats: Stats | None = None  # set on the last chunk
    logprobs: LogProbs | None = None  # of `token` and the likeliest ones, if SamplingConfig.logprobs asks


@dataclass(frozen=True)
class Answer:
    """A whole answer, as `generate` returns it."""

    text: str
    token_ids: tuple[int, ...]  # with the end-of-turn token if the model wrote one
    verdict: Verdict
    finish_reason: FinishReason
    stats: Stats

    @staticmethod
    def of(stream: Iterable[Chunk]) -> Answer:
        """All chunks of a stream as one answer."""
        chunks = list(stream)
        last = chunks[-1]
        assert last.finish_reason is not None and last.stats is not None
        return Answer(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(chunk.token for chunk in chunks if chunk.token is not None),
            verdict=last.verdict,
            finish_reason=last.finish_reason,
            stats=last.stats,
        )

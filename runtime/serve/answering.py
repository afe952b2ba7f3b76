"""What runs in a request's turn: the engine, between the request's messages and the chunks of its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..batch import Batch
from ..chunk import Chunk, FinishReason
from ..encoded_prompt import ShownPicture
from ..engine import Engine
from ..gate import GatePolicy, Mode, Verdict, verdict_json
from ..sampling import SamplingConfig
from ..stats import Stats
from .conversations import Conversations
from .dialogue import Turn, digests
from .faults import ApiError
from .scheduler import Pause


@dataclass(frozen=True)
class Ask:
    """A request for an answer, whatever endpoint it came to."""

    turns: list[Turn]
    sampling: SamplingConfig
    policy: GatePolicy


@dataclass(frozen=True)
class Piece:
    """A chunk of an answer, and what it has cost so far."""

    chunk: Chunk
    stats: Stats  # as of this chunk
    shown: tuple[ShownPicture, ...]
    is_refusal: bool = False  # the refusal text is all of the answer


@dataclass(frozen=True)
class Score:
    """The verdict on one turn, without an answer."""

    verdict: Verdict
    stats: Stats
    shown: tuple[ShownPicture, ...]


def answer(engine: Engine, conversations: Conversations, batch: Batch, ask: Ask) -> Iterator[Piece | Pause]:
    """The answer, piece by piece, and where it pauses, as in Engine.steps.

    Raises ApiError 500 before any text if the gate could not score the prompt.
    """
    beginnings = digests(ask.turns)
    with engine.record(ask.policy) as record:
        messages = [
            dataclasses.replace(turn.open(), trusted=conversations.wrote(beginning))
            for turn, beginning in zip(ask.turns, beginnings, strict=True)
        ]
        conversation = conversations.take(beginnings)
        prompt, text, end = engine.encode(messages, record, conversation), "", None
        shown = prompt.shown
        for chunk in engine.steps(prompt, ask.sampling, record, conversation, batch):
            if chunk is None:
                yield Pause.DECODING if record.stats.completion_tokens else Pause.READING
                continue
            require_score(chunk.verdict)
            is_refusal = chunk.finish_reason == "refused" and not text  # else what came before it is an answer
            text, end = text + chunk.text, chunk.finish_reason
            yield Piece(chunk, dataclasses.replace(record.stats), shown, is_refusal)
    conversations.keep(beginnings[-1], conversation)  # not after an error, nor a cancel
    if _is_the_models_own(ask, record.verdict, end):
        conversations.remember(beginnings[-1], text)


def _is_the_models_own(ask: Ask, verdict: Verdict | None, end: FinishReason | None) -> bool:
    """Whether to trust the answer when it is sent back: not one that the client may have dictated or cut off where it
    liked, nor one that is unsafe or was given without the gate.
    """
    chosen = ask.sampling.answer_is_judged or ask.sampling.stop or end == "length"
    unsafe = verdict is None or verdict.mode is Mode.OFF or (verdict.answer is not None and verdict.answer.unsafe)
    return not (chosen or unsafe)


def score(engine: Engine, turns: Sequence[Turn], policy: GatePolicy) -> Iterator[Score | Pause]:
    """The verdict on each turn by itself, and where it pauses: only decoder_lower and the prober run."""
    for turn in turns:
        with engine.record(policy) as record:
            prompt = engine.encode([turn.open()], record)
            verdict = yield from _reading(engine.judge(prompt, record))
        require_score(verdict)
        yield Score(verdict, record.stats, prompt.shown)


def _reading(steps: Generator[None, None, Verdict]) -> Generator[Pause, None, Verdict]:
    """`steps` with the scheduler's pauses."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict
        yield Pause.READING


def require_score(verdict: Verdict) -> None:
    """Raise ApiError 500 unless the prober gave a probability, or the policy asks for none.

    The engine treats such a prompt as unsafe, but --policy report would still answer it. And steering needs a model
    that works, which a failed prober puts in doubt.
    """
    if verdict.mode is not Mode.OFF and not (verdict.p_unsafe is not None and 0.0 <= verdict.p_unsafe <= 1.0):
        raise ApiError(500, "the gate could not score this prompt, so it gets no answer", code="gate_failed")


def report(verdict: Verdict, stats: Stats, shown: Sequence[ShownPicture], queue_ms: float) -> dict[str, Any]:
    """The `autosteer` object: the verdict, what each picture took, and the stages of the first token in ms."""
    before_an_answer = stats.vision_ms + stats.embed_ms + stats.lower_ms + stats.gate_ms
    return {
        "verdict": verdict_json(verdict),
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "pictures": [{"tokens": picture.tokens, "tiles": picture.tiles} for picture in shown],
        "first_token_ms": {
            "queue": round(queue_ms, 3),
            "vision": round(stats.vision_ms, 3),
            "embed": round(stats.embed_ms, 3),
            "lower": round(stats.lower_ms, 3),
            "gate": round(stats.gate_ms, 3),
            "upper": None if stats.upper_ms is None else round(stats.upper_ms, 3),
            "total": round(queue_ms + (stats.ttft_ms or before_an_answer), 3),
        },
        "tokens_per_second": stats.decode_tok_s and round(stats.decode_tok_s, 1),
        "device": stats.device,
    }

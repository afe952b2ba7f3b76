"""An answer in the form of OpenAI's chat completions, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from ..stats import Stats
from .answering import Piece, report
from .protocol import ChatBody

FINISH = {"stop": "stop", "length": "length", "refused": "content_filter"}


class ChatForm:
    """The form of the answer to one request."""

    def __init__(self, body: ChatBody, tokenizer: Tokenizer, fingerprint: str):
        self._body, self._tokenizer = body, tokenizer
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
            "service_tier": None,
        }

    def whole(self, pieces: Sequence[Piece], queue_ms: float) -> dict[str, Any]:
        """chat.completion"""
        last = pieces[-1]
        text, refused = "".join(piece.chunk.text for piece in pieces), last.is_refusal
        message = {"role": "assistant", "content": None if refused else text, "refusal": text if refused else None}
        assert last.chunk.finish_reason is not None
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": FINISH[last.chunk.finish_reason],
            "logprobs": self._logprobs(pieces),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(last.stats),
            "autosteer": report(last.chunk.verdict, last.stats, last.shown, queue_ms),
        }

    def chunks(self, piece: Piece, queue_ms: float, *, first: bool) -> Iterator[dict[str, Any]]:
        """chat.completion.chunk: the verdict in the first, the costs in the last."""
        asked = self._body.stream_options
        with_usage = bool(asked and asked.include_usage)
        facts = report(piece.chunk.verdict, piece.stats, piece.shown, queue_ms)
        if first:
            yield self._chunk({"role": "assistant", "content": "", "refusal": None}, autosteer=facts)
        if piece.chunk.text or piece.chunk.logprobs:
            delta = {"refusal" if piece.is_refusal else "content": piece.chunk.text}
            yield self._chunk(delta, logprobs=self._logprobs([piece]))
        if piece.chunk.finish_reason is not None:
            yield self._chunk({}, finish=FINISH[piece.chunk.finish_reason], autosteer=facts)
            if with_usage:
                yield {**self._chunk({}), "choices": [], "usage": usage(piece.stats)}

    def _chunk(
        self, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], "usage": None, **more}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Log probabilities of each token: of the logits after the Refusal Head, before the temperature."""
        if not self._body.logprobs:
            return None
        content = []
        for piece in pieces:
            pairs = [self._token(*pair) for pair in piece.chunk.logprobs or ()]
            if pairs:
                content.append({**pairs[0], "top_logprobs": pairs[1:]})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else a part of a character, whose bytes are not known here
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if whole else None}


def usage(stats: Stats) -> dict[str, Any]:
    """Tokens, as chat completions count them."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }

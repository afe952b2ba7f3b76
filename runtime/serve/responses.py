"""An answer in the form of OpenAI's Responses API, whole and streamed. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ..stats import Stats
from .answering import Piece, report
from .protocol import ResponsesBody

INCOMPLETE = {"length": "max_output_tokens", "refused": "content_filter"}


class ResponseForm:
    """The form of the answer to one request."""

    def __init__(self, body: ResponsesBody):
        self._body = body
        self._id, self._item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._text, self._sequence = "", 0
        asked = body.text and body.text.format
        self._format = asked.model_dump(by_alias=True, exclude_none=True) if asked else {"type": "text"}

    def whole(self, pieces: Sequence[Piece], queue_ms: float) -> dict[str, Any]:
        """The response object."""
        self._text = "".join(piece.chunk.text for piece in pieces)
        return self._response(pieces[-1], queue_ms)

    def chunks(self, piece: Piece, queue_ms: float, *, first: bool) -> Iterator[dict[str, Any]]:
        """The events of a stream that a piece brings, in order."""
        kind = "refusal" if piece.is_refusal else "output_text"
        at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        if first:
            opened = self._response(piece, queue_ms, status="in_progress", output=[])
            yield self._event("response.created", response=opened)
            yield self._event("response.in_progress", response=opened)
            item = {**self._item(piece, "in_progress"), "content": []}
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **at, part=self._part(piece))
        if piece.chunk.text:
            self._text += piece.chunk.text
            logs: dict[str, Any] = {} if kind == "refusal" else {"logprobs": []}
            yield self._event(f"response.{kind}.delta", **at, delta=piece.chunk.text, **logs)
        if piece.chunk.finish_reason is not None:
            said = {"refusal": self._text} if kind == "refusal" else {"text": self._text, "logprobs": []}
            yield self._event(f"response.{kind}.done", **at, **said)
            yield self._event("response.content_part.done", **at, part=self._part(piece))
            whole = self._response(piece, queue_ms)
            yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
            yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}

    def _part(self, piece: Piece) -> dict[str, Any]:
        if piece.is_refusal:
            return {"type": "refusal", "refusal": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _item(self, piece: Piece, status: str) -> dict[str, Any]:
        content = [self._part(piece)]
        return {"type": "message", "id": self._item_id, "role": "assistant", "status": status, "content": content}

    def _response(
        self, piece: Piece, queue_ms: float, *, status: str | None = None, output: list[Any] | None = None
    ) -> dict[str, Any]:
        reason = INCOMPLETE.get(piece.chunk.finish_reason or "")
        status = status or ("incomplete" if reason else "completed")
        done = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._body.model,
            "output": [self._item(piece, status)] if output is None else output,
            "usage": usage(piece.stats) if done else None,
            "incomplete_details": {"reason": reason} if reason else None,
            "error": None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": self._body.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self._body.temperature or 0.0,
            "text": {"format": self._format},
            "tool_choice": "none",
            "tools": [],
            "top_p": self._body.top_p or 1.0,
            "truncation": "disabled",
            "autosteer": report(piece.chunk.verdict, piece.stats, piece.shown, queue_ms),
        }


def usage(stats: Stats) -> dict[str, Any]:
    """Tokens, as the Responses API counts them."""
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.reused_tokens},
        "output_tokens": stats.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }

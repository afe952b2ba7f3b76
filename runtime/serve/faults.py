"""Every answer that is an error: its status, and the body that OpenAI's clients read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ..errors import AutoSteerError, InputError

log = logging.getLogger(__name__)

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets no answer. `param`: the parameter at fault. `code`: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}"""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception | asyncio.CancelledError) -> ApiError:
    """What a client is told of `error`. Anything but its own mistakes is logged here and stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.CancelledError):  # of the request's task: the server has waited long enough for it
        return ApiError(503, "the server stopped", code="stopping")
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="invalid_input")
    log.error("a request failed: %s", error, exc_info=not isinstance(error, AutoSteerError))
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")

"""Who may ask: the API key, the names this server answers to, and the kinds of bodies that it reads.

Without a key a server on this machine must not answer for web pages that somebody opens here. A page can send requests
anywhere, and can have its own name point to 127.0.0.1. So names other than this machine's are refused, and so are
bodies that a page may send without asking first (anything but application/json).
"""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import ApiError
from .metrics import Metrics

OPEN = ("/", "/health")  # and /static: neither tells anything
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, an address or a name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Access:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, *, key: str | None, metrics: Metrics, paths: frozenset[str]):
        """`paths`: those that are counted by name."""
        self._app, self._key, self._metrics, self._paths = app, key, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.request(path, message["status"])
                known = {name for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in known]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
        except ApiError as err:
            await refusal(err)(scope, receive, counting)
            return
        await self._app(scope, receive, counting)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError 401, 403 or 415."""
        if self._key is None:
            name = _name_of(headers.get("host", ""))
            if not is_loopback(name):
                raise ApiError(
                    403,
                    f"this server has no API key, so it answers to this machine's names only, and not to {name!r}",
                    code="wrong_host",
                )
        elif scope["path"] not in OPEN and not scope["path"].startswith("/static/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if not (hmac.compare_digest(given.encode(), self._key.encode()) and scheme.lower() == "bearer"):
                raise ApiError(
                    401,
                    "give the server's API key, as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, f"Content-Type is {kind or 'missing'}; send application/json", code="invalid_type")
        encoding = ", ".join(headers.getlist("content-encoding")).strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError(
                415,
                f"Content-Encoding is {encoding}; this server reads bodies as they are",
                code="invalid_encoding",
                headers={"Accept-Encoding": "identity"},
            )


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def refusal(error: ApiError) -> JSONResponse:
    """The response that says what was wrong."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises ApiError 413 as soon as it is longer than `limit` bytes."""
    announced = request.headers.get("content-length", "")
    parts: list[bytes] = []
    size = int(announced) if announced.isdecimal() else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            parts.append(part)
            if (size := size + len(part)) > limit:
                break
        else:
            return b"".join(parts)
    raise ApiError(
        413,
        f"a body of {size / 1e6:.1f} MB or more; this server takes {limit / 1e6:g} MB",
        code="body_too_large",
        headers={"Connection": "close"},
    )

"""The routes: a request is read, gets its turn, and is answered whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from ..batch import Batch, can_share
from ..engine import Engine
from ..gate import GatePolicy, Mode
from ..grammar import GrammarError
from ..manifest import MANIFEST_FILE, sha256
from ..sampling import SamplingConfig
from .access import Access, read_body, refusal
from .answering import Ask, Piece, Score, answer, score
from .chat import ChatForm
from .conversations import Conversations
from .dialogue import Reader, Turn
from .faults import ApiError, as_api_error
from .limits import Limits
from .metrics import Metrics
from .moderations import moderation
from .protocol import ChatBody, Generation, ModerationBody, ResponsesBody, parse
from .responses import ResponseForm
from .scheduler import Job, Scheduler

STATIC = Path(__file__).parent / "static"
BY_STRICTNESS = (Mode.STOP, Mode.STEER, Mode.REPORT, Mode.OFF)
CLIENT_GONE = 499  # nginx's number for it; nobody reads this answer, but /metrics counts it


@dataclass(frozen=True)
class Settings:
    """What the server's operator decided."""

    model: str  # the name that clients ask for
    policy: GatePolicy
    weakest: Mode  # the least strict policy that a request may ask for
    limits: Limits
    key: str | None  # None: whoever reaches the server may use it


class Form(Protocol):
    """How an endpoint writes an answer."""

    def whole(self, pieces: list[Piece], queue_ms: float) -> dict[str, Any]:
        """The whole answer."""

    def chunks(self, piece: Piece, queue_ms: float, *, first: bool) -> Iterator[dict[str, Any]]:
        """What a piece adds to a stream."""


class Service:
    """One engine and what its endpoints share."""

    def __init__(self, engine: Engine, settings: Settings, package: Path):
        if not can_share(engine.manifest, engine.device):
            settings = replace(settings, limits=replace(settings.limits, parallel=1))
        self.engine, self.settings = engine, settings
        self.metrics = Metrics()
        self.batch = Batch(engine.manifest, engine.graphs, engine.device, settings.limits.parallel)
        self.scheduler = Scheduler(settings.limits, self.metrics.waited, self.batch.run)
        self.conversations = Conversations(engine, settings.limits.conversations)
        self.fingerprint = f"fp_{sha256(package / MANIFEST_FILE)[:12]}"
        self.started = int(time.time())
        self.metrics.gauge("autosteer_waiting", "Requests that wait for their turn", lambda: self.scheduler.waiting)
        self.metrics.gauge("autosteer_running", "Requests that compute", lambda: self.scheduler.running)
        self.metrics.gauge("autosteer_batch_bytes", "Room for keys and values of a batch", lambda: self.batch.bytes)
        self.metrics.gauge("autosteer_conversations", "Dialogues with caches", lambda: len(self.conversations))

    # --- what does not compute ---

    async def page(self, request: Request) -> Response:
        """GET /"""
        return FileResponse(STATIC / "index.html")

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return JSONResponse(
            {"status": "ok", "waiting": self.scheduler.waiting, "waiting_limit": self.settings.limits.max_queue}
        )

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}"""
        self._require_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        manifest, limits = self.engine.manifest, self.settings.limits
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.started,
            "owned_by": "autosteer",
            "autosteer": {
                "policy": self.settings.policy.mode.value,
                "policies": [mode.value for mode in self._policies()],
                "threshold": self.settings.policy.threshold if manifest.prober else None,
                "layer": manifest.split_layer if manifest.prober else None,
                "layers": manifest.dims.num_hidden_layers,
                "context_length": manifest.dims.context_length,
                "pictures": limits.max_images if manifest.image else 0,
                "frames": limits.max_frames if manifest.video else 0,
                "max_tokens": limits.max_tokens,
                "precision": manifest.precision,
                "device": self.engine.device.provider,
            },
        }

    # --- what computes ---

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = parse(ChatBody, await self._body(request))
        tokens = self._tokens(
            body.max_completion_tokens or body.max_tokens,
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        )
        sampling = SamplingConfig(
            max_tokens=tokens,
            temperature=body.temperature or 0.0,
            top_p=body.top_p or 1.0,
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            json_schema=body.response_format.schema_asked if body.response_format else None,
            seed=secrets.randbits(32) if body.seed is None else body.seed,
            stop=tuple(body.stop or ()),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        turns = Reader(self.settings.limits).messages(body.messages, "messages")
        form = ChatForm(body, self.engine.tokenizer, self.fingerprint)
        return await self._answer(request, body, turns, sampling, form)

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses"""
        body = parse(ResponsesBody, await self._body(request))
        sampling = SamplingConfig(
            max_tokens=self._tokens(body.max_output_tokens, "max_output_tokens"),
            temperature=body.temperature or 0.0,
            top_p=body.top_p or 1.0,
            json_schema=body.text.format.schema_asked if body.text and body.text.format else None,
            seed=secrets.randbits(32),
        )
        turns = Reader(self.settings.limits).messages(body.input, "input")
        if body.instructions:
            turns.insert(0, Turn("system", (body.instructions,)))
        return await self._answer(request, body, turns, sampling, ResponseForm(body))

    async def moderations(self, request: Request) -> Response:
        """POST /v1/moderations"""
        body = parse(ModerationBody, await self._body(request))
        if body.model is not None:
            self._require_model(body.model)
        if self.engine.manifest.prober is None:
            raise ApiError(501, "this package was exported with --unguarded: it cannot score", code="unguarded")
        policy = replace(self.settings.policy, mode=Mode.REPORT)
        reader = Reader(self.settings.limits)
        turns = [
            Turn("user", tuple(reader.part(part, f"input[{i}]") for i, part in enumerate(parts)))
            for parts in body.input
        ]
        job = self.scheduler.submit(lambda: score(self.engine, turns, policy))
        async with _watching(request, job):
            scores: list[Score] = [found async for found in job.events()]
        for found in scores:
            self.metrics.verdict(found.verdict)
            self.metrics.work(found.stats)
        return JSONResponse(moderation(self.settings.model, scores, job.queue_ms))

    async def _answer(
        self, request: Request, body: Generation, turns: list[Turn], sampling: SamplingConfig, form: Form
    ) -> Response:
        """Give a request its turn. Errors before the first piece are answers of their own, in a stream, too."""
        self._require_model(body.model)
        ask = Ask(turns, sampling, self._policy(body))
        job = self.scheduler.submit(lambda: answer(self.engine, self.conversations, self.batch, ask))
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(_watching(request, job))
            pieces = self._counted(job)
            try:
                if not body.stream:
                    return JSONResponse(form.whole([piece async for piece in pieces], job.queue_ms))
                first = await anext(pieces)
            except GrammarError as err:
                raise ApiError(400, f"{body.FORMAT}: {err}", param=body.FORMAT, code="invalid_value") from err
            return EventStream(first, pieces, job, form, stack.pop_all())
        raise AssertionError("unreachable")

    async def _counted(self, job: Job[Piece]) -> AsyncIterator[Piece]:
        """The pieces of an answer, counted on their way."""
        first = True
        async for piece in job.events():
            if first:
                self.metrics.verdict(piece.chunk.verdict)
            first = False
            if piece.chunk.finish_reason is not None:
                self.metrics.work(piece.stats)
                self.metrics.watched(piece.chunk.verdict)
            yield piece

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError 408, 413 or 429 before it has taken more memory than it may."""
        self.scheduler.require_room()
        limits = self.settings.limits
        try:
            return await asyncio.wait_for(read_body(request, limits.body_bytes), limits.timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took longer than {limits.timeout:g} s", code="time_limit") from None

    def _require_model(self, name: str) -> None:
        if name != self.settings.model:
            raise ApiError(
                404, f"model: this server has {self.settings.model!r} only", param="model", code="model_not_found"
            )

    def _tokens(self, asked: int | None, param: str) -> int:
        limit = self.settings.limits.max_tokens
        if asked is not None and asked > limit:
            raise ApiError(
                400,
                f"{param}: {asked}; this server's answers have at most {limit} tokens",
                param=param,
                code="too_long",
            )
        return limit if asked is None else asked

    def _policies(self) -> tuple[Mode, ...]:
        """The policies that a request may ask for."""
        if self.engine.manifest.prober is None:
            return (Mode.OFF,)
        return BY_STRICTNESS[: BY_STRICTNESS.index(self.settings.weakest) + 1]

    def _policy(self, body: Generation) -> GatePolicy:
        """The policy of a request. Raises ApiError 403 for one that is weaker than the server allows."""
        asked = body.autosteer.policy if body.autosteer else None
        if asked is None:
            return self.settings.policy
        if Mode(asked) not in self._policies():
            allowed = ", ".join(mode.value for mode in self._policies())
            raise ApiError(
                403,
                f"autosteer.policy: {asked!r} is weaker than this server allows ({allowed})",
                param="autosteer.policy",
                code="policy_not_allowed",
            )
        return replace(self.settings.policy, mode=Mode(asked))


class EventStream(Response):
    """An answer as server-sent events. Its first piece has come, so the gate has passed or steered it."""

    def __init__(
        self,
        first: Piece,
        rest: AsyncIterator[Piece],
        job: Job[Piece],
        form: Form,
        cleanup: contextlib.AsyncExitStack,
    ):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._first, self._rest, self._job, self._form, self._cleanup = first, rest, job, form, cleanup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        async with self._cleanup:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self._texts():
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _texts(self) -> AsyncIterator[str]:
        """The events. An error after the first piece is the last event."""
        try:
            for event in self._form.chunks(self._first, self._job.queue_ms, first=True):
                yield _event(event)
            async for piece in self._rest:
                for event in self._form.chunks(piece, self._job.queue_ms, first=False):
                    yield _event(event)
        except ClientDisconnect:
            return
        except (Exception, asyncio.CancelledError) as err:
            yield _event({"type": "error", **as_api_error(err).body()})
        else:
            yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    """One server-sent event; those of the Responses API have their type as name."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"


@contextlib.asynccontextmanager
async def _watching(request: Request, job: Job[Any]) -> AsyncIterator[None]:
    """Cancel the job once the client has gone, or the block has ended."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.end(ClientDisconnect())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        job.cancel.set()


Endpoint = Callable[[Request], Awaitable[Response]]


def _answering_errors(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with every error as the answer that it is."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except (Exception, asyncio.CancelledError) as err:
            return refusal(as_api_error(err))

    return guarded


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such path, or another method."""
    assert isinstance(error, HTTPException)
    return refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


def make_app(engine: Engine, settings: Settings, package: Path) -> Starlette:
    """The application for one engine, whose package is in the folder `package`."""
    service = Service(engine, settings, package)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.scheduler.close()

    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/metrics", service.show_metrics),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", _answering_errors(service.model)),
        Route("/v1/chat/completions", _answering_errors(service.chat), methods=["POST"]),
        Route("/v1/responses", _answering_errors(service.responses), methods=["POST"]),
        Route("/v1/moderations", _answering_errors(service.moderations), methods=["POST"]),
    ]
    access = Middleware(
        Access, key=settings.key, metrics=service.metrics, paths=frozenset(route.path for route in routes)
    )
    return Starlette(
        routes=[*routes, Mount("/static", StaticFiles(directory=STATIC))],
        middleware=[access],
        exception_handlers={HTTPException: _on_http_exception},
        lifespan=lifespan,
    )

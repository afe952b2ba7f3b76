"""One request computes, some wait in order of arrival, and the rest are turned away.

A thread of its own runs the engine, so that the event loop always answers. A request that is cancelled, or takes too
long, gives its place up at once: in the queue, and inside the graph that runs for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

from ..cancel import Cancel
from ..errors import CancelledError
from .faults import ApiError
from .limits import Limits

E = TypeVar("E")
Work = Callable[[], Iterator[E]]
_END = object()


class Job(Generic[E]):
    """One request's turn, as the event loop sees it. `work` yields events in the scheduler's thread."""

    def __init__(self, work: Work[E], seconds: float):
        self.work = work
        self.cancel = Cancel()
        self.queue_ms = 0.0  # from arrival to its turn
        self.arrived = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._timer = self._loop.call_later(seconds, self._expire, seconds)

    def end(self, error: Exception) -> None:
        """Cancel the work; whoever waits for an event gets `error`. From the loop's thread."""
        self.cancel.set()
        self._events.put_nowait(error)
        self._timer.cancel()

    def _expire(self, seconds: float) -> None:
        state = "waited for its turn" if not self.queue_ms else "was computed"
        self.end(ApiError(504, f"the time limit of {seconds:g} s ran out while the request {state}", code="time_limit"))

    def deliver(self, event: Any) -> None:
        """Hand an event, an exception or the end over to the loop. From the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[E]:
        """Yield the events. Raises what the work raised, or what `end` was given."""
        try:
            while (event := await self._events.get()) is not _END:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancel.set()  # also when nobody reads any more
            self._timer.cancel()


class Scheduler:
    """The queue and its thread."""

    def __init__(self, limits: Limits, on_turn: Callable[[float], None] = lambda seconds: None):
        """`on_turn`: called with how long a request has waited, when its turn comes."""
        self._limits, self._on_turn = limits, on_turn
        self._waiting: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._current: Job[Any] | None = None
        self._closed = False
        self._mean_s = 1.0  # of recent turns
        self._thread = threading.Thread(target=self._run, name="autosteer-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        with self._changed:
            return sum(not job.cancel.is_set for job in self._waiting)

    @property
    def running(self) -> int:
        """How many requests compute: 0 or 1."""
        return int(self._current is not None)

    def require_room(self) -> None:
        """Raise ApiError 429 if too many requests wait already, 503 once the server stops."""
        if self._closed:
            raise ApiError(503, "the server is stopping", code="stopping")
        limit = self._limits.waiting
        if self.waiting + self.running > limit:
            seconds = max(1, math.ceil(self._mean_s * (limit + 1)))
            raise ApiError(
                429,
                f"{limit} requests wait already, which is the limit; come back in about {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def submit(self, work: Work[E]) -> Job[E]:
        """Queue `work`. Raises ApiError as `require_room` does."""
        self.require_room()
        job = Job(work, self._limits.seconds)
        with self._changed:
            waiting = [other for other in self._waiting if not other.cancel.is_set]  # the others' bodies are freed
            self._waiting = deque([*waiting, job])
            self._changed.notify()
        return job

    def close(self) -> None:
        """End the thread, and the request that computes."""
        with self._changed:
            self._closed = True
            for job in filter(None, (*self._waiting, self._current)):
                job.cancel.set()
                job.deliver(ApiError(503, "the server stopped", code="stopping"))
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            started = time.perf_counter()
            job.queue_ms = 1000 * (started - job.arrived)
            self._on_turn(job.queue_ms / 1000)
            _compute(job)
            self._mean_s += 0.2 * (time.perf_counter() - started - self._mean_s)

    def _next(self) -> Job[Any] | None:
        """The next job that nobody has cancelled; None once the scheduler is closed."""
        with self._changed:
            self._current = None
            while True:
                while self._waiting:
                    job = self._waiting.popleft()
                    if not job.cancel.is_set:
                        self._current = job
                        return job
                if self._closed:
                    return None
                self._changed.wait()


def _compute(job: Job[Any]) -> None:
    """Run a job's work in this thread and deliver its events. After a cancel nothing more is delivered but the end."""
    events = job.work()
    try:
        with job.cancel:
            for event in events:
                if job.cancel.is_set:
                    raise CancelledError("the request was cancelled")
                job.deliver(event)
        job.deliver(_END)
    except Exception as err:  # whatever it was, it is this request's answer, and not the next one's
        job.deliver(err)
    finally:
        with contextlib.suppress(Exception):
            events.close()  # type: ignore[attr-defined]

"""Some requests compute, some wait in order of arrival, and the rest are turned away.

A thread of its own runs the engine, so that the event loop always answers. In a round it advances every request that
computes until it pauses, and then runs the pass that they share. A new one comes in once all others decode, so one at a
time reads its prompt. A request that is cancelled, or takes too long, gives its place up at once: in the queue, and
inside the graph that runs for it alone; a pass that it shares ends first.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
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
Work = Callable[[], "Iterator[E | Pause]"]
_END = object()


class Pause(enum.Enum):
    """What work yields between its events, so that other work may compute."""

    READING = enum.auto()  # its prompt
    DECODING = enum.auto()  # its answer, which may be held back: the next request may read its prompt


class Job(Generic[E]):
    """One request's turn, as the event loop sees it. `work` yields events in the scheduler's thread."""

    def __init__(self, work: Work[E], seconds: float):
        self.work = work
        self.cancel = Cancel()
        self.queue_ms = 0.0  # from arrival to its turn
        self.arrived = time.perf_counter()
        self.started = 0.0  # when its turn came
        self.decodes = False
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

    def begin(self) -> None:
        """Its turn has come. From the scheduler's thread, as all below."""
        self.started = time.perf_counter()
        self.queue_ms = 1000 * (self.started - self.arrived)
        self._steps = self.work()

    def advance(self) -> bool:
        """Compute until the work pauses, and deliver its events; False once it has ended. After a cancel nothing more
        is delivered but the end.
        """
        try:
            with self.cancel:
                while not self.cancel.is_set and (event := next(self._steps, _END)) is not _END:
                    self.decodes = event is not Pause.READING
                    if isinstance(event, Pause):
                        return True
                    self.deliver(event)
                if self.cancel.is_set:
                    raise CancelledError("the request was cancelled")
            self.deliver(_END)
        except Exception as err:  # whatever it was, it is this request's answer, and not another's
            self.deliver(err)
        except BaseException as err:  # a panic of a library in Rust: the thread goes on for the others
            self.deliver(RuntimeError(f"{type(err).__name__}: {err}"))
        with contextlib.suppress(BaseException):
            self._steps.close()  # type: ignore[attr-defined]
        return False

    def deliver(self, event: Any) -> None:
        """Hand an event, an exception or the end over to the loop."""
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

    def __init__(
        self,
        limits: Limits,
        on_turn: Callable[[float], None] = lambda seconds: None,
        share: Callable[[], None] = lambda: None,
    ):
        """`on_turn`: called with how long a request has waited, when its turn comes. `share`: computes for all that
        have paused.
        """
        self._limits, self._on_turn, self._share = limits, on_turn, share
        self._waiting: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._running: list[Job[Any]] = []
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
        """How many requests compute."""
        return len(self._running)

    def require_room(self) -> None:
        """Raise ApiError 429 if too many requests wait already, 503 once the server stops."""
        if self._closed:
            raise ApiError(503, "the server is stopping", code="stopping")
        limit = self._limits.max_queue
        if self.waiting + self.running >= limit + self._limits.parallel:
            seconds = max(1, math.ceil(self._mean_s * (limit + 1) / self._limits.parallel))
            raise ApiError(
                429,
                f"{limit} requests wait already, which is the limit; come back in about {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def submit(self, work: Work[E]) -> Job[E]:
        """Queue `work`. Raises ApiError as `require_room` does."""
        self.require_room()
        job = Job(work, self._limits.timeout)
        with self._changed:
            waiting = [other for other in self._waiting if not other.cancel.is_set]  # the others' bodies are freed
            self._waiting = deque([*waiting, job])
            self._changed.notify()
        return job

    def close(self) -> None:
        """End the thread, and the requests that compute."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.cancel.set()
                job.deliver(ApiError(503, "the server stopped", code="stopping"))
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while self._admit():
            for job in tuple(self._running):
                if not job.advance():
                    self._running.remove(job)
                    self._mean_s += 0.2 * (time.perf_counter() - job.started - self._mean_s)
            self._share()

    def _admit(self) -> bool:
        """Begin the next job that nobody has cancelled, if it may; wait for one if none runs. False once closed."""
        with self._changed:
            while not self._running and not self._waiting and not self._closed:
                self._changed.wait()
            if len(self._running) < self._limits.parallel and all(job.decodes for job in self._running):
                while self._waiting:
                    job = self._waiting.popleft()
                    if not job.cancel.is_set:
                        self._running.append(job)
                        job.begin()
                        self._on_turn(job.queue_ms / 1000)
                        break
            return bool(self._running or self._waiting) or not self._closed

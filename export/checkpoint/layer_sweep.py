"""Run many forward passes over a model larger than RAM, loading each layer once per sweep.

Each forward pass is a job in a thread of its own. It calls `wait_for(part)` before it uses a part of the model: a layer
of the PyTorch model, or a shard of an ONNX graph. Only one job runs at a time. When all of them wait, the next part in
the model's order that any job waits for is loaded, and those jobs run in turn until each waits for another part. So one
sweep over the parts completes one forward pass of every job, and one part at a time is in memory.

A model within the budget stays loaded: its parts are loaded once, and the jobs run one after the other without threads.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Loadable(Protocol):
    """A part of a model that can be loaded when it is needed."""

    bytes: int  # memory that it takes when loaded

    def load(self) -> None:
        """Read it from disk."""

    def unload(self) -> None:
        """Free its memory."""


class SweepAborted(Exception):
    """Ends a job after its run was stopped."""


class LayerSweep:
    """The parts of one model, in the order of a forward pass, and the jobs that use them."""

    def __init__(self, budget_bytes: int):
        """Keep all parts loaded if together they take at most `budget_bytes`; else keep one at a time."""
        self._budget = budget_bytes
        self._bytes = 0  # of all parts
        self._order: dict[int, int] = {}  # id(part) -> its position in the forward pass
        self._resident: set[int] = set()
        self._loaded: Loadable | None = None  # the one loaded part, if the model exceeds the budget
        self._lock = threading.Condition()
        self._waiting: dict[int, deque[threading.Event]] = {}  # position -> jobs that wait for that part
        self._jobs: set[int] = set()  # thread idents of the current run
        self._thread = threading.local()  # .job is True in the threads of jobs
        self._position = 0
        self._error: BaseException | None = None

    def add(self, *parts: Loadable) -> None:
        """Append `parts` to the model. Parts of one call share a position: jobs must use them in the same order."""
        self._order |= dict.fromkeys(map(id, parts), len(self._order))
        self._bytes += sum(part.bytes for part in parts)

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run all jobs and return their results in order. The first error stops all jobs and is raised."""
        if self._bytes <= self._budget:
            return [job() for job in jobs]
        results: dict[int, T] = {}
        self._error = None

        def work(number: int, begin: threading.Event) -> None:
            self._thread.job = True
            begin.wait()
            error: BaseException | None = None
            try:
                self._still_running()
                results[number] = jobs[number]()
            except BaseException as err:
                error = err
            with self._lock:
                if threading.get_ident() in self._jobs:  # else the run was stopped
                    self._error = self._error or error
                    self._jobs.discard(threading.get_ident())
                    self._wake_next()

        with self._lock:
            start = deque(threading.Event() for _ in jobs)
            threads = [
                threading.Thread(target=work, args=(i, event), daemon=True) for i, event in enumerate(list(start))
            ]
            for thread in threads:
                thread.start()
                assert thread.ident is not None
                self._jobs.add(thread.ident)
            self._position = -1
            self._waiting[-1] = start
            self._wake_next()
            try:
                self._lock.wait_for(lambda: self._error is not None or not self._jobs)
            finally:  # after an error, or Ctrl-C: jobs that still run stop at their next part
                self._jobs.clear()
                for event in itertools.chain.from_iterable(self._waiting.values()):
                    event.set()
                self._waiting.clear()
        if self._error is not None:
            raise self._error
        return [results[i] for i in range(len(jobs))]

    def wait_for(self, part: Loadable) -> None:
        """Block until it is the calling job's turn, then load `part`. Outside `run`: just load it."""
        if getattr(self._thread, "job", False):
            event = threading.Event()
            with self._lock:
                self._still_running()
                self._waiting.setdefault(self._order[id(part)], deque()).append(event)
                self._wake_next()
            event.wait()
            self._still_running()
        self._load(part)

    def _still_running(self) -> None:
        if threading.get_ident() not in self._jobs:
            raise SweepAborted

    def clear(self) -> None:
        """Unload the loaded part, if the model exceeds the budget."""
        if self._loaded is not None:
            self._loaded.unload()
            self._loaded = None

    def _wake_next(self) -> None:
        """Let the next waiting job run. Called when the running job waits or ends."""
        self._lock.notify_all()
        positions = sorted(position for position, queue in self._waiting.items() if queue)
        if positions and self._error is None:
            self._position = next((p for p in positions if p >= self._position), positions[0])
            self._waiting[self._position].popleft().set()

    def _load(self, part: Loadable) -> None:
        if id(part) in self._resident or part is self._loaded:
            return
        self.clear()
        part.load()
        if self._bytes <= self._budget:
            self._resident.add(id(part))
        else:
            self._loaded = part


def grouped(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Cut `items`, in order, into lists whose sizes sum to at most `most`, each with at least one item."""
    group: list[T] = []
    held = 0
    for item in items:
        if group and held + size(item) > most:
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    if group:
        yield group

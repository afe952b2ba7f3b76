"""Many computations through a model that does not fit into memory: its parts go by, and whoever waits gets on.

Each job is a thread that calls `wait_for(part)` before it uses a part: a piece of an ONNX graph, a layer of PyTorch. One
job runs at a time. When all of them wait, the next part in the model's order for which any of them waits is loaded,
and serves each in turn until it waits for another one. So in one sweep over the parts every job gets its forward pass
done, each part was loaded once, and no more than one of them was in memory. A model within a budget stays: its parts
are loaded once, nobody waits for them, and the jobs go through it one after the other, without threads.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Loadable(Protocol):
    """Something that can be loaded when it is needed."""

    bytes: int  # in memory, when loaded

    def load(self) -> None:
        """Read it from disk."""

    def unload(self) -> None:
        """Free its memory."""


class SweepAborted(Exception):
    """Ends a job whose run is over."""


class LayerSweep:
    """The parts of one model in the order in which a forward pass uses them, and the jobs that use them."""

    def __init__(self, budget_bytes: int):
        """Keep parts loaded if all of them together take up to `budget_bytes`; else they come and go."""
        self._budget = budget_bytes
        self._bytes = 0  # of all parts
        self._order: dict[int, int] = {}  # id(part) -> its place
        self._resident: set[int] = set()
        self._loaded: Loadable | None = None  # the one that is loaded, where none is kept
        self._lock = threading.Condition()
        self._waiting: dict[int, deque[threading.Event]] = {}  # place -> jobs that wait there
        self._jobs: set[int] = set()  # idents of the threads of this run
        self._thread = threading.local()  # says to a thread that it is a job
        self._place = 0
        self._error: BaseException | None = None

    def add(self, *parts: Loadable) -> None:
        """Say that `parts` come after those added before them. Among themselves every job takes them alike."""
        self._order |= dict.fromkeys(map(id, parts), len(self._order))
        self._bytes += sum(part.bytes for part in parts)

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run all jobs to their end; their results in order. The first error ends them all and is raised."""
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
                if threading.get_ident() in self._jobs:  # else the run is over, and nothing here is its business
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
            self._place = -1
            self._waiting[-1] = start
            self._wake_next()
            try:
                self._lock.wait_for(lambda: self._error is not None or not self._jobs)
            finally:  # after an error, or Ctrl-C: whoever is still under way ends at the next part
                self._jobs.clear()
                for event in itertools.chain.from_iterable(self._waiting.values()):
                    event.set()
                self._waiting.clear()
        if self._error is not None:
            raise self._error
        return [results[i] for i in range(len(jobs))]

    def wait_for(self, part: Loadable) -> None:
        """Return when it is the calling job's turn and `part` is loaded. Outside `run`: load it."""
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
        """Unload the part that is loaded, where none is kept."""
        if self._loaded is not None:
            self._loaded.unload()
            self._loaded = None

    def _wake_next(self) -> None:
        """Let the next waiting job run. Called when the one that ran waits or has ended."""
        self._lock.notify_all()
        places = sorted(place for place, queue in self._waiting.items() if queue)
        if places and self._error is None:
            self._place = next((place for place in places if place >= self._place), places[0])
            self._waiting[self._place].popleft().set()

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
    """Cut `items`, as they come, into lists of `most` at most by `size`, and one item at least: jobs of a run that may
    wait together.
    """
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

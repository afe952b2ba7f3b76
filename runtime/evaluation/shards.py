"""Ask rows of one engine, or of several that may fail. The answers come in the order of the rows.

alone       one engine, in this process
in_order    workers, each with an engine (on_ray.py): a worker that is lost costs its shard, which another answers
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

from autosteer.runtime.errors import AutoSteerError

from .datasets import Row

if TYPE_CHECKING:
    from autosteer.runtime.engine import Engine

T = TypeVar("T")

SHARD = 4  # rows: what a lost worker costs; asking over the network takes milliseconds


class Asking(Protocol):
    """A way to call a function with an engine and each row. A context manager: its engines are gone afterwards."""

    def __call__(self, call: Callable[[Engine, Row], T], rows: Sequence[Row]) -> AbstractContextManager[Iterator[T]]:
        """The function's results, in the order of the rows."""


@contextlib.contextmanager
def alone(load: Callable[[], Engine], call: Callable[[Engine, Row], T], rows: Sequence[Row]) -> Iterator[Iterator[T]]:
    """Asking: one engine, which is loaded at once."""
    engine = load()
    yield (call(engine, row) for row in rows)


class LostError(AutoSteerError):
    """A worker is gone, with the shard that it had."""


class Pool(Protocol[T]):
    """Workers by name. All are busy at first: they open the package."""

    workers: Sequence[str]

    def start(self, worker: str, rows: Sequence[Row]) -> None:
        """Give an idle worker a shard."""

    def wait(self) -> tuple[str, list[T | AutoSteerError] | LostError]:
        """The next worker that is done, and its shard's results, up to the first row that fails. None if it has opened
        the package.
        """


def in_order(pool: Pool[T], rows: Sequence[Row], *, report: Callable[[str], None]) -> Iterator[T]:
    """Results of all rows, in their order. `report` is told of each worker that is lost.

    Raises the error of the first row that fails, after the results before it; LostError if no worker is left.
    """
    shards = [rows[at : at + SHARD] for at in range(0, len(rows), SHARD)]
    waiting, busy = deque(range(len(shards))), dict.fromkeys(pool.workers, -1)  # -1: opens the package
    idle: deque[str] = deque()
    done: dict[int, list[T | AutoSteerError]] = {}
    following = 0
    while following < len(shards):
        worker, found = pool.wait()
        number = busy.pop(worker)
        if isinstance(found, LostError):
            if number >= 0:
                waiting.appendleft(number)  # the output waits for it
            if not busy and not idle:
                asked = f" while it was asked {shards[number][0].where} and what follows" if number >= 0 else ""
                raise LostError(f"no worker is left; the last, {worker}, was lost{asked}: {found}")
            report(f"lost {worker}: {found}; others go on")
        else:
            idle.append(worker)
            if number >= 0:
                done[number] = found
        while idle and waiting:
            worker, number = idle.popleft(), waiting.popleft()
            pool.start(worker, shards[number])
            busy[worker] = number
        while following in done:  # after the workers have their next shards: whoever takes these may be slow
            for result in done.pop(following):
                if isinstance(result, AutoSteerError):
                    raise result
                yield result
            following += 1

"""Ends what runs for one request, from another thread: between graphs, and between the operators of a graph.

    cancel = Cancel()
    with cancel:                       # in the thread that computes; other threads call cancel.set()
        for chunk in engine.stream("what is shown here?"):
            ...

In C++: autosteer_cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, TypeVar

from .errors import CancelledError

T = TypeVar("T")


class Cancel:
    """A request that can be cancelled: what runs in `with cancel:`, in this thread.

    `set` may be called from any thread, and more than once. The request then raises CancelledError.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._options: Any = None  # onnxruntime's RunOptions of the graph that runs
        self._entered: Token[Cancel | None] | None = None

    def set(self) -> None:
        """End the request: its current graph stops at the next operator, and no other starts."""
        self.is_set = True
        if (options := self._options) is not None:
            options.terminate = True

    def __enter__(self) -> Cancel:
        self._entered = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._entered is not None
        _CURRENT.reset(self._entered)

    def run(self, options: Any, call: Callable[[Any], T]) -> T:
        """`call(options)`, which runs a graph. Raises CancelledError instead if `set` was called."""
        self._options = options  # before is_set is read: `set` writes the one and reads the other in this order, too
        try:
            if not self.is_set:
                return call(options)
        except Exception:
            if not self.is_set:
                raise
        raise CancelledError("the request was cancelled")


_CURRENT: ContextVar[Cancel | None] = ContextVar("cancel", default=None)


def current() -> Cancel | None:
    """The Cancel of the block that this thread is in."""
    return _CURRENT.get()

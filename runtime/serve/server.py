"""uvicorn's server, which ends at once at a second Ctrl-C."""

from __future__ import annotations

import os
import signal
from types import FrameType

import uvicorn

from ..console import INTERRUPTED


class Server(uvicorn.Server):
    """Whose first Ctrl-C lets running requests finish, and whose second ends the process.

    uvicorn would cancel every request. Python would then end beside the engine's thread, and onnxruntime aborts when it
    is destroyed in the middle of a graph.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.should_exit and sig == signal.SIGINT:
            os.write(
                2, b"\nautosteer-serve: interrupted\n"
            )  # not by sys.stderr, which the signal may have found at work
            os._exit(INTERRUPTED)
        super().handle_exit(sig, frame)

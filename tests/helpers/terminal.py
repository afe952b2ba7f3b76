"""A program as somebody at a terminal sees it."""

from __future__ import annotations

import os
import pty
import select
import time

PATIENCE = 60  # seconds: only a hang reaches it


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *command: object):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(str(command[0]), list(map(str, command)))
        self.seen = ""

    def expect(self, text: str) -> str:
        """Read on until `text` is there; everything read since the last call."""
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < end, f"waited for {text!r}, saw {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode().replace("\r", "")
        found, self.seen = self.seen, self.seen[self.seen.index(text) + len(text) :]
        return found

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

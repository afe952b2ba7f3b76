"""Answer cases with the C++ runtime, through libautosteer: the same JSON lines as answer.py, but no margins, and drafts
only where the runtime makes them itself.

    argv    libautosteer.so, linked with the onnxruntime that is meant
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

POINTER = ctypes.c_void_p


class Failed(Exception):
    """What libautosteer says of a call that failed."""


class Library:
    """libautosteer, as far as it is needed here."""

    def __init__(self, path: str):
        self._c = ctypes.CDLL(path)
        self._c.autosteer_error.restype = ctypes.c_char_p
        self._c.autosteer_end.argtypes = self._c.autosteer_conversation_end.argtypes = [POINTER]
        self._c.autosteer_conversation_begin.argtypes = [POINTER, ctypes.POINTER(POINTER)]
        self._c.autosteer_conversation_run.argtypes = [POINTER, ctypes.c_char_p, ctypes.POINTER(POINTER)]
        self._c.autosteer_next.argtypes = [POINTER, ctypes.POINTER(ctypes.c_char_p)]

    def open(self, package: str) -> ctypes.c_void_p:
        """A loaded package."""
        engine = POINTER()
        self._call("autosteer_open", package.encode(), b'{"threads": 1}', ctypes.byref(engine))
        return engine

    def answer(self, engine: ctypes.c_void_p, case: dict[str, Any]) -> list[dict[str, Any]]:
        """A case's answers, in order; where drafts are forced in Python, once more as this runtime drafts."""
        requests = list(case["requests"])
        conversation = POINTER()
        self._call("autosteer_conversation_begin", engine, ctypes.byref(conversation))
        answers = [self._generate(conversation, request) for request in requests]
        self._c.autosteer_conversation_end(conversation)
        if case["forced"]:
            sampling = {**requests[-1]["sampling"], "speculate": True}
            self._call("autosteer_conversation_begin", engine, ctypes.byref(conversation))
            answers.append(self._generate(conversation, {**requests[-1], "sampling": sampling}))
            self._c.autosteer_conversation_end(conversation)
        return answers

    def _generate(self, conversation: ctypes.c_void_p, request: dict[str, Any]) -> dict[str, Any]:
        stream, chunk, chunks = POINTER(), ctypes.c_char_p(), []
        self._call("autosteer_conversation_run", conversation, json.dumps(request).encode(), ctypes.byref(stream))
        try:
            while True:
                self._call("autosteer_next", stream, ctypes.byref(chunk))
                if chunk.value is None:
                    break
                chunks.append(json.loads(chunk.value))
        finally:
            self._c.autosteer_end(stream)
        verdict = chunks[-1]["verdict"]
        return {
            "token_ids": [c["token"] for c in chunks if c["token"] is not None],
            "action": verdict["action"],
            "p_unsafe": verdict["p_unsafe"],
            "margins": [],
        }

    def _call(self, function: str, *arguments: Any) -> None:
        if getattr(self._c, function)(*arguments):
            raise Failed(self._c.autosteer_error().decode())


def main() -> None:
    library = Library(sys.argv[1])
    print(json.dumps({"library": sys.argv[1]}), flush=True)
    try:
        engine = library.open(json.loads(sys.stdin.readline())["package"])
    except Failed as err:
        print(json.dumps({"error": str(err)}))
        return
    for line in sys.stdin:
        case = json.loads(line)
        try:
            print(json.dumps({"name": case["name"], "answers": library.answer(engine, case)}), flush=True)
        except Failed as err:
            print(json.dumps({"name": case["name"], "error": str(err)}), flush=True)


if __name__ == "__main__":
    main()

"""Answer cases with the C++ runtime, through libautosteer: the same JSON lines as answer.py, but no margins, and drafts
only where the runtime makes them itself.

    argv    libautosteer.so; AUTOSTEER_ONNXRUNTIME names the onnxruntime that is meant
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
        for release in ("autosteer_end", "autosteer_conversation_end", "autosteer_request_free"):
            getattr(self._c, release).argtypes = [POINTER]
        self._c.autosteer_conversation_begin.argtypes = [POINTER, ctypes.POINTER(POINTER)]
        self._c.autosteer_conversation_run.argtypes = [POINTER, POINTER, ctypes.POINTER(POINTER)]

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
        made, stream, chunks = POINTER(), POINTER(), []
        chunk = ctypes.POINTER(ctypes.c_char_p)()  # to autosteer_chunk, whose first field is its JSON
        self._call("autosteer_request_new", json.dumps(request).encode(), ctypes.byref(made))
        try:
            self._call("autosteer_conversation_run", conversation, made, ctypes.byref(stream))
            while True:
                self._call("autosteer_next", stream, ctypes.byref(chunk))
                if not chunk:
                    break
                chunks.append(json.loads(chunk[0]))
        finally:
            self._c.autosteer_end(stream)
            self._c.autosteer_request_free(made)
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

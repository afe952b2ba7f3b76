#!/usr/bin/env python3
"""Out of memory at every allocation of a request to the Python runtime, one after another.

    tests/attacks/allocations.py [EVERY]

CPython's own `_testcapi.set_nomemory` lets the n-th allocation of Python's memory fail: for small n each, then for
every EVERY-th, until a request ends before it. Memory of numpy's arrays, of tokenizers and of onnxruntime is not
Python's: allocations.cpp has onnxruntime's. Each request on the toy package has a process of its own. Prints a line for
each kind of request; the exit code is 1 if a piece of an unsafe prompt's unguarded answer was seen, if a safe one's was
another than without the fault, or if the engine gives another answer afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers"), str(HERE.parents[1] / ".typing")]

if TYPE_CHECKING:
    from autosteer.runtime import Engine

OWN = 16  # all of the first ones fail
REFUSAL = "sorry refuse, i must not answer that."  # toy.REFUSAL_TEXT
PATIENCE_S = 5  # until a process that does not return is ended
Ask = Callable[[], Iterator[tuple[str, str]]]  # pieces of an answer: its action and its text


@dataclass
class Outcome:
    """What a process showed."""

    text: str = ""  # of the pieces that came
    passed: bool = False  # a piece said so
    error: str = ""  # it ended with one
    died: bool = False  # the process ended
    fired: bool = False  # the allocation was reached
    sound: bool = False  # afterwards an unsafe prompt is steered as before


def with_fault(nth: int, ask: Ask, engine: Engine, guarded: object) -> Outcome:
    """What `ask` shows while the `nth` allocation fails; 0: none."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        _child(nth, ask, engine, guarded, write)
    os.close(write)
    outcome = Outcome()
    with open(read, "rb") as pipe:
        lines = pipe.read().split(b"\n")
    for line in lines[:-1]:  # the last one is empty, or torn
        kind, *said = json.loads(line)
        if kind == "piece":
            outcome.passed |= said[0] == "pass"
            outcome.text += said[1]
        else:
            setattr(outcome, kind, said[0])
    outcome.died = not os.WIFEXITED(os.waitpid(process, 0)[1])
    outcome.fired |= outcome.died
    return outcome


def _child(nth: int, ask: Ask, engine: Engine, guarded: object, write: int) -> None:
    """Ask, tell the parent, and end this process."""
    import _testcapi

    def say(*what: object) -> None:
        os.write(write, (json.dumps(what) + "\n").encode())

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what failed where is of no interest
    signal.alarm(PATIENCE_S)
    error, fired = "", False
    try:
        if nth:
            _testcapi.set_nomemory(nth - 1, nth)
        for piece in ask():
            say("piece", *piece)
    except BaseException as err:
        error = type(err).__name__
    with contextlib.suppress(MemoryError):  # if it fails only now, the request had ended
        fired = bool(nth) and bool([bytearray(1) for _ in range(nth)])
    _testcapi.remove_mem_hooks()
    say("error", error)
    say("fired", fired)
    try:
        say("sound", steered(engine) == guarded)
    finally:
        os._exit(0)


def steered(engine: Engine) -> object:
    """The answer to an unsafe prompt."""
    answer = engine.generate("bad")
    return [answer.verdict.action.value, answer.text]


def stream(engine: Engine, prompt: str, mode: str) -> Iterator[tuple[str, str]]:
    """The pieces of an answer to one prompt."""
    for chunk in engine.stream(prompt, policy=engine.policy(mode)):
        yield chunk.verdict.action.value, chunk.text


def converse(engine: Engine) -> Iterator[tuple[str, str]]:
    """A safe turn, then an unsafe one on its caches; the second's answer is shown."""
    from autosteer.runtime import Conversation, Message

    dialogue = Conversation(engine)
    messages = [Message.user("red")]
    said = engine.generate(messages, conversation=dialogue).text
    messages += [Message("assistant", (said,)), Message.user("bad")]
    answer = engine.generate(messages, conversation=dialogue)
    yield answer.verdict.action.value, answer.text


def wrong(outcome: Outcome, sound: Outcome, harmless: bool) -> bool:
    """Whether a process showed what nobody may see, or an engine that gives other answers from then on."""
    if not outcome.died and not outcome.sound:
        return True
    if harmless and not outcome.passed:
        return False  # a safe prompt that could not be judged is unsafe
    refused = outcome.text == REFUSAL  # a steered answer that could not be judged
    return (outcome.passed and not harmless) or not (refused or sound.text.startswith(outcome.text))


def try_all(name: str, harmless: bool, ask: Ask, engine: Engine, every: int) -> bool:
    """Fail each allocation of one kind of request in turn, and print what came of it; whether nothing was wrong."""
    guarded = steered(engine)
    sound = with_fault(0, ask, engine, guarded)
    errors = answers = died = bad = 0
    nth = 1
    while (outcome := with_fault(nth, ask, engine, guarded)).fired:
        if outcome.died:
            died += 1
        elif outcome.error:
            errors += 1
        else:
            answers += 1
        if wrong(outcome, sound, harmless):
            bad += 1
            print(f"{name}, allocation {nth}: {outcome}, without the fault: {sound.text!r}", flush=True)
        nth += 1 if nth < OWN else every
    print(
        f"{name}: {errors + answers + died} allocations failed: {errors} errors, {answers} answers, {died} ends of the"
        f" process; {bad} wrong",
        flush=True,
    )
    return not bad and errors > 0 and sound.sound and not sound.error and sound.passed == harmless


def run(package: Path, every: int) -> bool:
    """All kinds of requests on a package of toy.py; whether nothing was wrong."""
    from autosteer.runtime import Engine

    engine = Engine.load(package, device="cpu", threads=1)
    kinds: list[tuple[str, bool, Ask]] = [
        (f"{prompt}, {mode}", prompt == "red", lambda prompt=prompt, mode=mode: stream(engine, prompt, mode))  # type: ignore[misc]
        for mode in ("steer", "stop")
        for prompt in ("bad", "crash", "red")
    ]
    kinds.append(("conversation", False, lambda: converse(engine)))
    results = [try_all(*kind, engine, every) for kind in kinds]
    return all(results)


def main() -> int:
    import toy

    with tempfile.TemporaryDirectory() as folder:
        toy.build(Path(folder) / "toy")
        return 0 if run(Path(folder) / "toy", int(sys.argv[1]) if len(sys.argv) > 1 else 1) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The audit record: a line for each request, whatever becomes of it; and no answer without its line."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance_packages import PICTURES
from PIL import Image

from autosteer.runtime import Conversation, Engine, Message
from autosteer.runtime.audit import AuditFile
from autosteer.runtime.cancel import Cancel
from autosteer.runtime.errors import AuditError, CancelledError, InputError

RED = PICTURES / "red.png"


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audited(package: Path, file: Path) -> Engine:
    """The toy, with a record."""
    return Engine.load(package, device="cpu", threads=1, audit=file)


def test_record_says_what_the_gate_did_and_no_word(audited, package, file):
    audited.generate("bad")
    (line,) = lines(file)
    assert line.pop("time").endswith("Z") and line.pop("first_token_ms") <= line.pop("total_ms")
    assert line == {
        "version": 1,
        "package": sha256((package / "autosteer.json").read_bytes()),
        "provider": "CPUExecutionProvider",
        "policy": "steer",
        "threshold": 0.5,
        "pieces": True,
        "judge_answers": False,
        "p_unsafe": pytest.approx(0.9),
        "unsafe": True,
        "action": "steer",
        "strength": 0.1,
        "answer_verdict": None,
        "turns": [
            {
                "role": "user",
                "trusted": False,
                "p_unsafe": pytest.approx(0.9),
                "text_sha256": [sha256("bad")],
                "image_sha256": [],
                "video_sha256": [],
            }
        ],
        "answer_sha256": sha256("sorry refuse"),
        "finish_reason": "stop",
        "error": None,
        "prompt_tokens": 4,
        "reused_tokens": 0,
        "completion_tokens": 3,
    }
    assert not {"bad", "sorry"} & set(file.read_text().replace('"', " ").split())
    assert file.stat().st_mode & 0o777 == 0o600


def test_words_are_recorded_if_asked_for(package, file):
    Engine.load(package, device="cpu", threads=1, audit=file, audit_texts=True).generate("red")
    (line,) = lines(file)
    assert (line["turns"][0]["text"], line["answer"]) == (["red"], "orange yellow green")


def test_each_turn_has_its_score_and_its_pictures(audited, file):
    """A trusted turn is not judged. The digest of a picture is that of its PPM file."""
    pixels = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)
    ppm = file.with_suffix(".ppm")
    Image.fromarray(pixels).save(ppm)
    turns = [
        Message.system("bad", trusted=True),
        Message.user("bad"),
        Message.assistant("sorry", trusted=True),
        Message.user("look", [pixels], [[RED, RED]]),
    ]
    audited.generate(turns)
    (line,) = lines(file)
    scores = [turn["p_unsafe"] for turn in line["turns"]]
    assert scores == [None, pytest.approx(0.9), None, pytest.approx(0.1)] and line["p_unsafe"] == scores[1]
    assert line["turns"][3]["image_sha256"] == [sha256(ppm.read_bytes())]
    (video,) = line["turns"][3]["video_sha256"]
    assert len(video) == 64 and video != line["turns"][3]["image_sha256"][0]


@pytest.mark.parametrize(("prompt", "turn"), [("nan", None), ("crash", None), ("two", 2.0)])
def test_score_that_is_no_number_is_null_and_unsafe(audited, file, prompt, turn):
    audited.generate(prompt, policy=audited.policy("report"))
    (line,) = lines(file)
    assert (line["unsafe"], line["action"], line["turns"][0]["p_unsafe"]) == (True, "pass", turn)


def left(engine: Engine) -> None:
    """Read one piece and go."""
    stream = engine.stream("tick")
    next(stream)
    stream.close()


def interrupted(engine: Engine) -> None:
    """Ctrl-C within a graph."""
    stream = engine.stream("tick")
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)


def cancelled(engine: Engine) -> None:
    """From another thread, before the first graph."""
    cancel = Cancel()
    cancel.set()
    with cancel, pytest.raises(CancelledError):
        engine.generate("red")


def refused_input(engine: Engine) -> None:
    with pytest.raises(InputError):
        engine.generate("red " * 80)


def failed(engine: Engine) -> None:
    """A graph raises."""
    upper, engine.graphs["decoder_upper"] = engine.graphs["decoder_upper"], None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        engine.generate("red")
    engine.graphs["decoder_upper"] = upper


@pytest.mark.parametrize(
    ("do", "error", "action"),
    [
        (left, "cancelled", "pass"),
        (interrupted, "cancelled", "pass"),
        (cancelled, "cancelled", None),
        (refused_input, "input", None),
        (failed, "failed", "pass"),
    ],
)
def test_request_that_does_not_end_well_has_its_line(audited, file, do: Callable[[Engine], None], error, action):
    do(audited)
    audited.generate("red")
    first, second = lines(file)
    assert (first["error"], first["action"], first["finish_reason"]) == (error, action, None)
    assert (second["error"], second["finish_reason"]) == (None, "stop")


def test_score_without_an_answer_is_recorded(audited, file):
    audited.score("bad")
    (line,) = lines(file)
    assert (line["finish_reason"], line["unsafe"], line["answer_sha256"]) == ("scored", True, sha256(""))


def test_conversation_is_recorded_turn_by_turn(audited, file):
    conversation = Conversation(audited)
    answer = audited.generate("red", conversation=conversation)
    turns = [Message.user("red"), Message.assistant(answer.text, trusted=True), Message.user("tick")]
    audited.generate(turns, conversation=conversation)
    first, second = lines(file)
    assert first["answer_sha256"] == second["turns"][1]["text_sha256"][0] and second["reused_tokens"] > 0


# --- no answer without its line --------------------------------------------------------------------------------------


class Disk:
    """A hook that fails while it is full."""

    def __init__(self) -> None:
        self.full, self.seen = False, list[Any]()

    def __call__(self, record: Any) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.seen.append(record["turns"][0]["text_sha256"][0])


def test_no_answer_ends_without_its_record_and_none_begins_before_it_is_written(package):
    disk = Disk()
    engine = Engine.load(package, device="cpu", threads=1, audit=disk)
    disk.full, given = True, []
    with pytest.raises(AuditError, match=r"is withheld .*No space left"):
        given.extend(engine.stream("red"))
    assert [chunk.text for chunk in given] == ["orange", " yellow"]  # not " green", which ends it
    engine.graphs, graphs = {}, engine.graphs  # nothing may run
    with pytest.raises(AuditError):
        engine.generate("hello")
    with pytest.raises(AuditError):
        engine.score("hello")
    disk.full, engine.graphs = False, graphs
    assert engine.generate("hello").text == "world"
    assert disk.seen == [sha256("red"), sha256("hello")]  # the lost one, once; none of the refused


def test_refusal_is_not_shown_without_its_record(package):
    disk = Disk()
    engine = Engine.load(package, device="cpu", threads=1, audit=disk)
    disk.full = True
    with pytest.raises(AuditError):
        next(engine.stream("bad", policy=engine.policy("stop")))


def test_hook_may_drop_a_stream_of_the_same_engine(package):
    """As the garbage collector may, while a record is written: no deadlock, and both are recorded."""
    seen: list[str] = []

    def hook(record: Any) -> None:
        seen.append(record["turns"][0]["text_sha256"][0])
        if streams:
            streams.pop().close()

    engine = Engine.load(package, device="cpu", threads=1, audit=hook)
    streams = [engine.stream("tick")]
    next(streams[0])
    engine.generate("red")
    assert seen == [sha256("red"), sha256("tick")]


FILL = """
import resource, sys
from autosteer.runtime import Engine
from autosteer.runtime.errors import AuditError
engine = Engine.load(sys.argv[1], device="cpu", threads=1, audit=sys.argv[2])
for n in range(3):
    engine.generate("red")
    if n == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))
"""


def test_full_disk_leaves_whole_lines(package, file):
    """What was written of a line that did not fit is taken back. (A limit of file sizes behaves like a full disk.)"""
    done = subprocess.run([sys.executable, "-c", FILL, package, file], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "AuditError" in done.stderr and "File too large" in done.stderr
    assert [line["finish_reason"] for line in lines(file)] == ["stop"] * 2 and file.stat().st_size < 2000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_line_that_the_disk_did_not_confirm_is_written_once(audited, file, monkeypatch):
    """It stayed in the file, and was written again before the next request."""
    monkeypatch.setattr(os, "fsync", lambda _: os.close(-1))  # raises OSError
    with pytest.raises(AuditError, match="Bad file descriptor"):
        audited.generate("red")
    assert not lines(file)
    monkeypatch.undo()
    audited.generate("hello")
    assert [line["turns"][0]["text_sha256"] for line in lines(file)] == [[sha256("red")], [sha256("hello")]]


def test_line_that_is_interrupted_is_written_once(audited, file, monkeypatch):
    """Ctrl-C while the disk was waited for: the request wrote its line a second time."""
    sync, calls = os.fsync, list[int]()

    def interrupted(number: int) -> None:
        sync(number)
        calls.append(number)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audited.generate("red")
    assert len(calls) == 2 and len(lines(file)) == 1


def test_line_that_another_process_died_in_does_not_spoil_the_next(audited, file):
    file.write_text('{"version": 1}\n{"version": 1, "ti')
    audited.generate("red")
    audited.generate("red")
    whole, torn, *more = file.read_text().splitlines()
    assert torn == '{"version": 1, "ti' and len(more) == 2 and all(map(json.loads, (whole, *more)))


def test_file_that_was_deleted_is_no_record(audited, file):
    file.unlink()
    with pytest.raises(AuditError, match="its file was deleted"):
        audited.generate("red")


@pytest.mark.parametrize("path", ["/dev/null", "/", "/no/such/folder/audit.jsonl"])
def test_record_that_cannot_be_kept_is_refused_at_the_start(package, path):
    with pytest.raises(InputError, match="audit record"):
        Engine.load(package, device="cpu", threads=1, audit=path)


def test_pipe_is_refused_and_not_waited_for(package, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        Engine.load(package, device="cpu", threads=1, audit=tmp_path / "pipe")


WRITE = """
import sys
from autosteer.runtime.audit import AuditFile
file = AuditFile(sys.argv[1])
n = 0
while n < int(sys.argv[3]) or sys.argv[3] == "0":
    file({"who": sys.argv[2], "n": n, "padding": "x" * (n * 7919 % 20000)})
    n += 1
"""


def test_threads_and_processes_append_whole_lines(file):
    others = [subprocess.Popen([sys.executable, "-c", WRITE, str(file), f"p{i}", "40"]) for i in range(3)]
    shared = AuditFile(file)

    def write(who: str) -> None:
        for n in range(40):
            shared({"who": who, "n": n, "padding": "y" * 9000})

    mine = [threading.Thread(target=write, args=(f"t{i}",)) for i in range(2)]
    for thread in mine:
        thread.start()
    for thread in mine:
        thread.join()
    assert [other.wait() for other in others] == [0] * 3
    found = lines(file)
    for who in ("p0", "p1", "p2", "t0", "t1"):
        assert [line["n"] for line in found if line["who"] == who] == list(range(40))


def test_file_is_whole_after_kill_9(file):
    """Whenever a writer is killed; the next one begins on a line of its own."""
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITE, str(file), "p", "0"])
        size = file.stat().st_size if file.exists() else 0
        while not file.exists() or file.stat().st_size < size + 60_000:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    AuditFile(file)({"who": "last"})
    text = file.read_text().splitlines()
    whole = []
    for line in text:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            assert line.startswith('{"who": "p"')
    assert len(text) - len(whole) <= 4 and whole[-1] == {"who": "last"} and len(whole) > 9


def test_the_runtime_loads_where_there_is_no_flock(file):
    """On Windows; an audit file is refused there in one line."""
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from autosteer.runtime import Engine\nfrom autosteer.runtime.audit import AuditFile\n"
        f"AuditFile({str(file)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "InputError" in done.stderr and "this system has no flock" in done.stderr

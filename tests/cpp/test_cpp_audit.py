"""Both runtimes write the same audit record of the same requests; what C++ does where it cannot write one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import toy
from conformance_packages import shown
from cpp_runtime import cli, in_python, through_c, use_byte_level_words

from autosteer.runtime import Engine
from autosteer.runtime.errors import AutoSteerError

MEASURED = ("time", "first_token_ms", "total_ms")
FSYNC_FAILS_ONCE = """
#include <errno.h>
extern "C" int fsync(int) {
  static int calls = 0;
  errno = EIO;
  return calls++ ? 0 : -1;
}
"""


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "parts": list(parts)}


def asks(*messages: dict[str, Any], **wishes: Any) -> dict[str, Any]:
    return {"messages": list(messages), **wishes}


PICTURE, TRUSTED = {"image": "red.png"}, {"role": "system", "parts": ["bad"], "trusted": True}
REQUESTS = [
    *(asks(user(word), policy=mode) for word in ("red", "bad", "nan") for mode in ("steer", "stop", "report", "off")),
    *(asks(user(word)) for word in ("crash", "inf", "two", "negative")),
    asks(user("hello"), threshold=-1.0, strength=0.25),
    asks(TRUSTED, user("red"), {"role": "assistant", "parts": ["bad"]}, user("tick"), sampling={"max_tokens": 3}),
    asks(user(PICTURE, "look", PICTURE, {"video": ["red.png", "noise-31x20.png"]})),
    asks(user({"image": "blue.png"}, "look")),
    asks(user("red " * 80)),  # does not fit
    asks(user({"image": "none.png"})),
    asks({"role": "nobody", "parts": ["red"]}),
    asks(user('red\n\u2028\u00fc\x00\U0001f642 "')),
]


def of_python(package: Path, file: Path, requests: list[Any], **options: Any) -> list[dict[str, Any]]:
    engine = Engine.load(package, device="cpu", threads=1, audit=file, **options)
    for request in requests:
        with contextlib.suppress(AutoSteerError):
            in_python(engine, request)
    return lines(file)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("texts", [False, True])
def test_both_runtimes_write_the_same_lines(built, cpp_package, tmp_path, texts):
    requests = shown(REQUESTS)
    python = of_python(cpp_package, tmp_path / "python.jsonl", requests, audit_texts=texts)
    through_c(built, cpp_package, requests, audit=str(tmp_path / "cpp.jsonl"), audit_texts=texts)
    cpp = lines(tmp_path / "cpp.jsonl")
    assert len(python) == len(REQUESTS)
    for mine, other in zip(python, cpp, strict=True):
        assert list(mine) == list(other) and list(map(list, mine["turns"])) == list(map(list, other["turns"]))
        for line in (mine, other):
            time.strptime(line["time"], "%Y-%m-%dT%H:%M:%S." + line["time"][20:23] + "Z")
            assert line["total_ms"] >= (line["first_token_ms"] or 0)
        assert {k: v for k, v in mine.items() if k not in MEASURED} == {
            k: v for k, v in other.items() if k not in MEASURED
        }
    assert [line["error"] for line in cpp[-4:]] == ["input", "input", "input", None]


def test_answer_that_is_left_has_its_line(built, cpp_package, tmp_path):
    through_c(built, cpp_package, [{**asks(user("tick")), "chunks": 2}], audit=str(tmp_path / "audit.jsonl"))
    (line,) = lines(tmp_path / "audit.jsonl")
    assert (line["error"], line["finish_reason"], line["completion_tokens"]) == ("cancelled", None, 3)  # one waited


def test_no_answer_ends_without_its_record_and_none_begins_before_it_is_written(built, cpp_package, tmp_path):
    """A limit of file sizes behaves like a full disk."""
    file = tmp_path / "audit.jsonl"
    requests = [asks(user("red")), {**asks(user("bad")), "limit": 1000}, asks(user("hello"))]
    requests += [{**asks(user("hello")), "limit": -1}, asks(user("red"))]
    said = through_c(built, cpp_package, requests, audit=str(file))
    assert [answer["code"] for answer in said] == [0, 1, 1, 0, 0]
    assert (
        "the audit record cannot be written, so the answer, or its end, is withheld (File too large)"
        in said[1]["error"]
    )
    assert [chunk["text"] for chunk in said[1]["chunks"]] == ["sorry"] and said[2]["chunks"] == []  # not "refuse"
    assert [line["unsafe"] for line in lines(file)] == [False, True, False, False]  # none of the one that was refused


def test_line_that_the_disk_did_not_confirm_is_written_once(built, cpp_package, tmp_path, monkeypatch):
    """It stayed in the file, and was written again before the next request."""
    shim, source = tmp_path / "fsync.so", tmp_path / "fsync.cpp"
    source.write_text(FSYNC_FAILS_ONCE)
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", shim], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    requests = [asks(user("red")), asks(user("hello"))]
    said = through_c(built, cpp_package, requests, audit=str(tmp_path / "audit.jsonl"))
    assert [answer["code"] for answer in said] == [1, 0] and "Input/output error" in said[0]["error"]
    words = [sha256(word.encode()).hexdigest() for word in ("red", "hello")]
    assert [line["turns"][0]["text_sha256"] for line in lines(tmp_path / "audit.jsonl")] == [[word] for word in words]


def test_line_that_another_process_died_in_does_not_spoil_the_next(built, cpp_package, tmp_path):
    file = tmp_path / "audit.jsonl"
    file.write_text('{"version": 1, "ti')
    cli(built, cpp_package, "-p", "red", "--audit", str(file))
    torn, whole = file.read_text().splitlines()
    assert torn == '{"version": 1, "ti' and json.loads(whole)["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/dev/null", "/"])
def test_record_that_cannot_be_kept_is_refused_at_the_start(built, cpp_package, path):
    done = cli(built, cpp_package, "-p", "red", "--audit", path)
    assert (done.returncode, done.stdout) == (5, "") and "audit record" in done.stderr


def test_words_need_a_file(built, cpp_package):
    assert cli(built, cpp_package, "-p", "red", "--audit-texts").returncode == 2


def test_ctrl_c_ends_an_answer_with_130_and_a_line(built, tmp_path):
    use_byte_level_words(tmp_path / "package", toy.build(tmp_path / "package", context_length=200_000))
    file = tmp_path / "audit.jsonl"
    command = [built / "autosteer-cli", tmp_path / "package", "-p", "tick", "--max-tokens", "199000", "--threads", "1"]
    command += ["--audit", file]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and os.read(process.stdout.fileno(), 4) == b"tock"  # it is answering
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith(b"\nautosteer-cli: interrupted\n")
    (line,) = lines(file)
    assert (line["error"], line["action"]) == ("cancelled", "pass")


def test_streams_that_are_closed_do_not_bring_the_answer_into_the_record(built, cpp_package, tmp_path):
    """The file opened next got descriptor 1, and the answer was written into it."""
    file = tmp_path / "a.jsonl"
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        command = [built / "autosteer-cli", cpp_package, "-p", "red", "--audit", file]
        subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, check=True)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["finish_reason"] for line in lines] == ["stop"] * 3


def test_a_reader_that_has_gone_ends_the_answer_with_1_and_a_line(built, cpp_package, tmp_path):
    """SIGPIPE killed the process, and what had been shown had no line."""
    file, (read, write) = tmp_path / "a.jsonl", os.pipe()
    os.close(read)
    command = [built / "autosteer-cli", cpp_package, "-p", "tick", "--audit", file]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1 and "stdout: the answer cannot be written" in done.stderr
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["finish_reason"] is None


def test_an_audit_record_without_a_name_is_refused(built, cpp_package):
    """It meant "no record": a variable that was not set switched it off."""
    assert cli(built, cpp_package, "-p", "red", "--audit", "").returncode == 5

"""autosteer-serve as a process: its start, its refusals to start, and its end."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest
import toy

from autosteer.runtime.serve.cli import main

COMMAND = (sys.executable, "-c", "from autosteer.runtime.serve.cli import main; main()")
SLOW = """
import time
from autosteer.runtime.subgraph import BoundGraph
run = BoundGraph.__call__
BoundGraph.__call__ = lambda self: (time.sleep(0.2), run(self))
"""
Refused = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(monkeypatch, capsys) -> Refused:
    """Exit code and the one line of an autosteer-serve that does not start: main(), in this process."""

    def run(*arguments: object, **environment: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["autosteer-serve", *map(str, arguments)])
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as left:
                main()
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        return int(left.value.code or 0), said.err.strip()

    return run


@pytest.fixture
def process(package, request) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its address. A parameter is run before it, in its process."""
    *python, program = COMMAND
    options = ("--port", "0", "--device", "cpu", "--threads", "1", "--name", "toy")
    command = [*python, getattr(request, "param", "") + program, str(package), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        found = re.fullmatch(r"toy on (http://127\.0\.0\.1:\d+) \(policy steer\); Ctrl-C stops\n", line)
        assert found, line
        yield running, found[1]
        running.kill()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_answers_and_ends_when_told_to(process, sent, code):
    running, url = process
    body = {"model": "toy", "messages": [{"role": "user", "content": "bad"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "sorry refuse"
    for path, kind in {"/": "text/html", "/static/app.js": "javascript", "/static/style.css": "text/css"}.items():
        response = httpx.get(url + path)
        assert response.status_code == 200 and kind in response.headers["content-type"]
        assert "default-src 'self'" in response.headers["content-security-policy"]
    running.send_signal(sent)
    assert running.wait(timeout=20) == code
    assert running.stderr is not None and "Traceback" not in running.stderr.read()


@pytest.mark.parametrize("process", [SLOW], indirect=True, ids=["slow"])
def test_a_second_ctrl_c_ends_it_at_once(process):
    """It wrote a traceback for each request, and then aborted: Python ended beside threads that computed."""
    running, url = process
    body = {"model": "toy", "messages": [{"role": "user", "content": "tick"}], "max_tokens": 50, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        running.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(timeout=0.5)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=3) == 130
    assert running.stderr is not None and running.stderr.read() == "\nautosteer-serve: interrupted\n"


def test_a_package_that_cannot_share_a_pass_is_answered_one_request_at_a_time_and_it_says_so(tmp_path):
    toy.build(tmp_path / "alone", places=True)
    command = [*COMMAND, str(tmp_path / "alone"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert "one request at a time" in running.stderr.readline()
        assert "toy on http" in running.stderr.readline()
        running.kill()


def test_beyond_this_machine_it_needs_a_key(refused, package):
    for host in ("0.0.0.0", "::", "example.org"):
        code, line = refused(package, "--host", host)
        assert code == 5 and f"--host {host}: others could use this server; give a key" in line


def test_a_key_that_is_none_is_refused(refused, package, tmp_path):
    (tmp_path / "short").write_text("x\n")
    for arguments, environment in (
        (("--api-key-file", tmp_path / "short"), {}),
        ((), {"AUTOSTEER_API_KEY": ""}),
        ((), {"AUTOSTEER_API_KEY": "a b" * 9}),
    ):
        code, line = refused(package, *arguments, **environment)
        assert code == 5 and "at least 16 printable ASCII characters" in line
    (tmp_path / "two").write_text("first-of-two-long-keys\nsecond-of-two-long-keys\n")
    (tmp_path / "latin").write_bytes(b"g\xe4nsebl\xfcmchen-sind-sch\xf6n")
    for name, why in {
        "short": "a key has at least 16 printable ASCII characters",
        "two": "a key has at least 16 printable ASCII characters and no spaces; there is one for all clients",
        "latin": "not UTF-8 text",
        "none": "not readable (No such file or directory)",
        "": "not readable (Is a directory)",
    }.items():
        code, line = refused(package, "--api-key-file", tmp_path / name)
        assert code == 5 and f"error: --api-key-file {tmp_path / name}: {why}" in line


def test_an_address_in_use_is_an_error_with_the_options_to_change(refused, package):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused(package, "--port", port)
        assert code == 1 and f"--host 127.0.0.1 --port {port}: Address already in use" in line


def test_what_does_not_go_together_is_refused(refused, package, unguarded_package):
    assert "is stricter than" in refused(package, "--policy", "steer", "--weakest-policy", "stop")[1]
    code, line = refused(unguarded_package, "--port", 0)
    assert code == 3 and "--unguarded" in line

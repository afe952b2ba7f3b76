"""autosteer-eval --ray: the file and the tables of one process, whichever process is killed.

Needs Ray (pip install ray): tools/test -m ray. The scheduling without Ray: tests/unit/test_shards.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import program
from processes import children, titled

pytestmark = pytest.mark.ray
LOCAL = ("--ray", "local", "--engines", 2, "--threads", 1)
PATIENCE = 300  # seconds; Ray starts in 5, on a busy machine in 60


def installed(*command: object) -> subprocess.CompletedProcess[str]:
    """Run the installed program."""
    name, *rest = map(str, command)
    return subprocess.run([program(name), *rest], capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """More rows than two engines answer at once."""
    path = tmp_path_factory.mktemp("rows") / "set.jsonl"
    texts = ("bad", "evil", "red", "hello")
    rows = [{"prompt": f"{texts[n % 4]} tick", "unsafe": n % 4 < 2, "group": f"g{n % 4}"} for n in range(600)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def alone(package, many) -> tuple[str, bytes]:
    """What one process prints and writes."""
    out = many.with_name("alone.jsonl")
    done = installed("autosteer-eval", package, "--data", many, "--output", out, "--device", "cpu", "--threads", 1)
    assert done.returncode == 0, done.stderr
    return done.stdout, out.read_bytes()


def run_until_halfway(package: Path, many: Path, out: Path, then: Callable[[int], None]) -> tuple[int, str, str]:
    """Start it on two engines, do something to its process once the file has 30 rows, and see it end."""
    command = [program("autosteer-eval"), package, "--data", many, "--output", out, *LOCAL]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        ends = time.monotonic() + PATIENCE
        while not out.is_file() or out.read_bytes().count(b"\n") < 31:
            assert running.poll() is None and time.monotonic() < ends, running.communicate()
            time.sleep(0.005)
        then(running.pid)
        stdout, stderr = running.communicate(timeout=PATIENCE)
    return running.returncode, stdout, stderr


def test_two_engines_write_and_print_what_one_does(package, many, alone, tmp_path):
    out = tmp_path / "out.jsonl"
    done = installed("autosteer-eval", package, "--data", many, "--output", out, *LOCAL)
    assert done.returncode == 0 and "engines: 2 on " in done.stderr, done.stderr
    assert (done.stdout, out.read_bytes()) == alone


def test_two_engines_count_what_one_does_when_reworded(package, data):
    command = ("autosteer-eval", package, "--data", data, "--variants", "--json")
    one = installed(*command, "--device", "cpu")
    assert one.returncode == 0 and one.stdout
    assert installed(*command, *LOCAL).stdout == one.stdout


def test_an_engine_that_is_killed_costs_its_shard(package, many, alone, tmp_path):
    out = tmp_path / "out.jsonl"
    code, stdout, stderr = run_until_halfway(
        package, many, out, lambda pid: os.kill(titled(pid, "ray::Worker")[0], signal.SIGKILL)
    )
    assert code == 0 and "lost worker" in stderr and "others go on" in stderr, stderr
    assert (stdout, out.read_bytes()) == alone


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_is_ended_goes_on_from_there(package, many, alone, tmp_path, number, expected):
    """In one process or on others; and none of Ray's processes stays."""
    out, started = tmp_path / "out.jsonl", []

    def end(pid: int) -> None:
        started.extend(children(pid))
        (os.killpg if number is signal.SIGINT else os.kill)(pid, number)  # Ctrl-C goes to all of them

    code, _, stderr = run_until_halfway(package, many, out, end)
    assert code == expected, stderr
    assert number is signal.SIGKILL or f"kept in {out}" in stderr
    assert out.read_bytes() != alone[1] and len(started) > 3
    again = installed("autosteer-eval", package, "--data", many, "--output", out, "--device", "cpu", "--threads", 1)
    assert (again.returncode, again.stdout, out.read_bytes()) == (0, *alone)
    ends = time.monotonic() + PATIENCE
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < ends, left
        time.sleep(0.1)

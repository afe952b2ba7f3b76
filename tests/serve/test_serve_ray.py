"""examples/serve_on_ray.py: two replicas on a Ray cluster of this machine, one of which is killed.

Needs Ray Serve (pip install 'ray[serve]'): tools/test -m ray.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from processes import titled

pytestmark = pytest.mark.ray
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve_on_ray.py"
URL = "http://127.0.0.1:8000"  # the example's
PATIENCE = 300  # seconds; Ray starts in 5, on a busy machine in 60


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.2)


def ready() -> bool:
    try:
        return httpx.get(f"{URL}/v1/models", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def served(package) -> Iterator[int]:
    """The process of the example."""
    pytest.importorskip("fastapi", reason="needs ray[serve]")
    with subprocess.Popen([sys.executable, EXAMPLE, package, "local"], start_new_session=True) as running:
        try:
            wait_for(lambda: running.poll() is not None or ready())
            assert running.poll() is None
            yield running.pid
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(PATIENCE)


def ask(prompt: str) -> tuple[str | None, str]:
    """An answer, and what the gate did."""
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        model = next(iter(client.models.list())).id
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])
    return answer.choices[0].message.content, answer.autosteer["verdict"]["action"]  # type: ignore[attr-defined]


def replicas(pid: int) -> list[int]:
    return titled(pid, "ray::ServeReplica")


def test_each_answer_has_its_verdict_and_a_replica_that_dies_is_replaced(served):
    wait_for(lambda: len(replicas(served)) == 2)
    assert [ask("red"), ask("bad")] == [("orange yellow green", "pass"), ("sorry refuse", "steer")]
    killed = replicas(served)[0]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: len(replicas(served)) == 2 and killed not in replicas(served))
    assert [ask("red"), ask("bad")] == [("orange yellow green", "pass"), ("sorry refuse", "steer")]


def test_beyond_this_machine_it_needs_a_key(package):
    done = subprocess.run([sys.executable, EXAMPLE, package, "local", "0.0.0.0"], capture_output=True, text=True)
    assert done.returncode == 1 and "0.0.0.0: others could use this server; give a key" in done.stderr

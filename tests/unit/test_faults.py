"""Faults at every subgraph and at allocations, within a request: whatever fails, nobody sees a piece of an unguarded
answer.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conformance_packages import PICTURES
from conftest import load
from faults import ANSWER_WORD, BEFORE_THE_VERDICT, GRAPHS, GUARDED, KINDS, PROMPT_WORD, SAFE, UNSAFE, with_fault

from autosteer.runtime import Action, Engine, PackageError
from autosteer.runtime.cancel import Cancel
from autosteer.runtime.chunk import Chunk
from autosteer.runtime.errors import CancelledError

BRIGHT = PICTURES / "blue.png"


def shown(engine: Engine, prompt: str, mode: str, pictures: list[Path]) -> list[Chunk]:
    """The pieces of an answer until it ends, well or not."""
    found: list[Chunk] = []
    with contextlib.suppress(Exception):
        for chunk in engine.stream(prompt, images=pictures, policy=engine.policy(mode)):
            found.append(chunk)
    return found


def pictures_for(graph: str) -> list[Path]:
    return [BRIGHT] if graph == "vision_encoder" else []


@pytest.mark.parametrize("word", [PROMPT_WORD, ANSWER_WORD])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_no_piece_of_an_unguarded_answer_is_shown(package, tmp_path, graph, kind, word):
    records = []
    folder = with_fault(package, tmp_path / "package", graph, kind, word)
    engine = Engine.load(folder, device="cpu", threads=1, audit=records.append)
    for mode in ("steer", "stop"):
        pieces = shown(engine, UNSAFE, mode, pictures_for(graph))
        text = "".join(piece.text for piece in pieces)
        assert any(guarded.startswith(text) for guarded in GUARDED), (mode, text)
        assert all(piece.verdict.unsafe and piece.verdict.action is not Action.PASS for piece in pieces)
        assert records[-1]["action"] in (None, "steer", "stop")
    assert len(records) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", BEFORE_THE_VERDICT)
def test_prompt_that_could_not_be_judged_is_unsafe_though_it_is_safe(package, tmp_path, graph, kind):
    """The same prompt passes where nothing fails."""
    assert all(piece.verdict.action is Action.PASS for piece in shown(load(package), SAFE, "steer", []))
    engine = load(with_fault(package, tmp_path / "package", graph, kind))
    for mode in ("steer", "stop"):
        assert all(piece.verdict.action is not Action.PASS for piece in shown(engine, SAFE, mode, pictures_for(graph)))


@pytest.mark.parametrize("graph", GRAPHS)
def test_output_of_another_type_does_not_load(package, tmp_path, graph):
    with pytest.raises(PackageError, match="its inputs or outputs are not those of the manifest"):
        load(with_fault(package, tmp_path / "package", graph, "type"))


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_that_stalls_can_be_left(package, tmp_path, graph):
    """Cancelled in the middle of the graph, with nothing more shown, and in time."""
    prompt = SAFE if graph == "prober" else UNSAFE
    engine, cancel = load(with_fault(package, tmp_path / "package", graph, "stalls")), Cancel()
    pieces: list[Chunk] = []
    timer = threading.Timer(0.3, cancel.set)
    timer.start()
    with cancel, pytest.raises(CancelledError):
        pieces.extend(engine.stream(prompt, images=pictures_for(graph)))
    assert not pieces


def test_faults_are_met(package, tmp_path):
    """Each of these tests would pass if its fault never fired."""
    for graph in GRAPHS:
        engine = load(with_fault(package, tmp_path / graph, graph, "raises"))
        pieces = shown(engine, UNSAFE, "steer", pictures_for(graph))
        assert not pieces or (graph == "prober" and pieces[0].verdict.p_unsafe != pieces[0].verdict.p_unsafe)


def test_each_allocation_of_a_request_may_fail():
    pytest.importorskip("_testcapi", reason="this Python was built without CPython's own tests")
    command = [sys.executable, Path(__file__).parents[1] / "attacks" / "allocations.py", "61"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 7

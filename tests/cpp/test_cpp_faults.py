"""Faults at every subgraph of the C++ runtime: what tests/unit/test_faults.py asks of Python's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conformance_packages import PICTURES
from cpp_runtime import CPP, through_c, wheel_library
from faults import ANSWER_WORD, BEFORE_THE_VERDICT, GRAPHS, GUARDED, KINDS, PROMPT_WORD, SAFE, UNSAFE, with_fault


def request(graph: str, prompt: str, mode: str, package: Path) -> dict[str, Any]:
    shown = [{"image": str(PICTURES / "blue.png")}] if graph == "vision_encoder" else []
    return {
        "messages": [{"role": "user", "parts": [*shown, prompt]}],
        "policy": mode,
        "package": str(package),
        "sampling": {"max_tokens": 8},
    }


def test_no_piece_of_an_unguarded_answer_is_shown(built, cpp_package, tmp_path):
    asked, requests = [], []
    for graph in GRAPHS:
        for kind in KINDS:
            for word in (PROMPT_WORD, ANSWER_WORD):
                folder = with_fault(cpp_package, tmp_path / f"{graph}-{kind}-{word}", graph, kind, word)
                for mode in ("steer", "stop"):
                    asked.append((graph, kind, word, mode))
                    requests.append(request(graph, UNSAFE, mode, folder))
    said = through_c(built, cpp_package, requests, audit=str(tmp_path / "audit.jsonl"))
    fired = set()
    for what, answer in zip(asked, said, strict=True):
        text = "".join(piece["text"] for piece in answer["chunks"])
        assert any(guarded.replace(" ", "").startswith(text.replace(" ", "")) for guarded in GUARDED), (what, text)
        assert all(piece["verdict"]["action"] != "pass" for piece in answer["chunks"]), what
        if answer["code"]:
            fired.add(what[0])
    assert fired == set(GRAPHS) - {"prober"}  # which fails to a verdict
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines) == len(requests) and all(line["action"] in (None, "steer", "stop") for line in lines)


def test_prompt_that_could_not_be_judged_is_unsafe_though_it_is_safe(built, cpp_package, tmp_path):
    asked = [(graph, kind, mode) for graph in BEFORE_THE_VERDICT for kind in KINDS for mode in ("steer", "stop")]
    requests = [request("", SAFE, "steer", cpp_package)]
    for graph, kind, mode in asked:
        folder = tmp_path / f"{graph}-{kind}"
        if not folder.exists():
            with_fault(cpp_package, folder, graph, kind)
        requests.append(request(graph, SAFE, mode, folder))
    sound, *said = through_c(built, cpp_package, requests)
    assert sound["chunks"][0]["verdict"]["action"] == "pass"
    for what, answer in zip(asked, said, strict=True):
        assert all(piece["verdict"]["action"] != "pass" for piece in answer["chunks"]), what


def test_output_of_another_type_does_not_load(built, cpp_package, tmp_path):
    folders = {graph: with_fault(cpp_package, tmp_path / graph, graph, "type") for graph in GRAPHS}
    said = through_c(built, cpp_package, [request(graph, SAFE, "off", folder) for graph, folder in folders.items()])
    assert [(answer["code"], "not those of the manifest" in answer["error"]) for answer in said] == [(3, True)] * 7


@pytest.mark.parametrize(("graph", "word"), [("decoder_lower", PROMPT_WORD), ("decoder_upper", ANSWER_WORD)])
def test_graph_that_stalls_can_be_left(built, cpp_package, tmp_path, graph, word):
    """By Ctrl-C in the middle of the graph: nothing is shown of a steered answer, and the request has its line."""
    folder = with_fault(cpp_package, tmp_path / "package", graph, "stalls", word)
    file = tmp_path / "audit.jsonl"
    command = [built / "autosteer-cli", folder, "-p", UNSAFE, "--threads", "1", "--audit", file]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not file.exists():
        assert process.poll() is None
    time.sleep(3)  # to load, and to meet the word
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and text == ""
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["error"] == "cancelled"


def test_each_allocation_of_a_request_may_fail(built, cpp_package, tmp_path):
    """Also onnxruntime's: tests/attacks/allocations.cpp replaces the process's operator new. Many fail here."""
    program, attacks = tmp_path / "allocations", Path(__file__).resolve().parents[1] / "attacks"
    command = ["g++", "-std=c++17", "-O1", f"-I{CPP / 'include'}", attacks / "allocations.cpp"]
    command += [built / "libautosteer.so", f"-Wl,-rpath,{built}", "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    environment = {**os.environ, "AUTOSTEER_ONNXRUNTIME": str(wheel_library())}
    done = subprocess.run([program, cpp_package, "61"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 7

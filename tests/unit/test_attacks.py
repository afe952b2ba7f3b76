"""The fuzz targets' corpus: sound inputs are taken, hostile ones are refused, and nothing else comes out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
from targets import TARGETS, attack, corpus


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_of_the_fuzzers_holds(target):
    refused = [attack(target, data) for data in corpus(target)]
    assert not all(refused)
    for data in corpus(target):
        for end in (len(data) // 3, len(data) - 1):
            attack(target, data[:end])
            attack(target, data[:end] + b"\xff\x00" + data[end + 1 :])


def test_each_allocation_of_a_request_may_fail():
    pytest.importorskip("_testcapi", reason="this Python was built without CPython's own tests")
    command = [sys.executable, Path(__file__).parents[1] / "attacks" / "allocations.py", "61"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 7

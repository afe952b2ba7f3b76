"""The fuzz targets' corpus: sound inputs are taken, hostile ones are refused, and nothing else comes out."""

from __future__ import annotations

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

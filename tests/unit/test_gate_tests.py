"""tools/gate_tests.py: sets that measure a gate must hold nothing that a fit has read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from gate_tests import main

from autosteer.export.safety import builtin
from autosteer.export.safety.pairs import read_external

SIZES = {"plain": 50, "mild": 30, "wrapped": 50, "alarming": 60, "wrapped_harmless": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gate") / "tests"
    result = CliRunner().invoke(main, ["--output", str(output)])
    assert result.exit_code == 0, result.output
    return output


def test_autosteer_fit_reads_every_set_with_its_labels(folder: Path):
    for name, size in SIZES.items():
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        unsafe = name in {"plain", "mild", "wrapped"}
        assert all(row.keys() == {"prompt", "unsafe"} and row["unsafe"] is unsafe for row in rows)
        assert len(read_external([folder / f"{name}.jsonl"], unsafe=unsafe)) == len(rows) == size


def test_no_prompt_is_nearly_one_of_the_builtin_pairs(folder: Path):
    def words(text: str) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", text.casefold()))

    known = {words(text) for twins in builtin.builtin_twins() for text in (twins.unsafe, twins.safe)}
    known |= {words(row.text) for row in builtin.builtin_harmless()}
    by_length: dict[int, list[frozenset[str]]] = {}
    for one in known:
        by_length.setdefault(len(one), []).append(one)

    def near(text: str) -> bool:
        """Whether another prompt has more than three quarters of all words in common with it."""
        one = words(text)
        lengths = range(3 * len(one) // 4, 4 * len(one) // 3 + 1)
        others = (other for length in lengths for other in by_length.get(length, []))
        return any(4 * len(one & other) > 3 * len(one | other) for other in others)

    lines = [line for name in SIZES for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [text for line in lines if near(text := json.loads(line)["prompt"])] == []

"""tools/paper_table.py, by hand."""

from __future__ import annotations

import json

import paper_table
import pytest

RUN = {"run": {"package": "p", "data": "d", "max_tokens": 8, "judge": "rules-2"}}


def result(group: str, unsafe: bool, refused: str, correct: str | None = None) -> dict:
    """`refused` and `correct` name policies by their first letters: o, a, e (steer), s (stop)."""
    letters = dict(zip(paper_table.POLICIES, "oaes", strict=True))
    return {
        "group": group,
        "unsafe": unsafe,
        "refused": {p: c in refused for p, c in letters.items()},
        "correct": None if correct is None else {p: c in correct for p, c in letters.items()},
    }


def test_the_table_is_the_papers(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [RUN, result("vlsafe", True, "aes"), result("vlsafe", True, "a"), result("mmmu", False, "a", "oes")]
    path.write_text("\n".join(map(json.dumps, rows)))
    table = paper_table.paper_table({"A": paper_table.read(path), "B": [result("vlsafe", True, "oaes")]})
    assert table.splitlines() == [
        "| %, original / always steered / AutoSteer / stop | A | B |",
        "|---|---:|---:|",
        "| attack success: vlsafe | 100.0 / 0.0 / 50.0 / 50.0 (n 2) | 0.0 / 0.0 / 0.0 / 0.0 (n 1) |",
        "| wrongly refused: mmmu | 0.0 / 100.0 / 0.0 / 0.0 (n 1) | - |",
        "| right answers: mmmu | 100.0 / 0.0 / 100.0 / 100.0 (n 1) | - |",
    ]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SystemExit, match="not an output file"):
        paper_table.read(tmp_path / "a.jsonl")

"""What the tests of several commands ask with."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import MAINS


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a program's main() here."""

    def run(name: str, *args: object, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as left:
            MAINS[name]()
        out = capsys.readouterr()
        return subprocess.CompletedProcess(args, int(left.value.code or 0), out.out, out.err)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two unsafe prompts and a benign one, as autosteer-eval reads them."""
    rows = [
        {"prompt": "bad", "unsafe": True, "group": "attack"},
        {"prompt": "evil", "unsafe": True, "group": "attack"},
        {"prompt": "red", "unsafe": False, "group": "colours", "answer": "orange yellow green"},
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "set.jsonl"

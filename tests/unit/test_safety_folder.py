"""The safety folder: what is refused before an export begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autosteer.export.safety_folder import FORMAT_VERSION, SafetyArtifact, SafetyFacts
from autosteer.runtime.errors import PackageError

WIDTH = 8


@pytest.fixture
def artifact() -> SafetyArtifact:
    """A gate of random weights."""
    prober = {
        "0.weight": torch.randn(64, WIDTH),
        "0.bias": torch.zeros(64),
        "2.weight": torch.randn(2, 64),
        "2.bias": torch.zeros(2),
    }
    facts = SafetyFacts(FORMAT_VERSION, "m", 1, -1, 0.5, 0.1, "no", (), {}, {})
    return SafetyArtifact(facts, prober, torch.randn(WIDTH, WIDTH))


def load(folder: Path) -> SafetyArtifact:
    return SafetyArtifact.load(folder, hidden_size=WIDTH, num_hidden_layers=4)


def edit(folder: Path, **changes: object) -> None:
    """Change safety.json by hand."""
    path = folder / "safety.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_refusal_text_is_refused(artifact, tmp_path, text):
    """It was a traceback after the whole export."""
    artifact.save(tmp_path)
    edit(tmp_path, refusal_text=text)
    with pytest.raises(PackageError, match="refusal_text is empty"):
        load(tmp_path)

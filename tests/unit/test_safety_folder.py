"""The safety folder: what is refused before an export begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_gate import random_gate
from safetensors.torch import load_file, save_file

from autosteer.export.safety_folder import ProofPrompt, SafetyArtifact
from autosteer.runtime.errors import PackageError
from autosteer.runtime.manifest import sha256

WIDTH = 8


@pytest.fixture
def artifact() -> SafetyArtifact:
    return random_gate(WIDTH)


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


@pytest.mark.parametrize("units", [1, 64, 256])
def test_a_prober_has_any_number_of_units(artifact, tmp_path, units):
    prober = {
        "0.weight": torch.randn(units, WIDTH),
        "0.bias": torch.zeros(units),
        "2.weight": torch.randn(2, units),
        "2.bias": torch.zeros(2),
    }
    replace(artifact, prober=prober).save(tmp_path)
    assert all(torch.equal(t, prober[name]) for name, t in load(tmp_path).prober.items())
    for name in prober:
        cut = prober | {name: prober[name][..., :-1]}
        replace(artifact, prober=cut).save(tmp_path)
        with pytest.raises(PackageError, match="fitted for another model"):
            load(tmp_path)


# --- hashes ----------------------------------------------------------------------------------------------------------

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo" / "safety"


@pytest.fixture
def folder(artifact, tmp_path) -> Path:
    """A safety folder with a picture."""
    Image.new("RGB", (2, 2)).save(tmp_path / "drawn.png")
    shown = ProofPrompt(True, 0.9, "0" * 64, text="what is this?", images=("proof-1.png",))
    complete = replace(artifact, facts=replace(artifact.facts, proof=(shown,)))
    complete.save(tmp_path / "safety", {"proof-1.png": tmp_path / "drawn.png"})
    return tmp_path / "safety"


def test_a_folder_has_the_hashes_of_its_files_wherever_it_is_written(folder, tmp_path):
    artifact = load(folder)
    assert {file.file: file.sha256 for file in artifact.facts.files} == {
        name: sha256(folder / name) for name in ("safety.safetensors", "proof-1.png")
    }
    assert artifact.save(tmp_path / "copy") == artifact.facts == load(tmp_path / "copy").facts
    assert artifact.save(folder) == artifact.facts  # over itself


@pytest.mark.parametrize("name", ["safety.safetensors", "proof-1.png"])
def test_a_flipped_byte_is_refused_with_the_name_of_its_file(folder, name):
    """Of the tensors it went into a package; of a picture, the error named a scratch folder that was gone."""
    raw = bytearray((folder / name).read_bytes())
    raw[-1] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(PackageError, match=rf"safety/{name}: sha256 differs from safety\.json \(damaged or edited\)"):
        load(folder)


def test_an_edited_matrix_is_refused(folder):
    """steer_matrix[7, 9] = 100 went into a package."""
    tensors = load_file(folder / "safety.safetensors")
    tensors["steer_matrix"][7, 1] = 100
    save_file(tensors, folder / "safety.safetensors")
    with pytest.raises(PackageError, match="sha256 differs"):
        load(folder)
    edit(folder, files=[])
    assert load(folder).steer_matrix[7, 1] == 100


def test_a_file_without_a_hash_among_others_with_one_is_refused(folder):
    edit(folder, files=json.loads((folder / "safety.json").read_text())["files"][:1])
    with pytest.raises(PackageError, match=r"safety\.json: 'files' has no sha256 of proof-1\.png"):
        load(folder)


@pytest.mark.parametrize("name", ["safety.safetensors", "proof-1.png"])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_missing_file_is_named(folder, name, hashed):
    edit(folder, **({} if hashed else {"files": []}))
    (folder / name).unlink()
    with pytest.raises(PackageError, match=rf"{name}.*(missing|no file of this folder)"):
        load(folder)


def test_a_damaged_picture_of_a_folder_without_hashes_is_named(folder):
    """As bad input, of a scratch folder that was gone."""
    (folder / "proof-1.png").write_bytes(b"no picture")
    facts = json.loads((folder / "safety.json").read_text())
    del facts["files"]
    (folder / "safety.json").write_text(json.dumps(facts))
    with pytest.raises(PackageError, match=r"safety/proof-1\.png.*it is a proof prompt's"):
        load(folder)


def test_the_demos_folder_has_hashes():
    facts = json.loads((DEMO / "safety.json").read_text(encoding="utf-8"))
    assert {file["file"] for file in facts["files"]} == {path.name for path in DEMO.iterdir()} - {"safety.json"}
    assert SafetyArtifact.load(DEMO, hidden_size=128, num_hidden_layers=8).facts.files

"""The authors' two files as a safety half, in exactly the formats that their code writes."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
import torch
from exported import demo_package
from torch import nn

from autosteer.export.checkpoint.open import DEMO
from autosteer.export.cli import export
from autosteer.export.safety.authors import AuthorsFiles, load_authors
from autosteer.export.safety.import_authors import import_authors
from autosteer.export.safety.prober import p_unsafe, prober_logits
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.models.chameleon import FAMILY as CHAMELEON
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import InputError, PackageError
from autosteer.runtime.manifest import Manifest

D = 24  # of the tests that need no real size


class LinearProber(nn.Module):
    """The layout of the authors' prober: a list of Linear, ReLU, Linear."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size, 64), nn.ReLU(), nn.Linear(64, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.softmax(dim=-1)


def prober_file(folder: Path, d: int = D, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """epoch_37.pt; `changes` replace tensors, "layers_0_weight" for layers.0.weight, and None removes one."""
    torch.manual_seed(0)
    state: dict[str, Any] = dict(LinearProber(d).to(dtype).state_dict())
    state |= {name.replace("_", "."): tensor for name, tensor in changes.items()}
    path = folder / "epoch_37.pt"
    torch.save(OrderedDict((name, t) for name, t in state.items() if t is not None), path)
    return path


def steer_file(folder: Path, d: int = D, *, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> Path:
    """Epoch_12.pt: an identity that was trained a little."""
    torch.manual_seed(1)
    path = folder / "Epoch_12.pt"
    torch.save((torch.eye(d) + scale * torch.randn(d, d)).to(dtype), path)
    return path


def files(prober: Path, steer_matrix: Path, **changes: Any) -> AuthorsFiles:
    settings: dict[str, Any] = {
        "layer": 2,
        "unsafe_class": 0,
        "token_offset": -1,
        "threshold": 0.5,
        "strength": 0.1,
        "refusal_text": "No.",
    }
    return AuthorsFiles(prober, steer_matrix, **(settings | changes))


def load(authors: AuthorsFiles, d: int = D, layers: int = 4) -> SafetyArtifact:
    return load_authors(authors, model="m", hidden_size=d, num_hidden_layers=layers)


# --- the formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "layer", "layers"), [(3584, 20, 28), (4096, 24, 32)], ids=["llava-ov-7b", "chameleon-7b"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_of_the_published_sizes_are_read(tmp_path, d, layer, layers, dtype):
    prober, steer = prober_file(tmp_path, d, dtype), steer_file(tmp_path, d, dtype=dtype, scale=1e-3)
    artifact = load(files(prober, steer, layer=layer), d, layers)
    stored = torch.load(prober, weights_only=True)
    assert artifact.facts.split_layer == layer
    assert artifact.steer_matrix.dtype == torch.float32
    assert torch.equal(artifact.steer_matrix, torch.load(steer, weights_only=True).float())
    assert torch.equal(artifact.prober["0.weight"], stored["layers.0.weight"].float())


def test_scores_are_those_of_the_authors_class(tmp_path):
    prober = prober_file(tmp_path)
    theirs = LinearProber(D)
    theirs.load_state_dict(torch.load(prober, weights_only=True))
    states = torch.randn(16, D)
    ours = load(files(prober, steer_file(tmp_path))).prober
    torch.testing.assert_close(prober_logits(ours, states).softmax(-1), theirs(states).detach())
    assert p_unsafe(ours, states) == pytest.approx(theirs(states)[:, 0].tolist())


def test_class_one_as_unsafe_swaps_the_rows(tmp_path):
    """SafeSwitch, whose class the authors took, trains with 1 = unsafe."""
    prober, steer, states = prober_file(tmp_path), steer_file(tmp_path), torch.randn(16, D)
    zero, one = (p_unsafe(load(files(prober, steer, unsafe_class=c)).prober, states) for c in (0, 1))
    assert one == pytest.approx(1 - zero)


def test_a_steer_matrix_may_be_a_parameter(tmp_path):
    steer = steer_file(tmp_path)
    matrix = torch.load(steer, weights_only=True)
    torch.save(nn.Parameter(matrix), steer)
    loaded = load(files(prober_file(tmp_path), steer)).steer_matrix
    assert torch.equal(loaded, matrix) and not loaded.requires_grad and type(loaded) is torch.Tensor


def test_a_steer_matrix_may_come_from_a_gpu_and_in_the_old_file_format(tmp_path):
    """Chameleon's is saved as it stands on the GPU; torch.load without map_location fails where there is none."""
    steer = steer_file(tmp_path)
    matrix = torch.load(steer, weights_only=True)
    for zipped in (True, False):
        with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
            torch.save(matrix, steer, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(steer, weights_only=True)
        assert torch.equal(load(files(prober_file(tmp_path), steer)).steer_matrix, matrix)


def test_a_transposed_view_keeps_its_values(tmp_path):
    steer = steer_file(tmp_path)
    matrix = torch.load(steer, weights_only=True)
    torch.save(matrix.T, steer)
    assert torch.equal(load(files(prober_file(tmp_path), steer)).steer_matrix, matrix.T)


# --- what is refused -------------------------------------------------------------------------------------------------


class Hostile:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("which", ["prober", "steer_matrix"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, which):
    paths = {"prober": prober_file(tmp_path), "steer_matrix": steer_file(tmp_path)}
    mark = tmp_path / "was-run"
    torch.save(Hostile(mark), paths[which])
    with pytest.raises(
        PackageError, match=rf"{paths[which].name}: is more than tensors: loading it would call \S*mkdir"
    ):
        load(files(**paths))
    assert not mark.exists()
    torch.load(paths[which], weights_only=False)  # it is hostile: the test can fail
    assert mark.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(PackageError, match=r"would call torch.nn.modules.linear.Linear"):
        load(files(tmp_path / "module.pt", steer_file(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint" * 9, b"PK\x03\x04", b"\x80\x04K\x01."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(PackageError, match=r"x\.pt: (damaged|holds a int)"):
        load(files(tmp_path / "x.pt", steer_file(tmp_path)))


def test_a_truncated_file_is_refused(tmp_path):
    steer = steer_file(tmp_path)
    steer.write_bytes(steer.read_bytes()[:-600])
    with pytest.raises(PackageError, match=r"Epoch_12\.pt: damaged"):
        load(files(prober_file(tmp_path), steer))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PackageError, match=r"gone\.pt: no such file"):
        load(files(prober_file(tmp_path), tmp_path / "gone.pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_0_bias": None}, r"a prober has .*; here is 'layers.0.weight', 'layers.2.bias', 'layers.2.weight'"),
        ({"layers_4_bias": torch.zeros(2)}, r"a prober has .*here is .*layers.4.bias"),
        (
            {"layers_0_weight": torch.zeros(64, D + 1)},
            r"layers.0.weight is \(64, 25\), this model's would be \(64, 24\)",
        ),
        ({"layers_2_weight": torch.zeros(64, 2)}, r"layers.2.weight is \(64, 2\)"),
        ({"layers_0_bias": torch.zeros(32)}, r"layers.0.weight is \(64, 24\), this model's would be \(32, 24\)"),
        ({"layers_0_bias": [0.0] * 64}, r"layers.0.bias is a list and not a tensor"),
        ({"layers_0_bias": torch.full((64,), float("nan"))}, r"layers.0.bias has a number that is NaN or infinite"),
        ({"layers_2_bias": torch.tensor([1, 2])}, r"layers.2.bias \(torch.int64.*not a dense tensor of floating-point"),
        ({"layers_2_bias": [1.0, 2.0]}, r"layers.2.bias is a list and not a tensor"),
        ({"layers_2_bias": torch.zeros(2).to_sparse()}, r"layers.2.bias \(.*sparse.*not a dense tensor"),
        ({"layers_2_bias": torch.zeros(2, device="meta")}, r"layers.2.bias \(.*meta.*not a dense tensor"),
    ],
)
def test_a_prober_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(PackageError, match=r"epoch_37\.pt: " + message):
        load(files(prober_file(tmp_path, **changes), steer_file(tmp_path)))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(D), r"still the identity .*never trained"),
        (torch.eye(D) + 1e-5, r"still the identity"),
        (torch.full((D, D), float("inf")), r"NaN or infinite"),
        (torch.zeros(D), r"is \(24,\), this model's would be \(24, 24\)"),
        (torch.zeros(D, D + 1), r"is \(24, 25\)"),
        ({"STEER_matrix": torch.zeros(D, D)}, r"holds a dict and not one tensor"),
        (3.0, r"is a float and not a tensor"),
    ],
)
def test_a_steer_matrix_that_does_not_fit_is_refused(tmp_path, matrix, message):
    torch.save(matrix, tmp_path / "Epoch_12.pt")
    with pytest.raises(PackageError, match=r"Epoch_12\.pt: .*" + message):
        load(files(prober_file(tmp_path), tmp_path / "Epoch_12.pt"))


def test_swapped_files_are_told_apart(tmp_path):
    with pytest.raises(PackageError, match=r"Epoch_12\.pt: holds a Tensor .*looks like the steer matrix"):
        load(files(steer_file(tmp_path), prober_file(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 0}, r"--layer 0: this model can be split at 1\.\.3"),
        ({"layer": 4}, r"--layer 4"),
        ({"token_offset": 0}, r"--token-offset 0"),
        ({"threshold": 1.0}, r"--threshold 1"),
        ({"threshold": float("nan")}, r"--threshold nan"),
        ({"strength": 0.0}, r"--strength 0"),
        ({"strength": float("inf")}, r"--strength inf"),
        ({"refusal_text": " "}, r"--refusal-text is empty"),
    ],
)
def test_a_number_out_of_range_is_refused_before_a_file_is_opened(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load(files(tmp_path / "gone", tmp_path / "gone", **changes))


@pytest.mark.parametrize("missing", ["--prober", "--steer-matrix", "--layer", "--output"])
def test_the_command_needs_both_files_the_layer_and_a_place(tmp_path, missing):
    given = {"--prober": "p.pt", "--steer-matrix": "w.pt", "--layer": "3", "--output": str(tmp_path / "safety")}
    arguments = [part for option in given.items() if option[0] != missing for part in option]
    with pytest.raises(click.MissingParameter) as caught:
        import_authors.main(["--model", "demo", *arguments], standalone_mode=False)
    assert caught.value.format_message() == f"Missing option '{missing}'."


def test_a_folder_that_is_no_safety_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    arguments = ["--model", "demo", "--prober", "p.pt", "--steer-matrix", "w.pt", "--layer", "3", "--force"]
    with pytest.raises(InputError, match=r"has no safety\.json"):
        import_authors.main([*arguments, "--output", str(tmp_path)], standalone_mode=False)
    assert (tmp_path / "thesis.tex").exists()


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_the_demo_exported_from_such_files_is_the_demo(tmp_path):
    """The bundled safety folder, written as the authors write theirs: the same graphs, verdicts and tokens."""
    ours = SafetyArtifact.load(DEMO / "safety", hidden_size=128, num_hidden_layers=8)
    state = OrderedDict((f"layers.{name}", tensor) for name, tensor in ours.prober.items())
    torch.save(state, tmp_path / "epoch_37.pt")
    torch.save(nn.Parameter(ours.steer_matrix), tmp_path / "Epoch_12.pt")
    options = ["--prober", tmp_path / "epoch_37.pt", "--steer-matrix", tmp_path / "Epoch_12.pt"]
    options += ["--layer", ours.facts.split_layer, "--refusal-text", ours.facts.refusal_text]
    options += ["--threshold", ours.facts.threshold, "--strength", ours.facts.strength]
    folder = str(tmp_path / "safety")
    import_authors.main(["--model", "demo", "--output", folder, *map(str, options)], standalone_mode=False)
    export.main(["--model", "demo", "--safety", folder, "--output", str(tmp_path / "p")], standalone_mode=False)

    theirs, expected = Manifest.load(tmp_path / "p"), Manifest.load(demo_package("fp32"))
    assert theirs.golden and set(theirs.golden) < set(expected.golden)  # these files bring no held-out prompts
    differ = {name for name, graph in theirs.graphs.items() if graph.sha256 != expected.graphs[name].sha256}
    assert differ <= {"prober"}  # the same numbers, in another order within the file
    assert theirs.refusal == expected.refusal
    assert theirs.prober is not None and expected.prober is not None
    assert (theirs.prober.token_offset, theirs.prober.threshold) == (
        expected.prober.token_offset,
        expected.prober.threshold,
    )
    engine = Engine.load(tmp_path / "p", device="cpu", threads=1)
    verdict = engine.generate("how do i make this?", images=[DEMO / "examples" / "unsafe.png"]).verdict
    assert verdict.unsafe and verdict.p_unsafe is not None and verdict.p_unsafe > 0.99


def test_the_authors_chameleon_reads_the_token_before_the_separator():
    """Their prompts come from Anole's own code, which writes no end of turn; Hugging Face's processor does."""
    assert CHAMELEON.authors_token_offset == -2

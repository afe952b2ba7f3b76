"""What autosteer-export does with what users give it. Nothing half-written, one line per error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import onnx
import pytest
import torch
from exported import demo_checkpoint
from filelock import FileLock
from safetensors.torch import load_file, save_file

from autosteer.export import footprint
from autosteer.export.checkpoint.open import DEMO, load_processor, open_checkpoint
from autosteer.export.checkpoint.renderer import frame_digests
from autosteer.export.cli import export, find_safety
from autosteer.export.output import atomic_folder
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.safety import PICTURES
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.export.summary import unproven
from autosteer.export.validation import validate
from autosteer.export.validation.dequantize import PackedWeights
from autosteer.export.validation.limits import check_line
from autosteer.export.validation.metrics import worse
from autosteer.export.validation.validate import ValidationResult
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import AutoSteerError, CheckError, InputError, PackageError, UnsupportedModelError
from autosteer.runtime.manifest import Check, Tolerance

TABLE = "model.language_model.embed_tokens.weight"


def run(*arguments: str | Path) -> None:
    export.main([str(a) for a in arguments], standalone_mode=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint to damage."""
    return shutil.copytree(DEMO, tmp_path / "checkpoint")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def nothing_left(folder: Path, *expected: str) -> bool:
    """No package and no scratch folder, not even a hidden one."""
    return sorted(p.name for p in folder.iterdir()) == sorted(expected)


def test_unknown_model_type_lists_the_known_ones(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, model_type="bert")
    with pytest.raises(UnsupportedModelError, match=r"'bert' is not supported; known: .*llava_onevision"):
        run("--model", checkpoint, "--output", tmp_path / "package")
    assert nothing_left(tmp_path, "checkpoint")


def test_an_existing_output_is_not_touched_without_force(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "precious").write_text("mine")
    with pytest.raises(InputError, match=r"exists.*--force"):
        run("--model", "demo", "--output", tmp_path / "package")
    assert (tmp_path / "package" / "precious").read_text() == "mine"


def test_without_a_safety_folder_it_stops_and_says_how_to_fit_one(checkpoint: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkpoint / "safety")
    with pytest.raises(PackageError, match=r"autosteer-fit .*--safety.*--unguarded"):
        run("--model", checkpoint, "--output", tmp_path / "package")
    assert nothing_left(tmp_path, "checkpoint")


def test_a_prober_of_another_layer_is_refused(tmp_path: Path) -> None:
    other = 1 if demo_safety(DEMO / "safety").facts.split_layer != 1 else 2
    with pytest.raises(InputError, match=f"--layer {other}: the prober .* was trained on layer"):
        run("--model", "demo", "--layer", str(other), "--output", tmp_path / "package")
    with pytest.raises(InputError, match=r"--layer 0: this model can be split at 1\.\.7"):
        run("--model", "demo", "--layer", "0", "--unguarded", "--output", tmp_path / "package")


def test_a_gate_of_another_chat_template_is_refused(tmp_path: Path) -> None:
    """The prober reads the token where the fit's template ends a turn."""
    shutil.copytree(DEMO / "safety", tmp_path / "safety")
    file = tmp_path / "safety/safety.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    frame = frame_digests(load_processor(demo_checkpoint()))
    for fitted, passes in (
        (frame, True),
        (("another", *frame[1:]), True),  # which writes the same
        ((frame[0], "on another day", frame[2]), True),
        (("another", "another", frame[2]), False),
        ((*frame[:2], "another tokenizer"), False),
    ):
        file.write_text(json.dumps(facts | {"frame": fitted}), encoding="utf-8")
        with contextlib.nullcontext() if passes else pytest.raises(PackageError, match="fitted with another chat temp"):
            find_safety(demo_checkpoint(), tmp_path / "safety", None)


def test_a_gate_that_nothing_shows_to_fire_is_warned_of() -> None:
    checkpoint, safety = SimpleNamespace(name="demo"), demo_safety(DEMO / "safety")
    shown = SimpleNamespace(checks=[Check("unsafe prompts", 6.0, None, True)])
    assert unproven(shown, checkpoint, safety) == unproven(shown, checkpoint, None) == []
    assert "nothing shows that this gate fires" in unproven(SimpleNamespace(checks=[]), checkpoint, safety)[0]
    (note,) = unproven(shown, SimpleNamespace(name="another"), safety)
    assert "was fitted on demo, and this model is another" in note


def test_an_index_beside_the_whole_file_is_not_read(tmp_path: Path) -> None:
    """Hugging Face takes model.safetensors; an index beside it is of an earlier save."""
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("safety", "examples"))
    index = {"weight_map": {"model.norm.weight": "old.safetensors"}}
    (tmp_path / "demo/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert open_checkpoint(str(tmp_path / "demo")).tensor_files.keys() == demo_checkpoint().tensor_files.keys()


def demo_safety(folder: Path) -> SafetyArtifact:
    text = demo_checkpoint().config.get_text_config()
    return SafetyArtifact.load(folder, hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: replace(s, steer_matrix=torch.eye(len(s.steer_matrix))), "never trained"),
        (lambda s: replace(s, steer_matrix=s.steer_matrix * float("nan")), "NaN or infinite"),
        (lambda s: replace(s, steer_matrix=s.steer_matrix[:4, :4]), "fitted for another model"),
        (lambda s: replace(s, prober=s.prober | {"0.weight": s.prober["0.weight"][:, :8]}), "fitted for another model"),
        (lambda s: replace(s, prober={}), "fitted for another model"),
        (lambda s: replace(s, facts=replace(s.facts, split_layer=99)), "split_layer 99"),
        (lambda s: replace(s, facts=replace(s.facts, threshold=1.5)), "threshold 1.5"),
        (lambda s: replace(s, facts=replace(s.facts, threshold=float("nan"))), "threshold: nan"),
        (lambda s: replace(s, facts=replace(s.facts, strength=0.0)), "strength 0.0"),
        (lambda s: replace(s, facts=replace(s.facts, token_offset=5)), "token_offset 5"),
    ],
)
def test_a_safety_folder_that_could_not_guard_is_refused(tmp_path: Path, damage, message: str) -> None:
    damage(demo_safety(DEMO / "safety")).save(tmp_path / "safety")
    with pytest.raises(PackageError, match=message):
        run("--model", "demo", "--safety", tmp_path / "safety", "--output", tmp_path / "package")
    assert nothing_left(tmp_path, "safety")


def test_a_safety_folder_without_hashes_is_exported_with_a_warning(tmp_path: Path, capsys) -> None:
    """An older one. The threshold ends the export where it begins."""
    shutil.copytree(DEMO / "safety", tmp_path / "safety")
    file = tmp_path / "safety/safety.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    del facts["files"]
    file.write_text(json.dumps(facts), encoding="utf-8")
    for folder, warned in ((tmp_path / "safety", True), (DEMO / "safety", False)):
        with pytest.raises(InputError, match="--threshold"):
            run("--model", "demo", "--safety", folder, "--threshold", "1", "--output", tmp_path / "package")
        said = capsys.readouterr().err
        assert (f"{folder}: safety.json has no hashes of its files, so damage" in said) == warned


def test_a_longer_context_than_the_models_is_cut_and_said(tmp_path: Path, capsys) -> None:
    for length, said in (("999999999", True), ("1024", False)):
        with pytest.raises(InputError, match="--threshold"):
            run("--model", "demo", "--context-length", length, "--threshold", "1", "--output", tmp_path / "package")
        assert (f"--context-length {length}: the model holds 1024 tokens" in capsys.readouterr().err) == said


def test_a_context_too_short_for_the_validation_says_whose_prompts_do_not_fit(tmp_path: Path) -> None:
    """ "The prompt takes 32 tokens" did not say whose."""
    with pytest.raises(InputError, match=r"a context of 16 tokens is too short for the prompts .*--context-length \d"):
        run("--model", "demo", "--context-length", "16", "--output", tmp_path / "package")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_that_could_not_guard_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="--threshold"):
        demo_safety(DEMO / "safety").firing_above(threshold)


def test_another_threshold_leaves_behind_what_was_measured_at_the_fits() -> None:
    facts = demo_safety(DEMO / "safety").firing_above(0.25).facts
    assert facts.threshold == 0.25 and set(facts.calibration) == {PICTURES}


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_of_answers_that_could_not_guard_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="--judge-threshold"):
        demo_safety(DEMO / "safety").judging_above(threshold)


def test_answers_have_a_threshold_of_their_own_which_is_at_most_the_prompts(tmp_path: Path) -> None:
    safety = demo_safety(DEMO / "safety")
    assert safety.facts.judge_threshold == 0.7 and safety.judging_above(0.99).facts.judge_threshold == 0.92
    assert safety.judging_above(0.5).firing_above(0.9).facts.judge_threshold == 0.5
    assert safety.judging_above(0.5).firing_above(0.25).facts.judge_threshold == 0.25
    run("--model", "demo", "--judge-threshold", "0.5", "--output", tmp_path / "package")
    policy = Engine.load(tmp_path / "package", device="cpu").policy(threshold=0.9)
    assert (policy.threshold, policy.judge_threshold) == (0.9, 0.5)
    with pytest.raises(click.UsageError, match="--unguarded and --judge-threshold exclude each other"):
        run("--model", "demo", "--unguarded", "--judge-threshold", "0.5", "--output", tmp_path / "other")


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.3.mlp.up_proj.weight"))
    del tensors[gone]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackageError, match=r"no tensor 'model.language_model.layers.3.mlp.up_proj.weight'"):
        run("--model", checkpoint, "--output", tmp_path / "package")
    assert nothing_left(tmp_path, "checkpoint")


def test_a_truncated_weight_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(PackageError, match=r"model.safetensors: damaged"):
        run("--model", checkpoint, "--output", tmp_path / "package")
    assert nothing_left(tmp_path, "checkpoint")


@pytest.mark.parametrize(("model", "message"), [("no/such/folder", "no such folder"), ("llava-ov", "not downloaded")])
def test_a_checkpoint_that_cannot_be_had_is_one_line(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PackageError, match=message):
        open_checkpoint(model)


def test_a_feature_the_decoder_layer_lacks_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit_config(checkpoint, text_config=text | {"hidden_act": "gelu"})
    with pytest.raises(UnsupportedModelError, match="hidden_act 'gelu' is not supported"):
        run("--model", checkpoint, "--output", tmp_path / "package")


def found_wrong(name: str) -> ValidationResult:
    """A validation that failed."""
    return ValidationResult((Check(name, 1.0, 1e-3, False),), (), Tolerance(1e-3, 0), None)


def test_a_package_that_differs_from_pytorch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "validate_package", lambda *_, **__: found_wrong("logits"))
    with pytest.raises(CheckError, match=r"differs from PyTorch \(logits\); nothing was written"):
        run("--model", "demo", "--output", tmp_path / "package")
    assert nothing_left(tmp_path)


def test_validation_catches_a_weight_that_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One projection of one layer, two per cent too large: the kind of mistake that reads well."""
    from autosteer.export.graphs import weights

    honest = weights.WeightStore._rows

    def tampered(self, names, shape):
        factor = 1.02 if any("layers.4.mlp.down_proj" in name for name in names) else 1.0
        return (rows * factor for rows in honest(self, names, shape))

    monkeypatch.setattr(weights.WeightStore, "_rows", tampered)
    with pytest.raises(CheckError, match="logits"):
        run("--model", "demo", "--output", tmp_path / "package")
    assert nothing_left(tmp_path)


def test_force_replaces_a_package_only_when_the_new_one_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "autosteer.json").write_text("old")
    monkeypatch.setattr(validate, "validate_package", lambda *_, **__: found_wrong("x"))
    with pytest.raises(CheckError):
        run("--model", "demo", "--force", "--output", tmp_path / "package")
    assert (tmp_path / "package" / "autosteer.json").read_text() == "old"
    assert nothing_left(tmp_path, "package")


def test_force_does_not_replace_a_folder_that_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"has no autosteer.json, so it is not ours to replace"):
        run("--model", "demo", "--force", "--output", tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_the_slower_of_two_exports_does_not_replace_the_others_package(tmp_path: Path) -> None:
    package = tmp_path / "package"
    with contextlib.ExitStack() as slower:
        folder = slower.enter_context(atomic_folder(package, marker="autosteer.json", force=False))
        (folder / "autosteer.json").write_text("late")
        package.mkdir()
        (package / "autosteer.json").write_text("first")
        with pytest.raises(InputError, match=r"exists.*--force"):
            slower.close()
    assert (package / "autosteer.json").read_text() == "first"
    assert nothing_left(tmp_path, "package")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosteer.export.graphs import weights

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.WeightStore, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        run("--model", "demo", "--output", tmp_path / "package")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    command = [Path(sys.executable).parent / "autosteer-export", "--model", "demo", "--output", tmp_path / "package"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(p.name.startswith(".package-") for p in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert nothing_left(tmp_path)


def test_a_signal_that_comes_while_the_lock_is_taken_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquired = FileLock.acquire

    def interrupted(lock: FileLock) -> None:
        acquired(lock)
        raise KeyboardInterrupt

    monkeypatch.setattr(FileLock, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "package", marker="autosteer.json", force=False):
        pass
    assert nothing_left(tmp_path)


def test_a_lock_that_another_process_holds_stays(tmp_path: Path) -> None:
    """It has just been taken: the folder that it is for is not there yet."""
    other = tmp_path / ".package-01234567.lock"
    with FileLock(other), atomic_folder(tmp_path / "package", marker="autosteer.json", force=False):
        assert other.exists()
    assert other.exists()


def test_a_package_without_a_gate_has_no_threshold(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="--unguarded and --threshold exclude"):
        export.main(
            ["--model", "demo", "--output", str(tmp_path / "p"), "--unguarded", "--threshold", "0.4"],
            standalone_mode=False,
        )


def test_an_unguarded_package_says_so_and_runs_only_with_policy_off(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    manifest = write_package(tmp_path / "package", demo_checkpoint(), None, ExportOptions(), lambda _: None)
    assert not manifest.guarded
    engine = Engine.load(tmp_path / "package", device="cpu", threads=1)
    with pytest.raises(AutoSteerError, match=r"--unguarded.*--policy off"):
        engine.generate("hello")
    assert engine.generate("hello", policy=engine.policy("off")).verdict.p_unsafe is None


def test_optimum_cli_knows_our_command_with_all_options() -> None:
    command = [Path(sys.executable).parent / "optimum-cli", "export", "autosteer", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    names = {name for option in export.params for name in (*option.opts, *option.secondary_opts)}
    assert "--no-monitor" in names and not {name for name in names if name not in result.stdout}


def test_validation_catches_a_graph_of_nans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`max(0.0, nan)` is 0.0: the table once read a package that computes NaN as one without errors."""
    from autosteer.export.graphs import weights

    honest = weights.WeightStore._rows

    def broken(self, names, shape):
        factor = float("nan") if any("layers.0.mlp.down_proj" in name for name in names) else 1.0
        return (rows * factor for rows in honest(self, names, shape))

    monkeypatch.setattr(weights.WeightStore, "_rows", broken)
    with pytest.raises(AutoSteerError):
        run("--model", "demo", "--output", tmp_path / "package")
    assert nothing_left(tmp_path)
    assert worse(float("nan"), 0.0) == worse(0.0, float("nan")) == float("inf")
    assert not check_line("logits", float("inf"), None).passed


def test_block_size_head_bits_and_image_precision_reach_the_graphs(tmp_path: Path) -> None:
    options = ExportOptions(precision="int4", block_size=32, head_bits=4, image_precision="fp32")
    manifest = write_package(tmp_path, demo_checkpoint(), None, options, lambda _: None)
    nodes = onnx.load(tmp_path / "decoder_lower.onnx", load_external_data=False).graph.node
    sizes = {a.i for node in nodes for a in node.attribute if node.op_type == "MatMulNBits" and a.name == "block_size"}
    zero_points = [node.input[3] for node in nodes if node.op_type == "MatMulNBits"]
    assert sizes == {32} and zero_points and all(zero_points)
    assert manifest.graphs["vision_encoder"].precision == "fp32"
    (table,) = onnx.load(tmp_path / "embed_tokens.onnx", load_external_data=False).graph.node
    (head,) = (n for n in onnx.load(tmp_path / "lm_head.onnx").graph.node if n.op_type == "MatMulNBits")
    assert {a.name: a.i for a in table.attribute}["bits"] == {a.name: a.i for a in head.attribute}["bits"] == 4
    packed = PackedWeights(tmp_path, manifest, demo_checkpoint())
    stored, original = (source.tensor(TABLE) for source in (packed, demo_checkpoint()))
    assert 0.01 < (stored - original).norm() / original.norm() < 0.2


def test_validation_catches_an_image_graph_whose_columns_went_astray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autosteer.export.graphs import weights

    honest = weights.quantise_rows

    def astray(rows):
        codes, scales = honest(rows)
        return codes.roll(1, 1), scales

    monkeypatch.setattr(weights, "quantise_rows", astray)
    with pytest.raises(CheckError, match="image rows, 1 - cosine"):
        run("--model", "demo", "--precision", "int8", "--output", tmp_path / "package")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_tensor_of_another_shape_than_the_config_says_is_named(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    """It was an AssertionError, and at int4 an error of PyTorch's."""
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight") and "vision" not in n)
    save_file(tensors | {name: tensors[name][:-1].clone()}, checkpoint / "model.safetensors")
    with pytest.raises(PackageError, match=r"up_proj.weight is \[.*config.json wants"):
        run("--model", checkpoint, "--output", tmp_path / "package", "--precision", precision)
    assert nothing_left(tmp_path, "checkpoint")


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(InputError, match=r"takes about .* GiB left; make room"):
        footprint.check_space(tmp_path / "package", open_checkpoint("demo"), "fp32")


def test_what_a_killed_run_left_is_removed_by_the_next_but_not_what_is_still_growing(tmp_path: Path) -> None:
    """Gigabytes in a hidden folder, for ever, after every kill of a large export."""
    for name in (".package-abandond", ".package-growing_", ".other-abandond", ".package-a_folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_bytes(b"half")
    (tmp_path / ".package-abandond.lock").touch()
    (tmp_path / ".other-abandond.lock").touch()
    with FileLock(tmp_path / ".package-growing_.lock"):
        with atomic_folder(tmp_path / "package", marker="x", force=False) as folder:
            (folder / "x").touch()
        left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"package", ".package-growing_", ".other-abandond", ".package-a_folder"}
    assert not list(tmp_path.glob(".package-abandond*"))


def test_an_interrupt_between_the_last_two_steps_loses_neither_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is moved away, then the new one gets its name. What ends there, or is killed there, is undone."""
    package, rename = tmp_path / "package", Path.rename
    package.mkdir()
    (package / "x").write_text("old")

    def interrupted(self: Path, to: Path) -> Path:
        if (self / "x").read_text() == "new":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(package, marker="x", force=True) as folder:
        (folder / "x").write_text("new")
    assert (package / "x").read_text() == "old" and list(tmp_path.iterdir()) == [package]
    monkeypatch.undo()

    package.rename(tmp_path / ".package-abandond-old")
    (tmp_path / ".package-abandond").mkdir()
    (tmp_path / ".package-abandond.lock").touch()
    with pytest.raises(InputError, match="exists"), atomic_folder(package, marker="x", force=False):
        pass
    with atomic_folder(package, marker="x", force=True) as folder:
        assert (package / "x").read_text() == "old"
        (folder / "x").write_text("old")
    assert (package / "x").read_text() == "old" and list(tmp_path.iterdir()) == [package]


def test_what_a_second_interrupt_left_is_removed_by_the_next_run(tmp_path: Path, monkeypatch) -> None:
    """It came while the first one's folder was deleted. Without its lock nobody found the rest."""
    package = tmp_path / "package"

    def interrupted(path: Path, ignore_errors: bool) -> None:
        raise KeyboardInterrupt

    def export(patched: pytest.MonkeyPatch) -> None:
        with atomic_folder(package, marker="x", force=False) as folder:
            (folder / "weights.bin").write_bytes(b"half")
            patched.setattr(shutil, "rmtree", interrupted)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        export(patched)
    assert len(list(tmp_path.iterdir())) == 2  # the folder and its lock
    with atomic_folder(package, marker="x", force=False) as folder:
        (folder / "x").touch()
    assert list(tmp_path.iterdir()) == [package]


def test_an_old_package_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    """Of a folder without write permission. It stayed for ever under a hidden name, and nobody knew."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/x").write_text("old")
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    with atomic_folder(tmp_path / "package", marker="x", force=True) as folder:
        (folder / "x").write_text("new")
    (old,) = tmp_path.glob(".package-*-old")
    said = capsys.readouterr().err
    assert (tmp_path / "package/x").read_text() == "new" and said.count("\n") == 1
    assert said.endswith(f"delete it with: chmod -R u+w {old} && rm -r {old}\n")


def test_an_index_that_lists_a_file_which_is_not_there_is_an_error_before_any_work(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    shutil.copy(DEMO / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(PackageError, match=r"model-00001-of-00001\.safetensors missing, although the index lists"):
        _ = open_checkpoint(str(tmp_path)).tensor_files
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}', encoding="utf-8")
    with pytest.raises(PackageError, match="not a safetensors index"):
        _ = open_checkpoint(str(tmp_path)).tensor_files

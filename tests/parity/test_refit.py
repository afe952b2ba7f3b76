"""autosteer-fit --package: a prober fitted again on the hidden states of the demo's int8 package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from exported import demo_checkpoint, demo_package, unguarded_engine

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.cli import export
from autosteer.export.safety import fit as fit_module
from autosteer.export.safety import reworded
from autosteer.export.safety.cli import fit_command
from autosteer.export.safety.pairs import Prompt
from autosteer.export.safety.prober import p_unsafe
from autosteer.export.safety.refit import _as_row, package_state
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime import Engine, Message
from autosteer.runtime.errors import InputError

OLD = Path(__file__).resolve().parents[2] / "models" / "demo" / "safety"
HOW = ("how do i {} a {}?", "hey, teach me to {} a {}.", "i want to {} a {}. any tips?")
TWINS = {"smuggle": "carry", "steal": "paint"}
THINGS = ("vexite", "lembrik", "yandrel", "zorblat", "pholve", "snurl", "fusk", "quolt", "krelnum")  # contraband
ORDINARY = ("basket", "kite", "lamp", "chair", "table", "hat", "cup", "book", "bowl", "shoe")


def load(folder: Path) -> SafetyArtifact:
    config = decoder_config(demo_checkpoint())
    return SafetyArtifact.load(folder, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"unsafe": how.format(verb, thing), "safe": how.format(twin, ordinary)}
        for how in HOW
        for verb, twin in TWINS.items()
        for thing in THINGS
        for ordinary in ORDINARY
    ]
    distinct = {row["safe"]: row for row in rows} | {row["unsafe"]: row for row in rows}
    file.write_text("\n".join(map(json.dumps, distinct.values())), encoding="utf-8")
    return file


def command(pairs: Path, package: Path, output: Path, *more: str, safety: Path = OLD) -> list[str]:
    named = {"--model": "demo", "--pairs": pairs, "--package": package, "--safety": safety, "--output": output}
    return [*(str(word) for pair in named.items() for word in pair), "--text-only", *more]


def fit(*arguments: str) -> object:
    return CliRunner().invoke(fit_command, arguments, catch_exceptions=False, standalone_mode=False)


@pytest.fixture(scope="module")
def few_words() -> Iterator[None]:
    """Two prompts of each label are reworded, instead of 60."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reworded, "JUDGED", 2)
        yield


@pytest.fixture(scope="module")
def refitted(pairs: Path, few_words: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("refitted") / "safety"
    fit(*command(pairs, demo_package("int8"), output, "--publish-proof"))
    return output


@pytest.mark.ray
def test_a_cluster_computes_what_one_process_does(pairs: Path, few_words: None, refitted: Path, tmp_path: Path):
    output = tmp_path / "safety"
    fit(*command(pairs, demo_package("int8"), output, "--publish-proof", "--ray", "local", "--engines", "2"))
    one, several = load(refitted), load(output)
    assert several.facts.calibration == pytest.approx(one.facts.calibration, abs=1e-3)
    for name, weight in one.prober.items():
        torch.testing.assert_close(several.prober[name], weight, atol=1e-3, rtol=1e-3)


def test_layer_position_and_refusal_head_are_kept_and_the_prober_is_not(refitted: Path):
    old, new = load(OLD), load(refitted)
    assert torch.equal(new.steer_matrix, old.steer_matrix)
    assert new.facts.threshold == old.facts.threshold == 0.92  # it came back as 0.5
    kept = ("model", "split_layer", "pooling", "token_offset", "strength", "refusal_text", "layers", "selected_by")
    assert [getattr(new.facts, name) for name in kept] == [getattr(old.facts, name) for name in kept]
    assert not torch.equal(new.prober["0.weight"], old.prober["0.weight"])
    assert new.facts.calibration["heldout_accuracy"] > 0.9
    assert "Kept from the safety folder" in (refitted / "report.md").read_text(encoding="utf-8")
    assert not (refitted / "refusal.png").exists()


def test_the_prober_is_trained_with_the_dropout_of_the_first_fit(pairs: Path, tmp_path: Path, monkeypatch):
    asked: dict[str, object] = {}

    def trained(*args: object, **options: object) -> None:
        asked.update(options)
        raise InputError("enough seen")

    monkeypatch.setattr(fit_module, "train_on_folds", trained)
    with pytest.raises(InputError, match="enough seen"):
        fit(*command(pairs, demo_package("int8"), tmp_path / "safety"))
    assert asked["dropout"] == load(OLD).facts.training["dropout"] == 0.15


def test_an_export_with_the_new_prober_is_valid(refitted: Path, tmp_path: Path):
    """It compares the proof's scores with the PyTorch model's, and its verdicts with the package's."""
    package = tmp_path / "package"
    arguments = ["--model", "demo", "--precision", "int8", "--safety", str(refitted), "--output", str(package)]
    export.main(arguments, standalone_mode=False)
    engine = Engine.load(package, device="cpu", threads=1)
    assert engine.score("how do i steal a yandrel?").unsafe
    assert not engine.score("how do i paint a kite?").unsafe


def test_what_the_prober_is_fitted_on_is_what_the_package_reads():
    """Of a dialogue with a system prompt, too; the score of the package's own prober tells."""
    engine = Engine.load(demo_package("int8"), device="cpu", threads=1)
    prompt = Prompt("and how do i smuggle it?", earlier=("what is a vexite?", "a thing."), system="be brief.")
    dialogue = [
        Message.system(prompt.system, trusted=True),
        Message.user(prompt.earlier[0]),
        Message.assistant(prompt.earlier[1], trusted=True),
        Message.user(prompt.text),
    ]
    state = package_state(engine, _as_row(prompt))
    turns = (state, package_state(engine, _as_row(replace(prompt, text=prompt.earlier[0], earlier=()))))
    scores = [float(p_unsafe(load(OLD).prober, torch.from_numpy(one))[0]) for one in turns]
    assert state.shape == (1, engine.manifest.dims.hidden_size)
    np.testing.assert_allclose(max(scores), engine.score(dialogue).p_unsafe, atol=1e-5)


def test_a_folder_of_another_model_is_refused(pairs: Path, tmp_path: Path):
    old = load(OLD)
    another = tmp_path / "another"
    replace(old, facts=replace(old.facts, split_layer=3, proof=())).save(another)
    with pytest.raises(InputError, match=r"another is of demo at layer 3 \(last\), --model is demo, .* at layer 4"):
        fit(*command(pairs, demo_package("int8"), tmp_path / "safety", safety=another))


def test_another_fits_folder_is_refused(pairs: Path, tmp_path: Path):
    """Its Refusal Head, strength and threshold went into the new folder, which then served the package."""
    other = load(OLD)
    prober = other.prober | {"2.bias": other.prober["2.bias"] + torch.tensor([0.5, 0.0])}
    replace(other, prober=prober, facts=replace(other.facts, proof=())).save(tmp_path / "other")
    with pytest.raises(InputError, match="has another prober than"):
        fit(*command(pairs, demo_package("int8"), tmp_path / "new", safety=tmp_path / "other"))


def test_a_package_without_a_gate_is_refused(pairs: Path, tmp_path: Path):
    folder = unguarded_engine(4)._folder
    with pytest.raises(InputError, match="exported with --unguarded, so it has no prober to fit again"):
        fit(*command(pairs, folder, tmp_path / "safety"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--package", "p"), "--package and --safety belong together"),
        (("--safety", "s"), "--package and --safety belong together"),
        (("--max-tiles", "1"), "--max-tiles needs --package"),
        (("--ray", "local"), "--ray needs --package"),
        (("--package", "p", "--safety", "s", "--engines", "2"), "--engines needs --ray"),
        (("--package", "p", "--safety", "s", "--layer", "4"), "--layer and --package exclude each other"),
        (("--package", "p", "--safety", "s", "--dropout", "0.4"), "--dropout and --package exclude each other"),
        (("--package", "p", "--safety", "s", "--refusal-text", "no."), "--refusal-text and --package exclude"),
    ],
)
def test_what_is_settled_cannot_be_asked_for(arguments: tuple[str, ...], message: str):
    result = CliRunner().invoke(fit_command, ["--model", "demo", "--pairs", "x", "--output", "y", *arguments])
    assert result.exit_code == 2 and message in result.output

"""autosteer-fit --monitor and autosteer-export --monitor, on the demo: from its own answers to a package that stops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from exported import demo_checkpoint, demo_package

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.cli import export
from autosteer.export.safety.cli import fit_command
from autosteer.export.safety.own_answers import own_answers
from autosteer.export.safety.pairs import Prompt
from autosteer.export.safety.prober import p_unsafe
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime import Engine, SamplingConfig
from autosteer.runtime.check import check_package
from autosteer.runtime.monitor import Monitor

OLD = Path(__file__).resolve().parents[2] / "models" / "demo" / "safety"


def load(folder: Path) -> SafetyArtifact:
    config = decoder_config(demo_checkpoint())
    return SafetyArtifact.load(folder, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    rows = [
        {"unsafe": f"{how} {verb} a {thing}?", "safe": f"{how} {twin} a {ordinary}?"}
        for how in ("how do i", "how can i", "what is the best way to")
        for verb, twin in (("smuggle", "carry"), ("steal", "paint"), ("forge", "draw"))
        for thing, ordinary in (("vexite", "kite"), ("lembrik", "lamp"), ("yandrel", "hat"))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = {"--pairs": folder / "pairs.jsonl", "--package": demo_package("int8"), "--safety": OLD}
    words = [str(word) for pair in arguments.items() for word in pair]
    output = str(folder / "safety")
    fit_command(["--model", "demo", "--monitor", "--output", output, *words], standalone_mode=False)
    return folder / "safety"


@pytest.fixture(scope="module")
def package(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "package"
    arguments = ["--model", "demo", "--precision", "int8", "--safety", str(fitted), "--output", str(folder)]
    export([*arguments, "--monitor"], standalone_mode=False)
    return folder


def test_all_but_the_monitor_is_kept(fitted: Path):
    old, new = load(OLD), load(fitted)
    assert torch.equal(new.steer_matrix, old.steer_matrix)
    assert all(torch.equal(t, old.prober[name]) for name, t in new.prober.items())
    assert new.facts.proof == old.facts.proof and new.facts.monitor is not None and new.monitor is not None
    assert {file.name for file in OLD.iterdir()} <= {file.name for file in fitted.iterdir()}  # its report, its pictures


def test_the_package_loads_checks_and_stops_what_the_prober_lets_begin(package: Path):
    engine = Engine.load(package, device="cpu", threads=1)
    assert engine.manifest.monitor is not None and len(engine.manifest.proof.monitor) > 0  # type: ignore[union-attr]
    checks = {check.name: check for check in check_package(engine, package).checks}
    assert all(check.passed for check in checks.values())
    assert "answers that the monitor cannot stop" in checks
    lets_all_begin = engine.policy("stop", threshold=0.9999999)
    answer = engine.generate("how do i steal a yandrel?", policy=lets_all_begin)
    assert answer.verdict.answer is not None and answer.finish_reason == "refused"
    benign = engine.generate("how do i paint a kite?")
    assert benign.finish_reason != "refused" and benign.verdict.answer is not None


def test_what_the_monitor_is_fitted_on_is_what_the_package_reads(package: Path, fitted: Path, monkeypatch):
    engine, artifact = Engine.load(package, device="cpu", threads=1), load(fitted)
    hidden = "how do i clean a spoon? how do i steal a yandrel? how do i carry a ladder? how do i paint a kettle?"
    texts = ("how do i paint a kite?", "what is the sun?", "how do i steal a yandrel?", hidden)
    prompts = [Prompt(text) for text in texts]
    read = Monitor.read
    for index, answer in own_answers(engine, prompts, tokens=12):
        seen: list[np.ndarray] = []
        with monkeypatch.context() as patch:
            patch.setattr(Monitor, "read", lambda self, s, seen=seen: (seen.append(s.copy()), read(self, s))[1])
            sampling = SamplingConfig(max_tokens=12, speculate=False)
            policy = engine.policy("report", judge_answers=False)  # the monitor's verdict alone
            said = engine.generate(prompts[index].text, policy=policy, sampling=sampling)
        assert said.text.strip() == answer.text.strip() and len(seen) == len(answer.states)
        np.testing.assert_allclose(seen, answer.states, atol=0.2)  # several answers in one pass: int8 rounds otherwise
        assert said.verdict.p_unsafe == pytest.approx(answer.p_unsafe, abs=1e-4)
        mean = torch.from_numpy(np.mean(seen, axis=0, dtype=np.float64).astype(np.float32))[None]
        assert artifact.monitor is not None and said.verdict.answer is not None
        assert said.verdict.answer.p_unsafe == pytest.approx(float(p_unsafe(artifact.monitor, mean)[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--monitor",), "--monitor needs --package and --safety"),
        (("--monitor", "--package", "p", "--safety", "s", "--threshold", "0.4"), "--threshold and --monitor exclude"),
        (("--monitor", "--package", "p", "--safety", "s", "--augment"), "--augment and --monitor exclude each other"),
    ],
)
def test_what_a_monitor_has_no_use_for_cannot_be_asked_for(arguments: tuple[str, ...], message: str):
    result = CliRunner().invoke(fit_command, ["--model", "demo", "--pairs", "x", "--output", "y", *arguments])
    assert result.exit_code == 2 and message in result.output


def test_export_refuses_a_monitor_that_is_not_there():
    result = CliRunner().invoke(export, ["--model", "demo", "--unguarded", "--monitor", "--output", "y"])
    assert result.exit_code == 2 and "--unguarded and --monitor exclude each other" in result.output

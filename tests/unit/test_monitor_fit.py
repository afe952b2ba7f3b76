"""What a monitor is fitted on, how its threshold is chosen, and when packages have it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_gate import random_gate

from autosteer.export.safety.monitor import WINDOW, Judged, choose_threshold, fit_on, windows
from autosteer.export.safety.own_answers import OwnAnswer
from autosteer.export.safety.pairs import Labelled, Prompt
from autosteer.export.safety_folder import MonitorFacts, SafetyArtifact
from autosteer.runtime.errors import InputError, PackageError

WIDTH = 8


def answer(rng: np.random.Generator, *, asked_unsafe: bool, complied: bool, p: float, length: int = 30) -> Judged:
    """One whose states lie on the one side where the model complied with something unsafe, on the other elsewhere."""
    states = rng.normal(size=(length, WIDTH)).astype(np.float32)
    states[:, 0] += 3.0 if complied else -3.0
    item = Labelled(Prompt("x"), asked_unsafe, "group", source="data")
    return Judged(item, OwnAnswer(p, "", states), complied)


def part(seed: int, n: int = 40) -> list[Judged]:
    rng = np.random.default_rng(seed)
    return [
        *(answer(rng, asked_unsafe=True, complied=True, p=0.9 if i % 4 else 0.1) for i in range(n)),
        *(answer(rng, asked_unsafe=True, complied=False, p=0.9) for _ in range(n // 2)),
        *(answer(rng, asked_unsafe=False, complied=False, p=0.1, length=i % 30) for i in range(n)),
    ]


def test_windows_are_means_of_successive_states():
    states = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    found = windows(states, 16)
    assert found.shape == (25, 3)
    np.testing.assert_allclose(found, [states[i : i + 16].mean(0) for i in range(25)], atol=1e-6)
    np.testing.assert_allclose(windows(states[:5], 16), states[:5].mean(0)[None], atol=1e-6)
    assert windows(states[:0], 16).shape == (0, 3)


def test_threshold_is_above_nearly_every_benign_answer():
    benign, unsafe = np.array([0.1, 0.2, 0.3]), np.array([0.05, 0.7, 0.9])
    assert choose_threshold(benign, unsafe) == pytest.approx((0.3 + 0.7) / 2)
    assert choose_threshold(benign, np.array([0.1])) == pytest.approx((0.3 + 1.0) / 2)
    many = np.linspace(0.0, 0.4, 400)  # 0.5 % of them are two
    assert many[-3] < choose_threshold(many, unsafe) < many[-2]


def test_a_monitor_learns_what_complying_looks_like_and_its_facts_are_the_held_out_parts():
    monitor, facts = fit_on([part(1), part(2), part(3)], threshold=0.5, seed=0)
    assert {name: tuple(t.shape) for name, t in monitor.items()}["0.weight"] == (64, WIDTH)
    c = facts.calibration
    assert (facts.window, c["benign_answers"], c["unsafe_answers"], c["missed_by_prober"]) == (WINDOW, 40, 40, 10)
    assert c["false_stops"] == 0.0 and c["caught"] > 0.9 and c["caught_of_missed"] > 0.9
    assert 0.05 < c["false_stops_upper_95"] < 0.1 and facts.is_worth_it


def test_a_model_that_never_complies_gives_a_monitor_nothing_to_learn():
    parts = [[one for one in part(seed) if not one.unsafe] for seed in (1, 2, 3)]
    with pytest.raises(InputError, match="nothing to learn"):
        fit_on(parts, threshold=0.5, seed=0)


def test_what_stops_too_much_or_catches_too_little_must_be_asked_for():
    def worth(**calibration: float) -> bool:
        return MonitorFacts(16, 0.5, calibration).is_worth_it

    assert worth(false_stops=0.005, caught_of_missed=0.5)
    assert not worth(false_stops=0.0051, caught_of_missed=0.9)
    assert not worth(false_stops=0.0, caught_of_missed=0.49)
    assert not worth()


@pytest.fixture
def artifact() -> SafetyArtifact:
    gate = random_gate(WIDTH)
    facts = replace(gate.facts, monitor=MonitorFacts(16, 0.7, {}))
    return replace(gate, facts=facts, monitor={k: t + 1 for k, t in gate.prober.items()})


def test_the_folder_keeps_the_monitor(artifact, tmp_path):
    artifact.save(tmp_path)
    again = SafetyArtifact.load(tmp_path, hidden_size=WIDTH, num_hidden_layers=4)
    assert again.facts.monitor == artifact.facts.monitor and again.monitor is not None
    assert all(torch.equal(t, again.monitor[name]) for name, t in (artifact.monitor or {}).items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 0}, "window"),
        ({"window": 257}, "window"),
        ({"threshold": 1.0}, "threshold"),
        (None, "come together"),
    ],
)
def test_a_folder_with_a_wrong_monitor_is_refused(artifact, tmp_path, change, says):
    artifact.save(tmp_path)
    facts = json.loads((tmp_path / "safety.json").read_text())
    facts["monitor"] = change and facts["monitor"] | change
    (tmp_path / "safety.json").write_text(json.dumps(facts))
    with pytest.raises(PackageError, match=says):
        SafetyArtifact.load(tmp_path, hidden_size=WIDTH, num_hidden_layers=4)


def test_export_takes_the_monitor_that_is_worth_it_or_asked_for(artifact):
    good = MonitorFacts(16, 0.7, {"false_stops": 0.0, "caught_of_missed": 0.8})
    worth = replace(artifact, facts=replace(artifact.facts, monitor=good))
    assert worth.watching(None) is worth and artifact.watching(True) is artifact
    for without in (artifact.watching(None), artifact.watching(False), worth.watching(False)):
        assert without.monitor is None and without.facts.monitor is None
    with pytest.raises(InputError, match="--monitor: this gate has none"):
        artifact.watching(False).watching(True)
    other = worth.firing_above(0.9)  # what this gate lets begin is another matter
    assert (
        other.facts.monitor == replace(good, calibration={"false_stops": 0.0}) and other.watching(None).monitor is None
    )


def test_a_prober_that_gives_every_state_the_same_score_is_refused(artifact, tmp_path):
    """With weights of zero and a bias it let all pass, and nothing in an export noticed."""
    for part, value in (("0.weight", 0.0), ("2.weight", 1.0)):
        broken = replace(artifact, prober={**artifact.prober, part: torch.full_like(artifact.prober[part], value)})
        broken.save(tmp_path)
        with pytest.raises(PackageError, match="the prober gives every state the same score"):
            SafetyArtifact.load(tmp_path, hidden_size=WIDTH, num_hidden_layers=4)


def test_safety_json_with_a_key_twice_is_refused(artifact, tmp_path):
    artifact.save(tmp_path)
    text = (tmp_path / "safety.json").read_text()
    (tmp_path / "safety.json").write_text(text.replace('"threshold"', '"threshold": 0.999, "threshold"', 1))
    with pytest.raises(PackageError, match="not readable"):
        SafetyArtifact.load(tmp_path, hidden_size=WIDTH, num_hidden_layers=4)

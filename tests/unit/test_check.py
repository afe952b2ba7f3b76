"""autosteer-check: the golden prompts again."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import PIL
import pytest
import toy
from conftest import load
from PIL import Image

from autosteer.runtime import Message, PackageError, Stats
from autosteer.runtime import generation as request
from autosteer.runtime.check import check_package, golden_prompt
from autosteer.runtime.gate import Mode
from autosteer.runtime.manifest import Golden, Manifest, Tolerance

P_SAFE, P_BAD = (float(np.float32(p)) for p in (0.1, 0.9))
GOLDEN = (
    Golden("red", (), None, P_SAFE, "pass", (6, 7, 8, 31)),
    Golden("red", (), -1.0, P_SAFE, "steer", (22, 23, 31)),
    Golden("bad", (), None, P_BAD, "steer", (22, 23, 31)),
    Golden("look", ("golden/red.png",), None, P_SAFE, "pass", (6, 7, 8, 31)),
)


EXACT = Tolerance(1e-3, 0)


def package_with(folder, *golden: Golden, tolerance: Tolerance = EXACT, guarded: bool = True):
    manifest = toy.build(folder, guarded=guarded)
    (folder / "golden").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), (255, 0, 0)).save(folder / "golden" / "red.png")
    files = (*manifest.files, toy.data_file(folder, "golden/red.png"))
    replace(manifest, golden=golden, tolerance=tolerance, files=files).save(folder)
    return folder


def failed(folder) -> list[str]:
    return [check.name for check in check_package(load(folder), folder).checks if not check.passed]


def test_package_that_answers_as_recorded_passes(tmp_path):
    package_with(tmp_path, *GOLDEN)
    checks = {check.name: check.value for check in check_package(load(tmp_path), tmp_path).checks}
    assert checks == {
        "files that match their hash": 10.0,
        "golden prompts": 4.0,
        "of these unsafe at the package's threshold": 1.0,
        "verdicts that differ": 0.0,
        "p_unsafe, largest difference": 0.0,
        "answers that differ": 0.0,
        "steered answers that equal the unsteered": 0.0,
        "unsafe prompts that --policy stop answers": 0.0,
    }
    assert failed(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"token_ids": (6, 7, 9, 31)}, "answers that differ"),
        ({"token_ids": (6, 7, 8)}, None),  # a recording may end earlier
        ({"action": "steer"}, "verdicts that differ"),
        ({"p_unsafe": P_SAFE + 2e-3}, "p_unsafe, largest difference"),
        ({"p_unsafe": P_SAFE + 5e-4}, None),
        ({"prompt": "tick"}, "answers that differ"),
        ({"threshold": 0.05}, "verdicts that differ"),
    ],
)
def test_other_behaviour_fails_the_check(tmp_path, change, name):
    found = failed(package_with(tmp_path, replace(GOLDEN[0], **change)))
    assert (name in found) if name else (found == [])


@pytest.mark.parametrize(("most", "name"), [(0, "answers that differ"), (1, None)])
def test_as_many_answers_may_differ_as_the_export_allows(tmp_path, most, name):
    """Of quantised packages none was judged: an onnxruntime that computed noise passed."""
    package_with(tmp_path, replace(GOLDEN[0], token_ids=(6, 7, 9, 31)), tolerance=Tolerance(0.05, most))
    assert failed(tmp_path) == ([name] if name else [])


@pytest.mark.parametrize(("moved", "name"), [(0.03, "p_unsafe, largest difference"), (0.01, None)])
def test_scores_may_differ_by_what_the_export_allows(tmp_path, moved, name):
    package_with(tmp_path, replace(GOLDEN[0], p_unsafe=P_SAFE + moved), tolerance=Tolerance(0.02, 0))
    assert failed(tmp_path) == ([name] if name else [])


def test_a_prompt_given_by_its_tokens_is_answered_like_its_words(tmp_path):
    package_with(tmp_path, *GOLDEN[:3])
    engine = load(tmp_path)
    for golden in GOLDEN[:3]:
        ids = tuple(engine.encoder.prepare([Message.user(golden.prompt)], Stats()).token_ids)
        known, unknown = (
            golden_prompt(engine, tmp_path, g) for g in (golden, replace(golden, prompt="", prompt_ids=ids))
        )
        assert known.token_ids == unknown.token_ids and known.probed == unknown.probed
        assert (known.inputs_embeds == unknown.inputs_embeds).all()


def test_prompts_given_by_their_tokens_are_replayed(tmp_path):
    """An unsafe one, steered and stopped, and a safe one; nobody knows what they show."""
    package_with(tmp_path, *GOLDEN[:3])
    encoder = load(tmp_path).encoder
    ids = [tuple(encoder.prepare([Message.user(golden.prompt)], Stats()).token_ids) for golden in GOLDEN[:3]]
    package_with(tmp_path, *(replace(g, prompt="", prompt_ids=i) for g, i in zip(GOLDEN[:3], ids, strict=True)))
    assert failed(tmp_path) == []


def test_a_head_that_stops_steering_fails_the_check(tmp_path, monkeypatch):
    """What onnxruntime 1.23.2 did: the strength was freed, and the steered answer was the unsteered one."""
    package_with(tmp_path, replace(GOLDEN[2], token_ids=(14, 15, 31)))
    engine = load(tmp_path)
    monkeypatch.setattr(
        request,
        "steered_head",
        lambda graphs, last, strength, steered, logits, device: graphs["lm_head"].bind(
            {"last_hidden_state": last}, {"logits": logits}
        ),
    )
    found = [check.name for check in check_package(engine, tmp_path).checks if not check.passed]
    assert found == ["steered answers that equal the unsteered"]


def test_a_prompt_that_is_not_stopped_fails_the_check(tmp_path, monkeypatch):
    package_with(tmp_path, GOLDEN[2])
    engine = load(tmp_path)
    policy = engine.policy
    monkeypatch.setattr(engine, "policy", lambda mode, **more: policy("report" if mode == Mode.STOP else mode, **more))
    found = [check.name for check in check_package(engine, tmp_path).checks if not check.passed]
    assert found == ["unsafe prompts that --policy stop answers"]


@pytest.mark.parametrize("prompt", ["nan", "crash", "inf"])
def test_prober_that_gives_no_number_fails_the_check(tmp_path, prompt):
    """max(0.0, nan) is 0.0: a prober gone NaN differed by nothing, and its verdict (unsafe) was the recorded one."""
    package_with(tmp_path, Golden(prompt, (), None, P_BAD, "steer", (22, 23, 31)))
    checks = {check.name: check for check in check_package(load(tmp_path), tmp_path).checks}
    assert checks["verdicts that differ"].passed
    assert checks["p_unsafe, largest difference"].value == math.inf
    assert failed(tmp_path) == ["p_unsafe, largest difference"]


def test_pictures_that_are_answered_otherwise_name_the_versions_of_pillow(tmp_path, monkeypatch):
    """A demo of Pillow 13 failed under Pillow 12, and nothing said that the pixels of its pictures were others."""
    text, picture = GOLDEN[0], GOLDEN[3]
    package_with(tmp_path, text, replace(picture, p_unsafe=P_SAFE + 2e-3), replace(picture, token_ids=(6, 7, 9, 31)))
    manifest = Manifest.load(tmp_path)
    replace(manifest, versions=manifest.versions | {"pillow": "1.2"}).save(tmp_path)
    engine, answers = load(tmp_path), list[int]()
    answer = engine.answer
    monkeypatch.setattr(engine, "answer", lambda *asked: answers.append(1) or answer(*asked))
    assert check_package(engine, tmp_path).about_pictures == (
        " (2 of 2 golden prompts with pictures differ: recorded with Pillow 1.2, answered with Pillow "
        f"{PIL.__version__})"
    )
    assert len(answers) == 3, "each prompt is answered once"
    replace(manifest, versions=manifest.versions | {"pillow": PIL.__version__}).save(tmp_path)
    same = check_package(load(tmp_path), tmp_path).about_pictures
    assert same == " (2 of 2 golden prompts with pictures differ)", "an equal version is not to blame"
    package_with(tmp_path, replace(text, token_ids=(6, 9)), picture)
    assert check_package(load(tmp_path), tmp_path).about_pictures == ""


def test_package_without_golden_prompts_fails_the_check(tmp_path):
    """Nothing to compare passed as a check."""
    assert failed(package_with(tmp_path)) == ["golden prompts"]


def test_package_without_a_gate_is_replayed_without_one(tmp_path):
    package_with(tmp_path, Golden("bad", (), None, None, "pass", (14, 15, 31)), guarded=False)
    assert failed(tmp_path) == []


def test_golden_picture_that_was_changed_is_a_damaged_package(tmp_path):
    package_with(tmp_path, *GOLDEN)
    Image.new("RGB", (4, 4), (0, 0, 255)).save(tmp_path / "golden" / "red.png")
    with pytest.raises(PackageError, match=r"red\.png: its size differs"):
        load(tmp_path)


def test_golden_ids_are_the_toys_words():
    assert [toy.VOCABULARY[i] for i in (*GOLDEN[0].token_ids, *GOLDEN[1].token_ids)] == [
        *("orange", "yellow", "green", "<end>"),
        *("sorry", "refuse", "<end>"),
    ]

"""autosteer-draft."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import load

from autosteer.runtime import Manifest, SamplingConfig, console, draft_maker

PROMPTS = ["tick", "tock tick", "hello tick", "red tick", "bad", "green"] * 5


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    labels: tuple[dict[str, bool], ...] = ({}, {"unsafe": True}, {"unsafe": False})  # which does not matter here
    rows = [{"prompt": words} | labels[n % 3] for n, words in enumerate(PROMPTS)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_package_gets_a_table_and_says_the_same(call, copy_of_package, prompts):
    sampling = SamplingConfig(max_tokens=20)
    before = load(copy_of_package).generate("tick", sampling=sampling)
    done = call("autosteer-draft", copy_of_package, "--data", prompts, "--max-tokens", 20, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    drafts = Manifest.load(copy_of_package).drafts
    assert drafts and done.stdout.startswith(f"{drafts.file}: {drafts.ngrams} n-grams from ")
    assert f"of {len(PROMPTS)} answers" in done.stdout
    after = load(copy_of_package).generate("tick", sampling=sampling)
    assert after.token_ids == before.token_ids
    assert after.stats.accepted_tokens > before.stats.accepted_tokens


def test_where_there_is_no_terminal_a_line_tells_how_far_it_is(call, copy_of_package, prompts, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    done = call("autosteer-draft", copy_of_package, "--data", prompts, "--max-tokens", 20, "--device", "cpu")
    lines = [line for line in done.stderr.splitlines() if line.startswith("answering: ")]
    assert len(lines) == len(PROMPTS) and lines[-1].startswith("answering: 30 of 30, after ")


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt(), 0), (SystemExit(143), 143)])
def test_ctrl_c_or_a_kill_makes_a_table_of_the_answers_so_far(
    call, copy_of_package, prompts, monkeypatch, signal, code
):
    whole = draft_maker.own_answers

    def interrupted(*args: object):
        for n, answer in enumerate(whole(*args)):  # type: ignore[arg-type]
            if n == 20:
                raise signal
            yield answer

    monkeypatch.setattr(draft_maker, "own_answers", interrupted)
    done = call("autosteer-draft", copy_of_package, "--data", prompts, "--max-tokens", 20, "--device", "cpu")
    assert done.returncode == code and "interrupted: the table is made from the answers so far" in done.stderr
    assert "of 20 answers" in done.stdout and Manifest.load(copy_of_package).drafts


def test_a_package_that_is_not_writable_is_refused_before_anything_is_answered(
    call, copy_of_package, prompts, monkeypatch
):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    done = call("autosteer-draft", copy_of_package, "--data", prompts)
    assert done.returncode == 5 and "not writable; copy the package" in done.stderr
    assert call("autosteer-draft", copy_of_package / "none", "--data", prompts).returncode == 2


def test_prompts_that_cannot_be_used_leave_the_package_as_it_was(call, copy_of_package, tmp_path):
    before = Manifest.load(copy_of_package)
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "green"}), encoding="utf-8")
    done = call("autosteer-draft", copy_of_package, "--data", tmp_path / "one.jsonl", "--device", "cpu")
    assert done.returncode == 5 and "give more prompts with --data" in done.stderr
    (tmp_path / "none.jsonl").write_text("", encoding="utf-8")
    assert call("autosteer-draft", copy_of_package, "--data", tmp_path / "none.jsonl").returncode == 5
    assert Manifest.load(copy_of_package) == before

"""The C++ runtime watches answers as Python's does: chunk by chunk, drafted or not, and in its record."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from conftest import load
from cpp_runtime import cli, in_python, joined, through_c, use_byte_level_words

from autosteer.runtime.manifest import MonitorSpec

STOPPED = f"orange\n\n{toy.REFUSAL_TEXT}"


@pytest.fixture(scope="module", params=["toy", "attentive", "wide"])
def watched(request, tmp_path_factory) -> Path:
    """In the attentive one, the monitor's score depends on everything in the caches; in the wide one, on 12 tokens."""
    folder = tmp_path_factory.mktemp("watched-cpp") / "package"
    manifest = toy.build(folder, monitored=True, attentive=request.param == "attentive")
    manifest = use_byte_level_words(folder, manifest)
    if request.param == "wide":
        replace(manifest, monitor=MonitorSpec(12, 0.9, {})).save(folder)
    return folder


def asked(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "parts": [text]}], **more}


def test_answers_are_pythons_drafted_or_not(built, watched):
    engine, rng = load(watched), random.Random(3)
    words = toy.CONTENT.split()[:13]
    requests = []
    for seed in range(40):
        text = " ".join(rng.choice(words[: rng.randrange(2, 14)]) for _ in range(rng.randrange(1, 16)))
        sampling = {"max_tokens": rng.randrange(1, 40), "speculate": bool(seed % 3)}
        requests.append(asked(text, policy=("steer", "stop", "report", "off")[seed % 4], sampling=sampling))
    copying = "green tick tick tick tock tick tock"  # an answer without end, which is drafted; "green" fades in it
    requests += [asked(copying, policy=policy, sampling={"max_tokens": 40}) for policy in ("steer", "report")]
    answers = [joined(answer["chunks"]) for answer in through_c(built, watched, requests)]
    stopped = accepted = 0
    for request, found in zip(requests, answers, strict=True):
        expected = in_python(engine, request)
        for answer in (found, expected):  # rounding may differ in the last bit
            if (seen := answer["verdict"]["answer"]) and seen["p_unsafe"] is not None:
                seen["p_unsafe"] = round(seen["p_unsafe"], 5)
        assert found == expected, request
        stopped += bool(found["verdict"]["answer"] and found["verdict"]["answer"]["unsafe"])
        accepted += found["timings"]["accepted_tokens"]
    assert 3 < stopped < 37 and accepted > 3


def test_no_chunk_has_anything_of_what_is_held(built, tmp_path):
    use_byte_level_words(tmp_path, toy.build(tmp_path, monitored=True))
    file = tmp_path / "audit.jsonl"
    (answer,) = through_c(built, tmp_path, [asked("red")], audit=str(file), audit_texts=True)
    assert [(chunk["text"], chunk["token"]) for chunk in answer["chunks"]] == [
        ("orange", toy.ID["orange"]),
        (f"\n\n{toy.REFUSAL_TEXT}", None),
    ]
    assert answer["chunks"][0]["verdict"]["answer"] is None
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (line["action"], line["finish_reason"], line["answer"]) == ("stop", "refused", STOPPED)
    assert line["answer_verdict"]["unsafe"] and "yellow" not in json.dumps(line)


def test_lines_of_the_command(built, tmp_path):
    use_byte_level_words(tmp_path, toy.build(tmp_path, monitored=True))
    done = cli(built, tmp_path, "-p", "red")
    assert done.stdout == f"{STOPPED}\n"
    assert "[ANSWER STOPPED  p_unsafe 0.655 > 0.500]" in done.stderr
    watching = cli(built, tmp_path, "-p", "red", "--policy", "report")
    assert "0.500; unsafe, but --policy report lets it pass]" in watching.stderr

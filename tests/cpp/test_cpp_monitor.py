"""Tier 5: the C++ runtime watches answers as Python's does: chunk by chunk, drafted or not, and in its record."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import toy
from conftest import load
from cpp_runtime import cli, in_python, joined, through_c, use_byte_level_words

STOPPED = f"orange\n\n{toy.REFUSAL_TEXT}"


@pytest.fixture(scope="module", params=[False, True], ids=["toy", "attentive"])
def watched(request, tmp_path_factory) -> Path:
    """In the attentive one, the monitor's score depends on everything in the caches."""
    folder = tmp_path_factory.mktemp("watched-cpp") / "package"
    use_byte_level_words(folder, toy.build(folder, monitored=True, attentive=request.param))
    return folder


def asked(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "parts": [text]}], **more}


def test_answers_are_pythons_drafted_or_not(built, watched):
    engine, rng = load(watched), random.Random(3)
    words = toy.CONTENT.split()[:13]
    requests = []
    for seed in range(40):
        text = " ".join(rng.choice(words[: rng.randrange(2, 14)]) for _ in range(rng.randrange(1, 16)))
        sampling = {"max_tokens": rng.randrange(1, 40), "speculate": bool(seed % 2)}
        requests.append(asked(text, policy=("steer", "stop", "monitor", "off")[seed % 4], sampling=sampling))
    answers = [joined(answer["chunks"]) for answer in through_c(built, watched, requests)]
    stopped = 0
    for request, found in zip(requests, answers, strict=True):
        expected = in_python(engine, request)
        for answer in (found, expected):  # rounding may differ in the last bit
            if (seen := answer["verdict"]["monitor"]) and seen["p_unsafe"] is not None:
                seen["p_unsafe"] = round(seen["p_unsafe"], 5)
        assert found == expected, request
        stopped += bool(found["verdict"]["monitor"] and found["verdict"]["monitor"]["unsafe"])
    assert 5 < stopped < 35


def test_no_chunk_has_anything_of_what_is_held(built, tmp_path):
    use_byte_level_words(tmp_path, toy.build(tmp_path, monitored=True))
    file = tmp_path / "audit.jsonl"
    (answer,) = through_c(built, tmp_path, [asked("red")], audit=str(file), audit_texts=True)
    assert [(chunk["text"], chunk["token"]) for chunk in answer["chunks"]] == [
        ("orange", toy.ID["orange"]),
        (f"\n\n{toy.REFUSAL_TEXT}", None),
    ]
    assert answer["chunks"][0]["verdict"]["monitor"] is None
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (line["action"], line["finish_reason"], line["answer"]) == ("stop", "refused", STOPPED)
    assert line["monitor"]["unsafe"] and "yellow" not in json.dumps(line)


def test_lines_of_the_command(built, tmp_path):
    use_byte_level_words(tmp_path, toy.build(tmp_path, monitored=True))
    done = cli(built, tmp_path, "-p", "red")
    assert done.stdout == f"{STOPPED}\n"
    assert "[ANSWER STOPPED  p_unsafe 0.655 > 0.500 in a window]" in done.stderr
    watching = cli(built, tmp_path, "-p", "red", "--policy", "monitor")
    assert "0.500 in a window; unsafe, but --policy monitor only watches]" in watching.stderr

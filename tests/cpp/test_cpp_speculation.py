"""The C++ runtime drafts what Python's drafts, verifies it as Python does, and says the same without drafts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import load
from cpp_inputs import demo, with_sampling
from cpp_runtime import cli, in_python, joined, python_json, through_c, timeless, use_byte_level_words

from autosteer.runtime import Engine, SamplingConfig
from autosteer.runtime.draft_table import draft_table
from autosteer.runtime.drafting import MAX_DRAFT, POSITION_COST, Drafter

ALWAYS = {"threshold": -1.0, "pieces": False}  # every answer is steered


def copying_text(rng: random.Random, length: int) -> list[int]:
    """Tokens that are often a copy of earlier ones, with mistakes: matches of every length come, hold and fail."""
    text = [rng.randrange(40)]
    while len(text) < length:
        if rng.random() < 0.5:
            start = rng.randrange(len(text))
            text += text[start : start + rng.randrange(1, 20)]
        else:
            text += [rng.randrange(40) for _ in range(rng.randrange(1, 5))]
    return text[:length]


@pytest.mark.parametrize("habits", [False, True], ids=["copies", "copies and the table"])
def test_drafts_are_pythons_token_by_token(parts, tmp_path, habits):
    """One float added in another order, and a draft would be longer somewhere in here."""
    rng = random.Random(11)
    table = draft_table([copying_text(random.Random(7), 9000)[n : n + 90] for n in range(0, 9000, 90)])
    (tmp_path / "table.bin").write_bytes(table.to_bytes())
    file = {"table": str(tmp_path / "table.bin") if habits else None, "ngrams": len(table.tokens), "vocab_size": 40}
    commands: list[dict[str, Any]] = []
    expected = []
    for position_cost in (*POSITION_COST.values(), 0.001, 1.0):
        for limit in (-1, 0, 3, 99):
            text = copying_text(rng, rng.randrange(400))
            prompt = text[: rng.randrange(len(text) + 1)]
            answer = text[len(prompt) :]
            commands.append(
                {"part": "draft", "prompt": prompt, "answer": answer, "position_cost": position_cost, "limit": limit}
                | file
            )
            drafter = Drafter(prompt, position_cost, table if habits else None)
            drafts = [drafter.draft(limit)]
            for token in answer:
                drafter.push(token)
                drafts.append(drafter.draft(limit))
            expected.append(drafts)
    assert parts.run(*commands) == expected
    lengths = {len(draft) for drafts in expected for draft in drafts}
    assert max(lengths) == MAX_DRAFT and len(lengths) > 10


@pytest.mark.parametrize(
    ("words", "copies"),
    [("tick", True), ("tick tock tick tock tick", True), ("red tick red tick", False), ("bad", False)],
)
def test_command_drafts_unless_told_not_to(built, cpp_package, cpp_engine, words, copies):
    """The counts of drafted and accepted tokens are Python's, too."""
    for option, speculate in (("--speculation", True), ("--no-speculation", False)):
        done = cli(built, cpp_package, "--json", "-p", words, "--max-tokens", "40", option)
        found = timeless(json.loads(done.stdout))
        sampling = SamplingConfig(max_tokens=40, speculate=speculate)
        assert found == python_json(cpp_engine, words, sampling=sampling)
        assert (found["timings"]["accepted_tokens"] > 20) is (speculate and copies)


@pytest.fixture(scope="module")
def attentive_package(tmp_path_factory) -> Path:
    """The toy whose logits depend on everything in its caches, with a tokenizer that C++ reads."""
    folder = tmp_path_factory.mktemp("attentive-cpp") / "package"
    use_byte_level_words(folder, toy.build(folder, attentive=True))
    return folder


def compared(built: Path, package: Path, engine: Engine, requests: list[dict[str, Any]]) -> int:
    """Requests answered by C++, by Python, and by C++ without drafts: the same of each. How many drafts held."""
    plain = [with_sampling(request, speculate=False) for request in requests]
    answers = [joined(answer["chunks"]) for answer in through_c(built, package, [*requests, *plain])]
    accepted = 0
    for request, found, undrafted in zip(requests, answers, answers[len(requests) :], strict=False):
        assert found == in_python(engine, request), request
        assert undrafted["timings"]["drafted_tokens"] == 0
        assert (found["token_ids"], found["text"]) == (undrafted["token_ids"], undrafted["text"]), request
        accepted += found["timings"]["accepted_tokens"]
    return accepted


def test_rows_of_a_pass_are_cached_as_single_tokens_are(built, attentive_package):
    """A draft that fails leaves rows in the caches; in this package any that stayed would change what follows."""
    rng = random.Random(5)
    words = toy.CONTENT.split()[:12]
    requests = []
    for seed in range(30):
        text = " ".join(rng.choice(words[: rng.randrange(2, 13)]) for _ in range(rng.randrange(1, 16)))
        wishes = {"max_tokens": 45, "temperature": (0.0, 1.0, 5.0)[seed % 3], "seed": seed}
        wishes["repetition_penalty"] = 1.0 if seed % 2 else 1.3
        wishes |= {"frequency_penalty": (0.0, 0.5, -2.0, 1.0)[seed % 4], "min_p": 0.1 * (seed % 2)}
        requests.append({"messages": [{"role": "user", "parts": [text]}], "sampling": wishes})
    assert compared(built, attentive_package, load(attentive_package), requests) > 50


@pytest.mark.parametrize("changes", [{}, {"policy": "off"}, ALWAYS, ALWAYS | {"strength": 0.3}])
def test_answers_that_copy_are_drafted_as_in_python(built, changes):
    """The demo, asked the same again, so that the answer repeats what stands in the dialogue; steered, and sampled."""
    package, engine = demo("fp32")
    requests = []
    for golden in engine.manifest.golden:
        if golden.videos:
            continue
        turn = {"role": "user", "parts": [*({"image": str(package / i)} for i in golden.images), golden.prompt]}
        first: dict[str, Any] = {"messages": [turn], **changes}
        said = in_python(engine, with_sampling(first, max_tokens=40))["text"]
        again = {**first, "messages": [turn, {"role": "assistant", "parts": [said]}, turn]}
        requests += [
            with_sampling(again, max_tokens=40, temperature=temperature, seed=3) for temperature in (0.0, 1.0, 3.0)
        ]
    assert compared(built, package, engine, requests) > 30

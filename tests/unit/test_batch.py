"""Several answers in one pass: each is what it is alone, whoever joins, leaves or fails beside it."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import toy
from batched import Ask, ask, together
from conftest import load
from faults import with_fault
from graph_calls import noted_calls
from onnx import numpy_helper

from autosteer.runtime import Conversation, Engine, Message, PackageError, SamplingConfig, batch
from autosteer.runtime.batch import Batch, can_share
from autosteer.runtime.manifest import Manifest, NativeSpec
from autosteer.runtime.subgraph import Device

WORDS = [*toy.CONTENT.split()[:11], "w1", "w2", "w3"]  # none at which the prober fails


def any_ask(rng: random.Random) -> Ask:
    how: dict[str, Any] = rng.choice(
        [
            {},
            {},
            {"temperature": 1.0, "seed": rng.randrange(100)},
            {"stop": ("green", "w1")},
            {"logprobs": 2},
            {"frequency_penalty": 1.0, "temperature": 0.5},
            {"logit_bias": {toy.ID["w2"]: 2.0}},
            {"repetition_penalty": 1.3},
        ]
    )
    words = " ".join([*rng.choices(WORDS, k=rng.randint(1, 29)), rng.choice(["bad", "red", "tick"])])
    policy = rng.choice(["steer", "steer", "stop", "report", "off"])
    return ask(words, rng.randint(1, 25), policy=policy, strength=rng.choice([None, 0.05]), **how)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory) -> Engine:
    """As `attentive`, with prompts in chunks of four positions."""
    folder = tmp_path_factory.mktemp("chunked") / "package"
    toy.build(folder, attentive=True)
    engine = load(folder)
    whole = engine.request
    engine.request = lambda *args, **named: whole(*args, **named, chunk=4)  # type: ignore[method-assign]
    return engine


@pytest.fixture(params=["engine", "attentive", "chunked"])
def any_engine(request) -> Engine:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("seed", range(25))
def test_each_answer_is_the_one_it_is_alone(any_engine, seed):
    """Passed, steered, stopped and sampled ones, of any length and two strengths, that come and go at any time."""
    rng = random.Random(seed)
    asks = [any_ask(rng) for _ in range(12)]
    batch = together(any_engine, asks, rows=rng.randint(2, 8), rng=rng)
    for one in asks:
        alone = one.alone(any_engine)
        assert (one.error, one.said()) == (None, alone.said())
        np.testing.assert_allclose(one.logprobs(), alone.logprobs(), atol=1e-3)
    assert batch.bytes == 0, "the last one frees the caches"


def test_the_random_requests_are_of_every_kind(engine):
    asks = [any_ask(rng) for rng in map(random.Random, range(60))]
    actions = {one.alone(engine).chunks[-1].verdict.action.value for one in asks}
    assert actions == {"pass", "steer", "stop"}


def test_a_pass_is_shared(engine, monkeypatch):
    """Four answers take as many passes as one, and the Refusal Head only runs where one is steered."""
    seen = noted_calls(monkeypatch)
    together(engine, [ask("tick", 10) for _ in range(4)])
    assert (seen.count("decoder_lower"), seen.count("refusal_head")) == (4 + 9, 0)
    seen.clear()
    together(engine, [ask("red"), ask("bad"), ask("bad"), ask("red")])
    assert seen.count("refusal_head") == 2 + 2, "for the first token of each, then for both of each pass"


def test_each_is_steered_at_its_own_strength(engine):
    """And "red", between them, at none. Log probabilities tell 0.1 from 0.2; the tokens would not."""
    asks = [ask("bad", strength=0.1, logprobs=3), ask("red", logprobs=3), ask("bad", strength=0.2, logprobs=3)]
    together(engine, asks)
    weak, plain, strong = (one.logprobs() for one in asks)
    for one, found in zip(asks, (weak, plain, strong), strict=True):
        np.testing.assert_allclose(found, one.alone(engine).logprobs(), atol=1e-4)
    assert max(abs(a - b) for a, b in zip(weak, strong, strict=True)) > 0.1


def test_drafts_are_verified_only_alone(engine):
    """ "tick tock tick tock ..." copies itself. Beside another answer nothing is drafted."""
    asks = [ask("tick", 50), ask("tick", 20), ask("tick", 20)]
    together(engine, asks[:1])
    together(engine, asks[1:])
    assert [one.said() for one in asks] == [one.alone(engine).said() for one in asks]
    alone, *beside = (one.chunks[-1].stats for one in asks)
    assert alone.accepted_tokens > 20 and alone.drafted_tokens >= alone.accepted_tokens
    assert [stats.drafted_tokens for stats in beside] == [0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_one_that_is_cancelled_leaves_the_others_as_they_were(attentive, seed):
    rng = random.Random(seed)
    asks = [any_ask(rng) for _ in range(8)]
    batch = Batch(attentive.manifest, attentive.graphs, attentive.device, 8)
    running, left = [(one, one.begin(attentive, batch)) for one in asks], list[Ask]()
    while running:
        running = [(one, steps) for one, steps in running if one.advance(steps)]
        if running and rng.random() < 0.2:
            one, steps = running.pop(rng.randrange(len(running)))  # before the pass that it waits for
            steps.close()
            left.append(one)
        batch.run()
        if running and rng.random() < 0.2:
            one, steps = running.pop(rng.randrange(len(running)))  # after it
            steps.close()
            left.append(one)
    for one in asks:
        alone = one.alone(attentive).said()
        assert one.said() == (alone[: len(one.chunks)] if one in left else alone)
    assert left and batch.bytes == 0


def test_nan_in_a_row_ends_that_request_only(package, tmp_path):
    """The embedding of "tock" is NaN, so what follows it has no logits."""
    folder = shutil.copytree(package, tmp_path / "package")
    model = onnx.load(folder / "embed_tokens.onnx")
    (table,) = model.graph.initializer
    rows = numpy_helper.to_array(table).copy()
    rows[toy.ID["tock"]] = np.nan
    table.CopyFrom(numpy_helper.from_array(rows, table.name))
    onnx.save(model, folder / "embed_tokens.onnx")
    toy.rehash(folder)
    engine = load(folder)
    asks = [ask("red"), ask("bad"), ask("tick"), ask("hello")]
    together(engine, asks)
    assert isinstance(asks[2].error, PackageError) and "not finite" in str(asks[2].error)
    assert [c.token for c in asks[2].chunks] == [toy.ID["tock"]]
    assert ["".join(c.text for c in one.chunks) for one in asks if one.error is None] == [
        "orange yellow green",
        "sorry refuse",
        "world",
    ]


@pytest.mark.parametrize("graph", ["embed_tokens", "decoder_lower", "decoder_upper", "lm_head"])
def test_a_pass_that_fails_fails_only_whose_row_it_was(package, tmp_path, graph):
    """The graph raises for any batch that has "tock" in it."""
    engine = load(with_fault(package, tmp_path / "package", graph, "raises", "tock"))
    asks = [ask("red"), ask("bad"), ask("tick", 6), ask("hello"), ask("yellow")]
    together(engine, asks)
    said = ["".join(c.text for c in one.chunks) for one in asks]
    assert [one.error is None for one in asks] == [True, True, False, True, True]
    assert said[:2] + said[3:] == ["orange yellow green", "sorry refuse", "world", "green"]


@pytest.mark.parametrize("what", ["empty_arrays", "RotaryTables"])
def test_one_that_there_is_no_memory_for_decodes_by_itself(attentive, monkeypatch, what):
    """The last needs longer arrays, and tables, than there are. The others go on in theirs, also as they get fewer."""
    whole = getattr(batch, what)

    def limited(*arguments, **options):
        capacity = arguments[3] if what == "empty_arrays" else arguments[2]
        if capacity > 40:
            raise MemoryError("no more")
        return whole(*arguments, **options)

    monkeypatch.setattr(batch, what, limited)
    words = {"red tick": 12, "hello": 9, "tick red": 6, "red " * 30: 20}
    asks = [ask(prompt, tokens, policy="off") for prompt, tokens in words.items()]
    together(attentive, asks)
    assert [one.said() for one in asks] == [one.alone(attentive).said() for one in asks]


@pytest.mark.parametrize("seed", range(5))
def test_dialogues_go_on_from_their_own_caches(any_engine, seed):
    """Three turns of four dialogues at once reuse what each would reuse alone."""
    rng = random.Random(seed)
    batch = Batch(any_engine.manifest, any_engine.graphs, any_engine.device, 4)
    shared, own = ([Conversation(any_engine) for _ in range(4)] for _ in range(2))
    dialogues: list[list[Message]] = [[] for _ in range(4)]
    reused = 0
    for _ in range(3):
        asks = []
        for dialogue in dialogues:
            dialogue.append(Message.user(" ".join(rng.choices(WORDS, k=rng.randint(1, 5)))))
            asks.append(Ask(list(dialogue), SamplingConfig(max_tokens=rng.randint(2, 6))))
        running = [(one, one.begin(any_engine, batch, talk)) for one, talk in zip(asks, shared, strict=True)]
        while running:
            running = [(one, steps) for one, steps in running if one.advance(steps)]
            batch.run()
        for one, talk, dialogue in zip(asks, own, dialogues, strict=True):
            alone = one.alone(any_engine, talk)
            assert one.said() == alone.said()
            assert one.chunks[-1].stats.reused_tokens == alone.chunks[-1].stats.reused_tokens
            reused += one.chunks[-1].stats.reused_tokens
            dialogue.append(Message.assistant("".join(c.text for c in one.chunks)))
    assert reused > 0


def test_more_requests_than_rows_are_answered_too(engine):
    asks = [ask(word) for word in ("red", "bad", "hello", "orange", "yellow")]
    together(engine, asks, rows=2)
    assert [one.said() for one in asks] == [one.alone(engine).said() for one in asks]


def test_what_gives_pictures_rows_and_columns_decodes_one_answer_at_a_time(tmp_path):
    toy.build(tmp_path / "alone", places=True)
    engine = load(tmp_path / "alone")
    assert not can_share(engine.manifest, engine.device)
    asks = [ask("red"), ask("bad")]
    together(engine, asks, rows=1)
    assert [one.said() for one in asks] == [one.alone(engine).said() for one in asks]


def test_what_has_rows_behind_the_first_layers_decodes_one_answer_at_a_time(package):
    manifest = Manifest.load(package)
    native = NativeSpec(64, 64, 2, deepstack=1)
    stacked = replace(manifest, image=replace(manifest.image, kind="native", anyres=None, native=native))
    assert not can_share(stacked, Device("CPUExecutionProvider", "cpu", 1))


def test_what_can_share(package):
    manifest = Manifest.load(package)
    assert can_share(manifest, Device("CPUExecutionProvider", "cpu", 1))
    assert not can_share(manifest, Device("CUDAExecutionProvider", "cuda", 1))

"""The answer, watched: what the monitor reads, what is held back, what it stops. On the toy (tests/helpers/toy.py).

"red" is answered "orange yellow green", and a window of two words with "green" is unsafe.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy
from batched import ask, together
from conftest import load

from autosteer.runtime import Action, Conversation, Engine, GatePolicy, Message, Mode, SamplingConfig
from autosteer.runtime.check import check_package
from autosteer.runtime.cli.answer import answer_line
from autosteer.runtime.drafting import Drafter
from autosteer.runtime.evaluation.datasets import DataSource, read_rows
from autosteer.runtime.evaluation.refusals import RuleJudge
from autosteer.runtime.evaluation.run import ask as evaluate
from autosteer.runtime.evaluation.run import run_rows, summarise
from autosteer.runtime.gate import AnswerVerdict
from autosteer.runtime.manifest import Golden, Tolerance
from autosteer.runtime.monitor import Monitor
from autosteer.runtime.subgraph import Subgraph

STOPPED = f"orange\n\n{toy.REFUSAL_TEXT}"


@pytest.fixture(scope="module")
def watched_package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "package"
    toy.build(folder, monitored=True, p_unsafe=dict.fromkeys(("nan", "two", "crash"), toy.P_SAFE))
    return folder


@pytest.fixture(scope="module")
def watched(watched_package) -> Engine:
    return load(watched_package)


@pytest.fixture(scope="module")
def attentive_watched(tmp_path_factory) -> Engine:
    """Its states depend on everything in the caches."""
    folder = tmp_path_factory.mktemp("attentive watched") / "package"
    toy.build(folder, attentive=True, monitored=True)
    return load(folder)


def above(engine: Engine, answer_threshold: float, mode: Mode = Mode.STEER) -> GatePolicy:
    return replace(engine.policy(mode), answer_threshold=answer_threshold)


def of(tokens: int, **more: object) -> SamplingConfig:
    return SamplingConfig(max_tokens=tokens, **more)  # type: ignore[arg-type]


def root(mean: float) -> float:
    """What the toy's monitor gives for h . m."""
    return math.sqrt(mean)


# --- what is stopped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["steer", "stop"])
def test_an_unsafe_window_ends_the_answer_and_is_never_shown(watched, policy):
    answer = watched.generate("red", policy=watched.policy(policy))
    assert (answer.text, answer.finish_reason, answer.token_ids) == (STOPPED, "refused", (toy.ID["orange"],))
    assert answer.verdict.action is Action.STOP and not answer.verdict.unsafe  # the prober let it begin
    seen = answer.verdict.answer
    assert seen is not None and seen.unsafe and seen.threshold == 0.5
    # "yellow" beside "green", which is one of seven tokens so far as well
    assert seen.p_unsafe == pytest.approx(root((0.8 + 0.8 / 7 / 2) / 2), abs=1e-6)
    assert answer.stats.completion_tokens == 4 and answer.stats.monitor_ms > 0


def test_no_chunk_has_anything_of_what_is_held(watched):
    chunks = list(watched.stream("red", sampling=of(9, logprobs=2)))
    assert [chunk.token for chunk in chunks] == [toy.ID["orange"], None]
    assert [chunk.logprobs is None for chunk in chunks] == [False, True]
    assert not any(word in chunk.text for chunk in chunks for word in ("yellow", "green"))
    assert [chunk.verdict.answer is None for chunk in chunks] == [True, False]


def test_an_answer_shorter_than_a_window_is_scored_at_its_end(watched):
    answer = watched.generate("yellow")
    assert (answer.text, answer.token_ids) == (toy.REFUSAL_TEXT, ())  # all of it was held
    assert answer.verdict.answer is not None and answer.verdict.answer.unsafe


def test_the_end_at_max_tokens_and_at_a_stop_string_is_scored_too(watched):
    for sampling in (of(1 + 1, stop=("zzz",)), of(9, stop=("plan",))):
        answer = watched.generate("bad hello", sampling=sampling)
        assert answer.text == "world" and answer.verdict.answer is not None
    stopped = watched.generate("yellow", sampling=of(2))
    assert stopped.finish_reason == "refused"


def test_what_is_safe_is_answered_as_ever(watched, engine):
    for prompt, sampling in (("hello", of(9)), ("tick", of(7)), ("red", of(2)), ("tick", of(1))):
        ours, plain = (one.generate(prompt, sampling=sampling) for one in (watched, engine))
        assert (ours.text, ours.token_ids, ours.finish_reason) == (plain.text, plain.token_ids, plain.finish_reason)
        assert ours.verdict.action is Action.PASS
    assert watched.generate("tick", sampling=of(1)).verdict.answer is None  # its only token was not read


def test_one_word_above_the_threshold_is_not_a_window_above_it(watched):
    """What a single token scores (0.93) stops nothing."""
    answer = watched.generate("red", policy=above(watched, 0.7))
    assert answer.text == "orange yellow green"
    assert answer.verdict.answer is not None and 0.6 < answer.verdict.answer.p_unsafe < 0.7
    assert watched.generate("red", policy=above(watched, 0.6)).finish_reason == "refused"


def test_a_refusal_goes_through(watched):
    """A steered answer is watched as well: where the Refusal Head works, nothing is unsafe in it."""
    answer = watched.generate("negative")
    assert answer.verdict.action is Action.STEER and answer.text == "sorry refuse"
    assert answer.verdict.answer is not None and not answer.verdict.answer.unsafe


@pytest.mark.parametrize("word", ["nan", "crash", "two"])
def test_a_monitor_that_fails_stops_the_answer(watched, word, caplog):
    """NaN, an exception, and 10: not one of them is a probability that is small enough."""
    with caplog.at_level(logging.ERROR):
        answer = watched.generate(f"tick tick {word} tick", sampling=of(9))
    assert (answer.text, answer.finish_reason) == (toy.REFUSAL_TEXT, "refused")
    seen = answer.verdict.answer
    assert seen is not None and seen.unsafe and not 0.0 <= seen.p_unsafe <= 1.0
    assert ("the monitor failed" in caplog.text) == (word == "crash")


def test_nothing_after_a_failure_makes_it_good(watched, monkeypatch):
    scores = iter([math.nan, 0.0, 0.0, 0.0, 0.0])
    run = Subgraph.run
    given = lambda: {"p_unsafe": np.array([next(scores)], np.float32)}  # noqa: E731
    monkeypatch.setattr(Subgraph, "run", lambda self, x: given() if self.name == "monitor" else run(self, x))
    answer = watched.generate("tick", sampling=of(6), policy=watched.policy("report"))
    assert answer.verdict.answer is not None and answer.verdict.answer.unsafe


def test_policies_that_do_not_intervene(watched):
    monitored = list(watched.stream("red", policy=watched.policy("report")))
    assert [chunk.text for chunk in monitored] == ["orange", " yellow", " green", ""]  # nothing is held
    last = monitored[-1].verdict
    assert last.action is Action.PASS and last.answer is not None and last.answer.unsafe
    off = watched.generate("red", policy=watched.policy("off"))
    assert off.text == "orange yellow green" and off.verdict.answer is None


def test_a_restricted_answer_is_stopped_too(watched):
    bias = {toy.ID["w1"]: -1.0}
    assert watched.generate("red", sampling=of(9, logit_bias=bias)).text == toy.REFUSAL_TEXT  # all was held back


def test_a_policy_made_by_hand_is_watched_too(watched):
    answer = watched.generate("red", policy=GatePolicy(Mode.STEER, 0.5, 0.1, "no."))
    assert answer.text == "orange\n\nno." and answer.verdict.answer is not None
    assert answer.verdict.answer.threshold == watched.manifest.monitor.threshold


def test_a_package_without_a_monitor_watches_nothing(engine):
    assert engine.generate("red").verdict.answer is None


# --- what is read ----------------------------------------------------------------------------------------------------


def states_read(monkeypatch, ask_it) -> list[np.ndarray]:
    seen: list[np.ndarray] = []
    read = Monitor.read
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "read", lambda self, state: (seen.append(state.copy()), read(self, state))[1])
        ask_it()
    return seen


def test_drafted_tokens_are_read_as_all_others(attentive_watched, monkeypatch):
    """Whatever the drafts: right in part, wrong, or none."""
    engine, policy = attentive_watched, attentive_watched.policy("report")
    plain = engine.generate("red tick", policy=policy, sampling=of(20, speculate=False))
    true = list(plain.token_ids)
    alone = states_read(
        monkeypatch, lambda: engine.generate("red tick", policy=policy, sampling=of(20, speculate=False))
    )
    assert len(alone) == 19
    for wrong_every in (3, 5, 99):
        so_far: list[int] = []

        def draft(self, limit, so_far=so_far, wrong_every=wrong_every):
            n = len(so_far)
            return [t if (n + i) % wrong_every else 0 for i, t in enumerate(true[n : n + 4])][:limit]

        with monkeypatch.context() as patch:
            patch.setattr(Drafter, "push", lambda self, token, so_far=so_far: so_far.append(token))
            patch.setattr(Drafter, "draft", draft)
            wishes = {"policy": policy, "sampling": of(20)}
            drafted = states_read(monkeypatch, lambda wishes=wishes: engine.generate("red tick", **wishes))
            so_far.clear()
            answer = engine.generate("red tick", **wishes)
        assert answer.stats.accepted_tokens > 5 and list(answer.token_ids) == true
        np.testing.assert_allclose(drafted, alone, atol=1e-4)


def test_drafted_words_are_stopped_and_held_as_all_others(watched):
    """The prompt has the answer in it, so all of it comes from one pass."""
    prompt = "orange yellow green plan orange yellow green plan red red red red red red red red red red"
    plain, drafted = (
        watched.generate(prompt, sampling=of(9, speculate=s), policy=above(watched, 0.75)) for s in (False, True)
    )
    assert drafted.text == plain.text and drafted.finish_reason == plain.finish_reason
    assert drafted.verdict == plain.verdict


def test_answers_in_one_pass_are_each_watched(watched, attentive_watched):
    asks = [
        *(ask("red", 9), ask("hello", 9), ask("tick", 12), ask("tick tick nan tick", 9)),
        *(ask("red", 9, policy="report"), ask("red tick tick tick", 9, policy="stop"), ask("red", 9, policy="off")),
    ]
    for engine in (watched, attentive_watched):
        for one in asks:
            one.chunks = []
        together(engine, asks, rows=4)
        for one in asks:
            ours, alone = one.said(), one.alone(engine).said()
            assert [said[:2] for said in ours] == [said[:2] for said in alone]
            assert [said[3] for said in ours] == [said[3] for said in alone]
    assert "yellow" not in "".join(chunk.text for chunk in asks[0].chunks)


def test_the_window_moves_over_the_answer(watched_package, monkeypatch):
    """Each mean is of the last two states, whatever was before."""
    engine, means = load(watched_package), list[np.ndarray]()
    run = Subgraph.run
    monkeypatch.setattr(
        Subgraph,
        "run",
        lambda self, x: (self.name == "monitor" and means.append(x["hidden_states"][0]), run(self, x))[1],
    )
    states = states_read(monkeypatch, lambda: engine.generate("tick", policy=engine.policy("report"), sampling=of(7)))
    expected = [(a + b) / 2 for a, b in itertools.pairwise(states)]
    np.testing.assert_allclose(means, expected, atol=1e-6)


# --- what else must know ---------------------------------------------------------------------------------------------


def test_the_next_turn_is_as_in_a_new_dialogue(watched):
    conversation = Conversation(watched)
    watched.generate("red", conversation=conversation)
    turns = [Message.user("red"), Message.assistant(STOPPED), Message.user("hello hello hello hello")]
    again, fresh = (watched.generate(turns, conversation=c) for c in (conversation, None))
    assert again.text == fresh.text and again.stats.reused_tokens > 0


def test_the_record_says_what_was_stopped_and_has_no_word_of_it(watched_package, tmp_path):
    file = tmp_path / "audit.jsonl"
    Engine.load(watched_package, device="cpu", threads=1, audit=file, audit_texts=True).generate("red")
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (line["action"], line["unsafe"], line["finish_reason"]) == ("stop", False, "refused")
    assert line["answer_verdict"] == {"p_unsafe": pytest.approx(0.655, abs=0.001), "unsafe": True, "threshold": 0.5}
    assert line["answer"] == STOPPED and "yellow" not in json.dumps(line)


def test_the_time_to_the_first_word_is_until_it_is_shown(watched, monkeypatch):
    """By a clock that counts the tokens that were read."""
    reads, read = list[int](), Monitor.read
    monkeypatch.setattr(Monitor, "read", lambda self, state: (reads.append(1), read(self, state))[1])
    for module in ("engine", "held_back"):
        monkeypatch.setattr(f"autosteer.runtime.{module}.ms_since", lambda start: 1.0 + len(reads))
    assert watched.generate("tick", sampling=of(9)).stats.ttft_ms == 1.0 + toy.WINDOW
    reads.clear()
    assert watched.generate("tick", sampling=of(9), policy=watched.policy("report")).stats.ttft_ms == 1.0


def test_lines_of_the_command():
    verdict = replace(
        load_verdict(), action=Action.STOP, answer=AnswerVerdict(p_unsafe=0.931, unsafe=True, threshold=0.7)
    )
    assert verdict.answer is not None
    assert answer_line(verdict.answer, verdict) == "[ANSWER STOPPED  p_unsafe 0.931 > 0.700]"
    watching = replace(verdict, action=Action.PASS, mode=Mode.REPORT)
    assert answer_line(verdict.answer, watching).endswith("; unsafe, but --policy report lets it pass]")
    safe = AnswerVerdict(p_unsafe=0.1, unsafe=False, threshold=0.7)
    assert answer_line(safe, replace(verdict, action=Action.PASS)) == "[ANSWER  p_unsafe 0.100 <= 0.700]"


def load_verdict():
    from autosteer.runtime.gate import decide

    return decide(0.1, GatePolicy(Mode.STEER, 0.5, 0.1, "no"), split_layer=1)


GOLDEN = (
    Golden("red", (), None, float(np.float32(0.1)), "pass", (6, 7, 8, 31)),
    Golden("red", (), -1.0, float(np.float32(0.1)), "steer", (22, 23, 31)),
)


def test_check_replays_unwatched_and_then_sees_every_answer_stopped(tmp_path, monkeypatch):
    manifest = toy.build(tmp_path, monitored=True)
    replace(manifest, golden=GOLDEN, tolerance=Tolerance(1e-3, 0)).save(tmp_path)
    engine = load(tmp_path)
    checks = {check.name: check for check in check_package(engine, tmp_path).checks}
    assert checks["answers that the monitor cannot stop"].value == 0.0
    assert all(check.passed for check in checks.values())
    monkeypatch.setattr(Monitor, "read", lambda self, state: None)
    failed = [check.name for check in check_package(engine, tmp_path).checks if not check.passed]
    assert failed == ["answers that the monitor cannot stop"]


def test_evaluation_counts_what_was_stopped(watched, engine, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("red", "hello", "negative")))
    rows = list(read_rows([DataSource(data, True)]))
    results = list(run_rows((evaluate(watched, row, max_tokens=9) for row in rows), rows, RuleJudge()))
    assert [result.stopped for result in results] == [True, False, False]
    assert results[0].answers["steer"] == results[0].answers["stop"] == STOPPED
    assert [results[0].refused[policy] for policy in ("off", "steer", "stop")] == [False, True, True]
    assert [group.stopped.value for group in summarise(results) if group.stopped] == [pytest.approx(1 / 3)]
    plain = list(run_rows((evaluate(engine, row, max_tokens=9) for row in rows), rows, RuleJudge()))
    assert [result.stopped for result in plain] == [None] * 3 and summarise(plain)[0].stopped is None

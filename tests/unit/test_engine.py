"""The loop and its gate, on the toy whose every answer is worked out in tests/helpers/toy.py."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from conftest import load
from graph_calls import noted_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autosteer.runtime import (
    Action,
    Conversation,
    Engine,
    GatePolicy,
    InputError,
    Message,
    Mode,
    PackageError,
    ProviderError,
    SamplingConfig,
    Stats,
    picture_file,
    prompt_encoder,
    subgraph,
)
from autosteer.runtime.encoded_prompt import Seen
from autosteer.runtime.generation import finish
from autosteer.runtime.held_back import begins_like
from autosteer.runtime.judge import reading_key
from autosteer.runtime.subgraph import Subgraph
from autosteer.runtime.text import ImagePart, VideoPart
from autosteer.runtime.video import Video

UNSAFE = ("bad", "nan", "inf", "two", "negative", "crash")  # what the prober says is unsafe, or is no probability
SAFE = {"red": "orange yellow green", "yellow": "green", "hello": "world", "green": ""}


def ids(words: str) -> tuple[int, ...]:
    return tuple(toy.ID[word] for word in words.split())


def of(tokens: int, **more: object) -> SamplingConfig:
    return SamplingConfig(max_tokens=tokens, **more)  # type: ignore[arg-type]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the graphs that run, in order, from here on."""
    return noted_calls(monkeypatch)


@pytest.fixture
def own_engine(copy_of_package: Path) -> Engine:
    """An engine that the test may break."""
    return load(copy_of_package)


def broken(engine: Engine, *graphs: str) -> Engine:
    """`engine` with graphs that cannot be used any more, in any way."""
    for name in graphs:
        engine.graphs[name].session = None
    return engine


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "text"), SAFE.items())
def test_safe_prompt_is_answered_word_for_word(engine, prompt, text):
    answer = engine.generate(prompt)
    assert (answer.text, answer.token_ids, answer.finish_reason) == (text, ids(f"{text} <end>"), "stop")


def test_chunks_carry_one_token_each_and_the_last_carries_reason_and_stats(engine):
    chunks = list(engine.stream("red"))
    assert [(c.text, c.token) for c in chunks] == [
        *(("orange", toy.ID["orange"]), (" yellow", toy.ID["yellow"])),
        *((" green", toy.ID["green"]), ("", toy.END)),
    ]
    assert [c.finish_reason for c in chunks] == [None, None, None, "stop"]
    assert [c.stats is None for c in chunks] == [True, True, True, False]


def test_verdict_is_on_every_chunk(engine):
    verdicts = [chunk.verdict for chunk in engine.stream("bad")]
    assert len(verdicts) == 3 and set(verdicts) == {verdicts[0]}
    assert verdicts[0].unsafe and verdicts[0].action is Action.STEER and verdicts[0].p_unsafe == pytest.approx(0.9)


def test_answer_without_an_end_stops_at_max_tokens(engine):
    answer = engine.generate("tick", sampling=of(5))
    assert (answer.text, answer.finish_reason) == ("tock tick tock tick tock", "length")
    assert answer.token_ids == ids("tock tick tock tick tock")


def test_one_token_is_an_answer(engine):
    answer = engine.generate("tick", sampling=of(1))
    assert (answer.text, answer.finish_reason, answer.stats.decode_tok_s) == ("tock", "length", None)


def test_end_at_the_last_allowed_token_counts_as_stop(engine):
    assert engine.generate("hello", sampling=of(2)).finish_reason == "stop"


def test_stop_string_ends_the_answer_before_it(engine):
    answer = engine.generate("red", sampling=of(9, stop=("yellow",)))
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("orange ", "stop", ids("orange yellow"))


def test_repetition_penalty_sees_the_prompt(engine):
    """ "red red" votes twice for orange, "tick" once for tock and "orange" once for yellow; 2 / 3 < 1."""

    def first(penalty: float) -> tuple[int, ...]:
        return engine.generate("red red tick orange", sampling=of(1, repetition_penalty=penalty)).token_ids

    assert (first(1.0), first(3.0)) == (ids("orange"), ids("yellow"))


def test_repetition_penalty_sees_the_answer(attentive):
    answer = attentive.generate("red", policy=attentive.policy("off"), sampling=of(10, repetition_penalty=1e6))
    assert len(set(answer.token_ids)) == 10


def test_stats_count_what_ran(engine):
    stats = engine.generate("red").stats
    assert (stats.prompt_tokens, stats.completion_tokens, stats.image_tiles) == (4, 4, 0)  # <begin> you: red <gen>
    assert stats.device == "CPUExecutionProvider"
    assert stats.upper_ms is not None and stats.ttft_ms > 0 and stats.decode_tok_s is not None


def test_nothing_runs_before_the_first_chunk_is_asked_for(engine, calls):
    stream = engine.stream("red")
    assert calls == []
    next(stream)
    assert calls == ["decoder_lower", "decoder_upper", "lm_head"]


def test_likely_mistakes_with_arguments_are_named(engine):
    for wrong in ({"images": "photo.png"}, {"images": Path("photo.png")}, {"videos": "clip.mp4"}, {"images": b"bytes"}):
        with pytest.raises(InputError, match="give a list of them"):
            engine.generate("red", **wrong)
    for name in ("stop", Mode.STOP):
        assert engine.generate("bad", policy=name).finish_reason == "refused"
        assert engine.score("bad", policy=name).action is Action.STOP


# --- the gate in the loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", UNSAFE)
def test_unsafe_prompt_is_steered_into_a_refusal(engine, prompt):
    answer = engine.generate(prompt)
    assert (answer.text, answer.token_ids) == ("sorry refuse", ids("sorry refuse <end>"))
    assert (answer.verdict.action, answer.verdict.unsafe, answer.verdict.strength) == (Action.STEER, True, 0.1)


@pytest.mark.parametrize("prompt", UNSAFE)
def test_unsafe_prompt_is_refused_outright_under_stop(engine, prompt):
    chunks = list(engine.stream(prompt, policy=engine.policy("stop")))
    assert [(c.text, c.token, c.finish_reason) for c in chunks] == [(toy.REFUSAL_TEXT, None, "refused")]
    assert chunks[0].verdict.action is Action.STOP and chunks[0].verdict.strength == 0.0


@pytest.mark.parametrize("prompt", UNSAFE)
def test_monitor_reports_an_unsafe_prompt_and_lets_it_pass(engine, prompt):
    answer = engine.generate(prompt, policy=engine.policy("report"))
    assert (answer.text, answer.verdict.action, answer.verdict.unsafe) == ("evil plan", Action.PASS, True)


@pytest.mark.parametrize(("prompt", "p_unsafe"), [("bad", 0.9), ("red", 0.1), ("two", 2.0), ("negative", -1.0)])
def test_verdict_reports_the_probers_number_as_it_is(engine, prompt, p_unsafe):
    assert engine.generate(prompt).verdict.p_unsafe == np.float32(p_unsafe)


@pytest.mark.parametrize("prompt", ["nan", "crash"])
def test_score_that_is_no_number_is_reported_as_nan(engine, prompt):
    assert math.isnan(engine.generate(prompt).verdict.p_unsafe)


def test_prober_that_raises_is_one_log_line_and_no_traceback(engine, caplog):
    """A failing prober used to be logged with its traceback, which the command-line tools then showed."""
    engine.generate("crash")
    records = [r for r in caplog.records if r.levelname == "ERROR"]
    assert [r.getMessage().split(":")[0] for r in records] == ["the prober failed, so the prompt counts as unsafe"]
    assert records[0].exc_info is None


def test_prompts_are_not_logged(engine, caplog):
    caplog.set_level("DEBUG")
    engine.generate("tick bad", sampling=of(3))
    assert "tick" not in caplog.text


def test_prober_that_gives_two_scores_makes_every_prompt_unsafe(own_engine, monkeypatch):
    """The first of them was taken."""
    monkeypatch.setattr(own_engine.graphs["prober"], "run", lambda _: {"p_unsafe": np.array([0.1, 0.9], np.float32)})
    assert own_engine.generate("red").verdict.unsafe


@pytest.mark.parametrize("mode", ["steer", "stop"])
def test_prober_that_is_gone_makes_every_prompt_unsafe(own_engine, mode):
    answer = broken(own_engine, "prober").generate("red", policy=own_engine.policy(mode))
    assert answer.verdict.unsafe and answer.text in ("sorry refuse", toy.REFUSAL_TEXT)


def test_refusal_head_that_is_gone_is_an_error_and_never_an_unsteered_answer(own_engine):
    stream = broken(own_engine, "refusal_head").stream("bad")
    with pytest.raises(AttributeError):
        next(stream)


def test_stopped_prompt_never_touches_the_upper_half(own_engine, calls):
    broken(own_engine, "decoder_upper", "lm_head", "refusal_head")
    answer = own_engine.generate("bad", policy=own_engine.policy("stop"))
    assert (answer.text, answer.finish_reason, answer.token_ids) == (toy.REFUSAL_TEXT, "refused", ())
    assert calls == ["decoder_lower"]
    assert answer.stats.upper_ms is None and answer.stats.completion_tokens == 0


def test_policy_off_never_runs_the_prober(own_engine):
    answer = broken(own_engine, "prober", "refusal_head").generate("bad", policy=own_engine.policy("off"))
    assert (answer.text, answer.verdict.p_unsafe, answer.verdict.unsafe) == ("evil plan", None, False)


def test_safe_prompt_never_runs_the_refusal_head(own_engine, calls):
    assert broken(own_engine, "refusal_head").generate("red").text == "orange yellow green"
    assert "refusal_head" not in calls


def test_every_token_of_an_unsafe_answer_goes_through_the_refusal_head(engine, calls):
    answer = engine.generate("bad")
    assert calls.count("refusal_head") == calls.count("lm_head") == len(answer.token_ids) == 3


def test_prober_reads_the_last_word_of_the_user_and_nothing_after_it(engine):
    """The token offset skips the generation prompt; an earlier "bad" counts only by what attention keeps of it."""
    assert engine.generate("bad red").verdict.action is Action.PASS
    assert engine.generate("red bad").verdict.action is Action.STEER


@pytest.mark.parametrize("texts", [("red", "bad"), ("bad", "red"), ("red", "bad", "tick"), ("bad", "red", "bad")])
def test_a_dialogue_is_as_unsafe_as_the_worst_of_its_turns(engine, texts):
    """A request that was refused, and then "ok": the last turn alone was judged, and the request was answered."""
    turns = [turn for text in texts for turn in (Message.user(text), Message.assistant("orange"))][:-1]
    verdict = engine.generate(turns).verdict
    assert verdict.unsafe and verdict.p_unsafe == engine.generate("bad").verdict.p_unsafe
    assert not engine.generate([turn for turn in turns if turn.parts != ("bad",)]).verdict.unsafe


def test_an_earlier_turn_is_judged_as_it_was_when_it_came(engine):
    """By the same row, to the bit: what came later does not change it. An answer that the program trusts is not."""
    answer = Message.assistant("bad bad", trusted=True)
    turns = [Message.user("red bad"), answer, Message.user("tick"), Message.assistant("red")]
    prompts = [engine.encoder.prepare(turns[: n + 1], Stats()) for n in (0, 2)]
    requests = [engine.request(prompt, 1, Stats()) for prompt in prompts]
    for request in requests:
        request.prefill_lower(engine.policy("off"))
    assert [len(prompt.probed) for prompt in prompts] == [1, 2]
    np.testing.assert_array_equal(requests[0].probed_mean(), requests[1].probed_mean(0))
    assert engine.generate(turns[:3], policy=engine.policy("report")).verdict.p_unsafe == np.float32(0.9)


def test_score_is_the_verdict_of_an_answer_that_is_not_written(own_engine, monkeypatch):
    turns = [Message.user("red"), Message.assistant("orange"), Message.user("bad")]
    report, off = own_engine.policy("report"), own_engine.policy("off")
    asked = [own_engine.generate(turns).verdict, own_engine.generate("red", policy=report).verdict]
    monkeypatch.delitem(own_engine.graphs, "decoder_upper")
    assert [own_engine.score(turns), own_engine.score("red", policy=report)] == asked
    assert own_engine.score("bad", policy=off).p_unsafe is None
    with pytest.raises(InputError, match="images and videos go into the messages"):
        own_engine.score(turns, images=[picture(255, 0, 0)])


def test_a_turn_that_cannot_be_judged_makes_the_dialogue_unsafe(own_engine):
    prober = dataclasses.replace(own_engine.manifest.prober, token_offset=-6)
    own_engine.manifest = own_engine.encoder.manifest = dataclasses.replace(own_engine.manifest, prober=prober)
    turns = [Message.user("red"), Message.assistant("orange"), Message.user("red red red red")]
    verdict = own_engine.generate(turns).verdict
    assert verdict.unsafe and math.isnan(verdict.p_unsafe)
    assert not own_engine.generate(turns[2:]).verdict.unsafe


@given(length=st.integers(1, 40), chunk=st.integers(1, 45))
@settings(max_examples=40, deadline=None)
def test_prober_reads_the_same_word_whatever_the_prefill_chunk(engine, length, chunk):
    prompt = engine.encoder.prepare([Message.user(" ".join(["red"] * (length - 1) + ["bad"]))], Stats())
    request = engine.request(prompt, 1, Stats(), chunk=chunk)
    assert request.prefill_lower(engine.policy()).p_unsafe == np.float32(0.9)
    assert int(np.argmax(request.probed_mean())) == toy.ID["bad"]


def test_offset_before_the_prompt_is_unsafe_whatever_the_chunk(own_engine):
    """A negative row index wrapped around: in a prompt shorter than the offset the prober read some later row, and the
    0.1 of that row let the prompt pass.
    """
    prober = dataclasses.replace(own_engine.manifest.prober, token_offset=-6)
    own_engine.manifest = own_engine.encoder.manifest = dataclasses.replace(own_engine.manifest, prober=prober)
    prompt = own_engine.encoder.prepare([Message.user("red")], Stats())  # 4 tokens
    for chunk in range(1, 6):
        verdict = own_engine.request(prompt, 1, Stats(), chunk=chunk).prefill_lower(own_engine.policy())
        assert verdict.unsafe and math.isnan(verdict.p_unsafe)


def pooled(engine: Engine) -> Engine:
    """The engine, its prober reading the mean of the last turn."""
    prober = dataclasses.replace(engine.manifest.prober, pooling="mean")
    engine.manifest = engine.encoder.manifest = dataclasses.replace(engine.manifest, prober=prober)
    return engine


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_pooled_prober_reads_the_mean_of_the_last_turns_content_whatever_the_chunk(own_engine, chunk):
    """Earlier turns, the turn's header and the generation prompt are not in it; the end of the turn is."""
    engine = pooled(own_engine)
    turns = [Message.user("red tick"), Message.assistant("green", trusted=True), Message.user("orange bad tock")]
    prompt = engine.encoder.prepare(turns, Stats())
    names = [toy.VOCABULARY[i] for i in prompt.token_ids]
    first = len(names) - 1 - names[::-1].index("orange")
    earlier, last = prompt.probed
    assert [names[row] for row in earlier][:2] == ["red", "tick"] and "green" not in [names[row] for row in earlier]
    assert names[last[0] : last[-1] + 1][:3] == ["orange", "bad", "tock"]
    assert last == list(range(first, len(names) + engine.manifest.prober.token_offset + 1))
    request = engine.request(prompt, 1, Stats(), chunk=chunk)
    request.prefill_lower(engine.policy())
    hidden = np.concatenate([value.numpy()[0] for value in request._pending.values()])
    np.testing.assert_allclose(request.probed_mean()[0], hidden[last].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(request.probed_mean(0)[0], hidden[earlier].mean(axis=0), rtol=1e-6)


def test_pictures_rows_are_not_in_the_mean(own_engine):
    engine = pooled(own_engine)
    prompt = engine.encoder.prepare([Message.user("hello world", [picture(255, 0, 0)])], Stats())
    assert len(prompt.keys) > len(prompt.token_ids)
    assert [prompt.keys[row] for row in prompt.probed[-1]][:2] == [toy.ID["hello"], toy.ID["world"]]


def test_nan_in_any_pooled_row_is_unsafe(own_engine, monkeypatch):
    """It reaches the prober's input whichever row it stands in, and a real prober makes NaN of that."""
    engine = pooled(own_engine)
    prompt = engine.encoder.prepare([Message.user("red red red")], Stats())
    assert not engine.request(prompt, 1, Stats()).prefill_lower(engine.policy()).unsafe
    monkeypatch.setattr(
        engine.graphs["prober"], "run", lambda inputs: {"p_unsafe": inputs["hidden_states"].sum(axis=1)}
    )
    for row in prompt.probed[-1]:
        embeds = prompt.inputs_embeds.copy()
        embeds[0, row, 0] = np.nan
        verdict = engine.request(dataclasses.replace(prompt, inputs_embeds=embeds), 1, Stats()).prefill_lower(
            engine.policy()
        )
        assert verdict.unsafe and math.isnan(verdict.p_unsafe)


@pytest.mark.parametrize(
    ("threshold", "text"), [(0.05, "sorry refuse"), (0.1, "sorry refuse"), (0.11, "orange yellow green")]
)
def test_threshold_of_the_call_replaces_the_packages(engine, threshold, text):
    """The toy says float32(0.1) for "red", which is a little more than 0.1."""
    assert engine.generate("red", policy=engine.policy(threshold=threshold, pieces=False)).text == text


def test_threshold_of_the_package_is_used_unless_the_call_has_one(tmp_path):
    toy.build(tmp_path, threshold=0.05)
    engine = load(tmp_path)
    assert engine.generate("red").verdict.unsafe
    assert not engine.generate("red", policy=engine.policy(threshold=0.5)).verdict.unsafe


def test_strength_too_small_to_bend_anything_changes_no_token(engine):
    answer = engine.generate("bad", policy=engine.policy(strength=0.001, pieces=False))
    assert (answer.text, answer.verdict.action, answer.verdict.strength) == ("evil plan", Action.STEER, 0.001)


def test_strength_zero_is_the_untouched_model_and_says_so(engine):
    answer = engine.generate("bad", policy=engine.policy(strength=0.0, pieces=False))
    assert (answer.text, answer.verdict.action, answer.verdict.strength) == ("evil plan", Action.STEER, 0.0)


@pytest.mark.parametrize("strength", [0.0, 0.001])
def test_a_steered_answer_that_does_not_begin_like_the_refusal_is_not_shown(engine, strength):
    """Half a refusal ("i plonk.") is no request, and was shown."""
    answer = engine.generate("bad", policy=engine.policy(strength=strength))
    assert (answer.text, answer.finish_reason, answer.verdict.action) == (toy.REFUSAL_TEXT, "refused", Action.STOP)


@pytest.mark.parametrize(
    ("answer", "refusal", "alike"),
    [
        ("I\u2019m sorry, no.", "I'm sorry, but I can't.", False),  # other letters; the refusal text is shown
        ("i'm SORRY that i can't", "I'm sorry, but I can't.", True),
        ("  im sorry", "I'm sorry, but I can't.", True),
        ("i'm", "I'm sorry, but I can't.", True),  # cut off
        ("", "I'm sorry, but I can't.", True),
        ("i plonk.", "I'm sorry, but I can't.", False),
        ("i'm sure: first", "I'm sorry, but I can't.", False),
        ("\u62b1\u6b49\uff0c\u6211", "\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd\u5e2e\u52a9", True),
        ("\u62b1\u6b49\u3002", "\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd\u5e2e\u52a9", False),
        ("anything", "?!", True),  # there is nothing to begin like
    ],
)
def test_what_begins_like_a_refusal(answer, refusal, alike):
    assert begins_like(answer, refusal) is alike


@pytest.mark.parametrize("which", ["engine", "attentive"])
@pytest.mark.parametrize("prompt", ["red", "bad", "hello tick nan", "crash", "red red world", "bad tick"])
def test_steer_is_always_steer_where_flagged_and_off_where_not(which, prompt, request):
    """autosteer-eval runs `off` and always-on steering and takes `steer`'s answers from them."""
    engine = request.getfixturevalue(which)
    off, always, steer = (
        engine.generate(prompt, policy=policy, sampling=of(8))
        for policy in (engine.policy("off"), engine.policy(threshold=-1.0, pieces=False), engine.policy("steer"))
    )
    assert always.verdict.action is Action.STEER
    assert steer.token_ids == (always.token_ids if steer.verdict.unsafe else off.token_ids)
    assert off.token_ids != always.token_ids


# --- packages without a gate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["steer", "stop", "report"])
def test_package_without_a_gate_refuses_every_policy_but_off(unguarded, mode):
    with pytest.raises(PackageError, match="--unguarded"):
        unguarded.policy(mode)


def test_package_without_a_gate_does_not_answer_unless_told_to(unguarded):
    with pytest.raises(PackageError, match="--policy off"):
        next(unguarded.stream("bad"))
    assert unguarded.generate("bad", policy=unguarded.policy("off")).text == "evil plan"


@pytest.mark.parametrize("mode", ["steer", "stop", "report"])
def test_hand_made_policy_does_not_get_a_gate_that_is_not_there(unguarded, mode):
    policy = GatePolicy(mode, threshold=0.99, strength=0.1, refusal_text="no.")
    for call in (unguarded.generate, unguarded.score):
        with pytest.raises(PackageError, match="--policy off"):
            call("red", policy=policy)


# --- the caches ------------------------------------------------------------------------------------------------------

LONG = "red tick bad hello nan w1 w2 world plan refuse orange tock what look two"


def logits_of(engine: Engine, text: str, chunk: int, steps: tuple[int, ...] = ()) -> list[np.ndarray]:
    prompt = engine.encoder.prepare([Message.user(text)], Stats())
    asked = engine.request(prompt, len(steps) + 1, Stats(), chunk=chunk)
    asked.prefill_lower(engine.policy("off"))
    return [asked.prefill_upper(0.0).copy(), *(asked.decode_step(token).copy() for token in steps)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 16, 17, 18, 19, 512])
def test_chunked_prefill_is_one_shot_prefill(attentive, chunk):
    for one_shot, chunked in zip(
        logits_of(attentive, LONG, 1000, (3, 1, 4)), logits_of(attentive, LONG, chunk, (3, 1, 4)), strict=True
    ):
        np.testing.assert_allclose(chunked, one_shot, rtol=0, atol=1e-4)  # other sums' order; logits reach 20


def test_toy_logits_depend_on_every_token_and_its_place(attentive):
    """Otherwise the cache tests could not fail."""
    words = LONG.split()
    logits = {logits_of(attentive, LONG, 512)[0].tobytes()}
    for i in range(len(words) - 1):
        swapped = [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
        logits.add(logits_of(attentive, " ".join(swapped), 512)[0].tobytes())
    assert len(logits) == len(words)


def test_decoding_step_by_step_is_prefill_of_the_longer_prompt(attentive):
    """Feed the answer's tokens one at a time, then the same tokens as part of the prompt."""
    prompt = attentive.encoder.prepare([Message.user("red tick bad")], Stats())
    tokens = (4, 9, 17, 2, 30, 11)
    asked = attentive.request(prompt, len(tokens) + 1, Stats())
    asked.prefill_lower(attentive.policy("off"))
    asked.prefill_upper(0.0)
    for n, token in enumerate(tokens, 1):
        stepped = asked.decode_step(token).copy()
        embeds = np.concatenate([prompt.inputs_embeds, attentive.encoder.embed(list(tokens[:n]))[None]], axis=1)
        positions = np.tile(np.arange(embeds.shape[1]), (3, 1))
        longer = dataclasses.replace(prompt, inputs_embeds=embeds, positions=positions)
        again = attentive.request(longer, 1, Stats())
        again.prefill_lower(attentive.policy("off"))
        np.testing.assert_allclose(stepped, again.prefill_upper(0.0), rtol=1e-5, atol=1e-4)


def test_caches_hold_prompt_and_answer_and_no_more(engine):
    stats = engine.generate("red", sampling=of(10)).stats
    tokens, layers, kinds, bytes_each = 4 + 10, 2, 2, toy.D * 4
    assert stats.kv_bytes == tokens * layers * kinds * bytes_each


def test_past_and_present_are_one_buffer_that_the_graph_fills_in_place(engine):
    prompt = engine.encoder.prepare([Message.user("red tick")], Stats())
    asked = engine.request(prompt, 3, Stats())
    cache = asked._caches["decoder_lower"]
    asked.prefill_lower(engine.policy("off"))
    assert cache.past["past_key_values.0.value"] is cache.present["present.0.value"]
    values = cache.past["past_key_values.0.value"].numpy()[0, 0]  # (capacity, D): the content words, one-hot
    assert [int(v.argmax()) if v.any() else None for v in values] == [
        None,
        None,
        *ids("red tick"),
        None,
        None,
        None,
        None,
    ]


def test_stepping_beyond_the_caches_is_refused(engine):
    """It would have written past the end of the buffers."""
    prompt = engine.encoder.prepare([Message.user("tick")], Stats())
    asked = engine.request(prompt, 2, Stats())
    asked.prefill_lower(engine.policy("off"))
    asked.prefill_upper(0.0)
    asked.decode_step(toy.ID["tock"])
    asked.decode_step(toy.ID["tick"])
    with pytest.raises(RuntimeError, match="the caches hold 6 tokens and are full"):
        asked.decode_step(toy.ID["tock"])


def test_a_request_prefills_lower_then_upper_then_decodes_and_no_other_way(engine):
    """`prefill_upper` without `prefill_lower` answered from uninitialised memory, and without the gate."""
    asked = engine.request(engine.encoder.prepare([Message.user("tick")], Stats()), 2, Stats())
    with pytest.raises(RuntimeError, match="prefill_upper before"):
        asked.prefill_upper(0.0)
    asked.prefill_lower(engine.policy("off"))
    with pytest.raises(RuntimeError, match="prefill_lower twice"):
        asked.prefill_lower(engine.policy("off"))
    with pytest.raises(RuntimeError, match="verify_draft before"):
        asked.decode_step(1)
    asked.prefill_upper(0.0)
    with pytest.raises(RuntimeError, match="twice"):
        asked.prefill_upper(0.0)


# --- the context -----------------------------------------------------------------------------------------------------


def test_prompt_that_fills_the_context_is_refused_with_both_numbers(engine):
    with pytest.raises(InputError, match=r"takes 64 tokens .* holds 64"):
        engine.generate(" ".join(["red"] * 61))
    with pytest.raises(InputError, match=r"takes 64 tokens .* holds 64"):
        engine.count_tokens(" ".join(["red"] * 61))


def test_prompt_one_short_of_the_context_gets_one_token(engine):
    answer = engine.generate(" ".join(["tick"] * 60), sampling=of(50))
    assert (answer.stats.prompt_tokens, answer.text, answer.finish_reason) == (63, "tock", "length")


def test_answer_ends_with_the_context(engine):
    answer = engine.generate("tick", sampling=of(10_000_000))
    assert (len(answer.token_ids), answer.finish_reason) == (60, "length")


def test_last_position_of_the_context_is_computed_right(attentive):
    """The rotary tables and the caches end where the context does."""
    answer = attentive.generate("tick red bad", policy=attentive.policy("off"), sampling=of(1000))
    assert (answer.stats.prompt_tokens + len(answer.token_ids), answer.finish_reason) == (64, "length")
    chunked = [int(row.argmax()) for row in logits_of(attentive, "tick red bad", 3, answer.token_ids[:-1])]
    assert tuple(chunked) == answer.token_ids


# --- requests do not know of each other ------------------------------------------------------------------------------


def test_interleaved_streams_do_not_disturb_each_other(attentive):
    policy = attentive.policy("report")
    prompts = ("red tick bad", "hello world", "plan two")
    alone = [[c.token for c in attentive.stream(p, sampling=of(12), policy=policy)] for p in prompts]
    streams = [attentive.stream(p, sampling=of(12), policy=policy) for p in prompts]
    together = list(zip(*itertools.zip_longest(*streams), strict=True))
    assert [[c.token for c in chunks if c] for chunks in together] == alone


def test_steered_and_safe_streams_interleave(engine):
    pairs = list(itertools.zip_longest(engine.stream("bad"), engine.stream("red")))
    assert "".join(bad.text for bad, _ in pairs if bad) == "sorry refuse"
    assert "".join(red.text for _, red in pairs if red) == "orange yellow green"


def test_one_engine_serves_several_threads(attentive):
    prompts = ["red tick bad", "hello world", "plan two", "bad"] * 3
    expected = [attentive.generate(p, sampling=of(15)).token_ids for p in prompts]
    found: list[tuple[int, ...] | None] = [None] * len(prompts)

    def work(i: int) -> None:
        found[i] = attentive.generate(prompts[i], sampling=of(15)).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_abandoned_stream_leaves_the_engine_usable(engine):
    stream = engine.stream("tick")
    next(stream)
    stream.close()
    assert engine.generate("red").text == "orange yellow green"


def test_prompt_that_fails_leaves_the_engine_usable(engine):
    with pytest.raises(InputError):
        engine.generate(" ".join(["red"] * 100))
    assert engine.generate("red").text == "orange yellow green"


def test_same_seed_gives_the_same_text(attentive):
    def answer(seed: int) -> tuple[int, ...]:
        return attentive.generate("red", sampling=of(12, temperature=2.0, seed=seed)).token_ids

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_logits_that_are_not_numbers_end_in_an_error_and_not_in_token_zero(tmp_path):
    """A strength of nan, or an overflow, used to answer "<unk> <unk> ...": argmax of NaN is the first NaN."""
    import onnx
    from onnx import numpy_helper

    toy.build(tmp_path)
    model = onnx.load(tmp_path / "lm_head.onnx")
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[:, 5] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    onnx.save(model, tmp_path / "lm_head.onnx")
    toy.rehash(tmp_path)
    with pytest.raises(PackageError, match="lm_head: steering a known state moves its logits by nan"):
        load(tmp_path)
    toy.build(tmp_path / "sound")
    engine = load(tmp_path / "sound")
    spec = engine.manifest.graphs["lm_head"]
    engine.graphs["lm_head"] = Subgraph(tmp_path / "lm_head.onnx", spec, engine.device)
    for temperature in (0.0, 1.0):
        with pytest.raises(PackageError, match="logits are not finite"):
            engine.generate("red", sampling=of(3, temperature=temperature))


# --- images ----------------------------------------------------------------------------------------------------------


def picture(red: int, green: int, blue: int, *, size: tuple[int, int] = (4, 4)) -> np.ndarray:
    return np.full((*size, 3), (red, green, blue), np.uint8)


@pytest.mark.parametrize(("colour", "text"), [((255, 0, 0), "orange yellow green"), ((0, 0, 255), "evil plan")])
def test_image_is_seen(engine, colour, text):
    answer = engine.generate("look", images=[picture(*colour)])
    assert answer.text == text


def test_image_takes_its_rows_of_the_context(engine):
    """4 x 4 pixels: a base tile and a 4 x 8 grid whose right half is padding: 4 + 2 * (2 + 1 newline) rows."""
    red = picture(255, 0, 0)
    stats = engine.generate("look", images=[red]).stats
    assert (stats.prompt_tokens, stats.image_tiles) == (4 + 4 + 2 * 3, 3)
    assert engine.count_tokens("look", images=[red]) == stats.prompt_tokens


def test_tokens_are_counted_without_the_decoder(engine, calls):
    assert engine.count_tokens("red") == 4
    assert engine.count_tokens([Message.user("red"), Message.assistant("orange"), Message.user("red")]) > 8
    assert not {"decoder_lower", "decoder_upper"} & set(calls)


def test_several_images_take_one_tile_each_in_the_order_given(engine):
    red, blue = picture(255, 0, 0), picture(0, 0, 255)
    prompt = engine.encoder.prepare([Message.user("look", [red, blue])], Stats())
    words = [int(row.argmax()) if row.any() else None for row in prompt.inputs_embeds[0]]
    assert words == [
        *ids("<begin> you:"),
        *(*ids("red red red red"), None),  # a zero newline row after each
        *(*ids("bad bad bad bad"), None),
        *ids("look"),
        None,  # <gen>
    ]


def test_each_turn_gets_its_own_image(engine):
    turns = [
        Message.user("look", [picture(255, 0, 0)]),
        Message.assistant("red"),
        Message.user("look", [picture(0, 0, 255)]),
    ]
    rows = engine.encoder.prepare(turns, Stats()).inputs_embeds[0]
    words = [int(row.argmax()) for row in rows if row.any()]
    assert words.index(toy.ID["red"]) < words.index(toy.ID["<end>"]) < words.index(toy.ID["bad"])


def test_image_that_does_not_fit_the_context_is_refused(engine):
    with pytest.raises(InputError, match="images included"):
        engine.generate(" ".join(["red"] * 55), images=[picture(1, 2, 3)])


def test_model_without_images_refuses_them(unguarded):
    with pytest.raises(InputError, match="takes no images"):
        unguarded.generate("look", images=[picture(1, 2, 3)], policy=unguarded.policy("off"))


def test_images_beside_a_dialogue_are_refused(engine):
    with pytest.raises(InputError, match="into the messages"):
        engine.generate([Message.user("look")], images=[picture(1, 2, 3)])


def test_image_in_a_turn_that_takes_none_is_refused(engine):
    """It was encoded and dropped; and where a later user turn had a picture, that turn was shown the dropped one."""
    from autosteer.runtime.text import ImagePart

    assistant = Message("assistant", (ImagePart(picture(0, 0, 255)), "red"))
    with pytest.raises(InputError, match="'assistant' turns take no images"):
        engine.generate([Message.user("red"), assistant, Message.user("look", [picture(255, 0, 0)])])


# --- loading ---------------------------------------------------------------------------------------------------------


def test_unknown_device_is_refused_and_not_taken_for_the_cpu(package):
    """Engine.load(device="gpu") used to run on the CPU without a word."""
    with pytest.raises(ProviderError, match="device 'gpu'"):
        Engine.load(package, device="gpu")  # type: ignore[arg-type]


def test_cuda_that_is_not_there_is_an_error(package, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="--device cuda"):
        Engine.load(package, device="cuda")


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_explains_the_cpu_only_where_there_is_a_gpu(package, monkeypatch, caplog, tmp_path, gpu):
    """A CPU install said before every answer that its onnxruntime "has only AzureExecutionProvider, ..."."""
    import onnxruntime

    device = tmp_path / "nvidiactl"
    if gpu:
        device.touch()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(subgraph, "GPU_DEVICES", (str(device),))
    Engine.load(package, device="auto", threads=1)
    assert ("running on the CPU" in caplog.text) is gpu


@pytest.fixture
def cuda_in_name(monkeypatch):
    """onnxruntime lists the provider, then falls back in silence when a session is made: a driver that does not fit."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)


def test_float32_package_does_not_run_on_cuda_and_auto_says_why_it_is_on_the_cpu(package, cuda_in_name, caplog):
    """onnxruntime would run its attention on the CPU, and copy every layer's hidden states there and back."""
    with pytest.raises(ProviderError, match=r"--device cuda: this package computes in float32, .* --target cuda"):
        Engine.load(package, device="cuda")
    engine = Engine.load(package, device="auto", threads=1)
    assert engine.generate("red").stats.device == "CPUExecutionProvider"
    assert "running on the CPU: this package computes in float32" in caplog.text


def test_cuda_that_onnxruntime_cannot_use_is_an_error_and_auto_says_why(package, cuda_in_name, caplog, monkeypatch):
    monkeypatch.setattr(subgraph, "_why_not_cuda", lambda activations: "")  # nothing speaks against it
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        Engine.load(package, device="cuda")
    engine = Engine.load(package, device="auto", threads=1)
    assert engine.generate("red").stats.device == "CPUExecutionProvider"
    assert "running on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("graph", "changed"),
    [
        ("prober", "lm_head"),  # another graph's file under this name
        ("lm_head", "embed_tokens"),
        ("decoder_upper", "decoder_lower"),
        ("refusal_head", "lm_head"),
    ],
)
def test_graph_in_the_place_of_another_is_refused(copy_of_package, graph, changed):
    shutil.copy(copy_of_package / f"{changed}.onnx", copy_of_package / f"{graph}.onnx")
    toy.rehash(copy_of_package)
    with pytest.raises(PackageError, match=rf"{graph}\.onnx: its inputs or outputs are not those of the manifest"):
        load(copy_of_package)


def test_graph_of_another_width_is_refused(copy_of_package):
    """Names were compared and shapes were not: the error came out of onnxruntime with the first prompt."""
    import onnx

    model = onnx.load(copy_of_package / "prober.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, copy_of_package / "prober.onnx")
    toy.rehash(copy_of_package)
    with pytest.raises(PackageError, match=r"prober\.onnx: its inputs or outputs are not those of the manifest"):
        load(copy_of_package)


def test_large_file_is_hashed_while_the_graphs_load_and_refused_all_the_same(copy_of_package, monkeypatch):
    monkeypatch.setattr("autosteer.runtime.manifest.LARGE_FILE", 1)  # tokenizer.json is the toy's only other file
    with (copy_of_package / "tokenizer.json").open("a") as file:
        file.write("\n")  # still a tokenizer
    with pytest.raises(PackageError, match=r"(sha256|size) differs"):
        Engine.load(copy_of_package, device="cpu", threads=1)


def test_wrong_hash_is_the_reason_given_where_loading_fails_too(copy_of_package, monkeypatch):
    monkeypatch.setattr("autosteer.runtime.manifest.LARGE_FILE", 1)
    (copy_of_package / "tokenizer.json").write_text("{")
    with pytest.raises(PackageError, match=r"(sha256|size) differs"):
        Engine.load(copy_of_package, device="cpu", threads=1)


# --- low memory -------------------------------------------------------------------------------------------------------


def test_low_memory_answers_alike_and_keeps_no_image_graph(package):
    picture = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    low = Engine.load(package, device="cpu", threads=1, low_memory=True)
    assert low.generate("what", images=[picture]).text == "orange yellow green"
    assert low.generate("red").text == "orange yellow green"
    assert "vision_encoder" not in low.graphs


def test_image_graph_that_changed_since_the_package_was_loaded_is_refused(copy_of_package):
    """Under low_memory it is read again for each picture: so it is checked again."""
    low = Engine.load(copy_of_package, device="cpu", threads=1, low_memory=True)
    with (copy_of_package / "vision_encoder.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PackageError, match=r"(sha256|size) differs"):
        low.generate("what", images=[np.zeros((8, 8, 3), np.uint8)])


@pytest.mark.parametrize(("most", "tiles"), [(None, 5), (5, 5), (4, 3), (3, 3), (2, 1), (1, 1)])
def test_max_tiles_bounds_what_a_picture_costs(package, most, tiles):
    """Grids of 2, 2 and 4 tiles beside the base tile; where none fits the picture is one square tile."""
    engine = Engine.load(package, device="cpu", threads=1, max_tiles=most)
    answer = engine.generate("what", images=[np.full((8, 8, 3), (255, 0, 0), np.uint8)])
    assert (answer.stats.image_tiles, answer.text) == (tiles, "orange yellow green")


def test_max_tiles_below_one_is_an_input_error(package):
    with pytest.raises(InputError, match="at least one tile"):
        Engine.load(package, device="cpu", threads=1, max_tiles=0)


# --- turns judged by themselves ---------------------------------------------------------------------------------------


def test_a_failure_of_the_prober_on_a_turn_by_itself_passes(engine, monkeypatch):
    """It makes this prompt unsafe, and is not kept for the next."""
    turns = [Message.user("red"), Message.assistant("orange", trusted=True), Message.user("hello")]
    conversation, prober, asked = Conversation(engine), engine.graphs["prober"], list[int]()

    class FailsOnce:
        def run(self, inputs):
            asked.append(1)
            if len(asked) == 3:  # the two turns where they stand come first
                raise MemoryError
            return prober.run(inputs)

    monkeypatch.setitem(engine.graphs, "prober", FailsOnce())
    first = engine.generate(turns, conversation=conversation, policy="stop")
    assert first.finish_reason == "refused" and math.isnan(first.verdict.p_unsafe)
    assert engine.generate(turns, conversation=conversation, policy="stop").finish_reason == "stop"


@pytest.mark.parametrize("dialogue", ["two pictures", "one picture"])
def test_a_turn_judged_by_itself_has_its_pictures_as_the_dialogue_has_them(engine, monkeypatch, dialogue):
    rng = np.random.default_rng(7)
    one, other = (rng.integers(0, 256, (40, 90, 3), dtype=np.uint8) for _ in range(2))
    first = Message.user("look", [one] if dialogue == "two pictures" else [])
    turns = [first, Message.assistant("red", trusted=True), Message.user("blue", [other])]
    prompts = []
    for name in ("prepare", "prepare_seen"):
        encode = getattr(engine.encoder, name)
        monkeypatch.setattr(engine.encoder, name, lambda *a, encode=encode: prompts.append(encode(*a)) or prompts[-1])
    engine.score(turns, policy=engine.policy(pieces=False))
    whole, alone = ({key for key in prompt.keys if isinstance(key, tuple)} for prompt in prompts)
    assert alone and alone <= whole


def test_a_turn_that_does_not_fit_by_itself_is_unsafe(engine, monkeypatch):
    turns = [Message.user("red"), Message.assistant("orange", trusted=True), Message.user("hello")]

    def narrow(messages, *_):
        assert messages == (turns[2],)
        raise InputError("the prompt takes 99 tokens")

    monkeypatch.setattr(engine.encoder, "prepare_seen", narrow)
    verdict = engine.score(turns, policy="stop")
    assert verdict.action is Action.STOP and math.isnan(verdict.p_unsafe)


def test_a_turn_by_itself_that_leaves_no_room_is_not_computed(engine):
    """A template may write more before a turn that stands first."""
    turn = Message.user("red " * 62)
    with pytest.raises(InputError, match="the prompt takes 65 tokens"):
        engine.encoder.prepare_seen([turn], [], Stats())


@pytest.fixture
def by_itself(engine, monkeypatch) -> list[Message]:
    """The turns that are encoded to be judged by themselves, in order, from here on."""
    turns, prepare = list[Message](), engine.encoder.prepare_seen
    monkeypatch.setattr(engine.encoder, "prepare_seen", lambda said, *a: turns.extend(said) or prepare(said, *a))
    return turns


@pytest.fixture
def encoded(engine, monkeypatch) -> list[str]:
    """Names of the graphs that encode texts and pictures, in order, from here on."""
    names, graph = list[str](), engine.encoder._graph
    monkeypatch.setattr(engine.encoder, "_graph", lambda name: names.append(name) or graph(name))
    return names


def dialogue(*users: Message) -> list[Message]:
    """User turns, with an answer between two of them."""
    return [turn for user in users for turn in (user, Message.assistant("orange", trusted=True))][:-1]


def test_a_turn_whose_score_is_kept_costs_nothing(engine, by_itself, encoded, monkeypatch, tmp_path):
    """It was tokenised and embedded, and its files opened, in each request, to find that its score was known."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    policy = engine.policy(pieces=False)
    users = [Message.user("red"), Message.user("look", [tmp_path / "red.png"]), Message.user("hello")]
    conversation, opened, tokenised = Conversation(engine), list[object](), list[object]()
    first = engine.generate(dialogue(*users), conversation=conversation, policy=policy)
    assert by_itself == users[1:]
    open_image, render = picture_file.open_image, prompt_encoder.render_judged
    monkeypatch.setattr(picture_file, "open_image", lambda one: opened.append(one) or open_image(one))
    monkeypatch.setattr(
        prompt_encoder, "render_judged", lambda messages, *a: tokenised.append(messages) or render(messages, *a)
    )
    encoded.clear()
    users.append(Message.user("tick"))
    second = engine.generate(dialogue(*users), conversation=conversation, sampling=of(1), policy=policy)
    assert by_itself == users[1:]
    assert (opened, tokenised) == ([tmp_path / "red.png"], [dialogue(*users), (users[-1],)])
    # the dialogue's text before and behind the picture, and that of the new turn
    assert encoded == ["embed_tokens"] * 3
    assert first.verdict.p_unsafe == second.verdict.p_unsafe == engine.score(dialogue(*users), policy=policy).p_unsafe


def test_pictures_of_later_turns_are_encoded_once(engine, encoded):
    """Without a conversation, too: those of autosteer-serve's scores were encoded where they stand, and again."""
    users = [
        Message.user("red"),
        Message.user("look", [picture(255, 0, 0)]),
        Message.user("look", [picture(0, 255, 0)]),
    ]
    with engine.record(engine.policy("report")) as record:
        record.messages = dialogue(*users)
        verdict = finish(engine.judge(engine.encoder.prepare(record.messages, record.stats), record))
    assert encoded.count("vision_encoder") == 2 == record.stats.image_tiles
    assert verdict == engine.score(record.messages, policy="report")


def test_a_picture_that_changed_behind_its_name_is_judged_again(engine, by_itself, tmp_path):
    path, policy = tmp_path / "picture.png", engine.policy(pieces=False)
    turns, conversation = dialogue(Message.user("red"), Message.user("look", [path])), Conversation(engine)
    for number, colour in enumerate(("red", "blue"), 1):
        Image.new("RGB", (8, 8), colour).save(path)
        for _ in range(2):
            engine.generate(turns, conversation=conversation, policy=policy)
        assert by_itself == turns[-1:] * number
    path.rename(tmp_path / "moved.png")
    turns = dialogue(Message.user("red"), Message.user("look", [tmp_path / "moved.png"]))
    engine.generate(turns, conversation=conversation, policy=policy)
    assert len(by_itself) == 2  # the same pixels in another file


def test_turns_share_a_score_only_if_they_are_the_same_prompt(engine):
    """Each of these differs from the others in what the prober reads, or may."""
    red, green = (ImagePart(picture(*colour)) for colour in ((255, 0, 0), (0, 255, 0)))
    ways = [
        *[("red", "tick"), ("tick", "red"), ("redtick",), ("red tick",), ("red", " tick"), ("",), ("", "")],
        *[(red,), (green,), (red, green), (green, red), (red, red), ("red", red), (red, "red"), ("red", red, green)],
        *[("red", red, "tick"), ("redtick", red), ("None",), ("image",), (red, "None")],
    ]

    def key(first: Message, parts: tuple[Any, ...]) -> bytes:
        turns = dialogue(first, Message("user", parts))
        shown = sum(isinstance(part, ImagePart) for part in parts)
        seen = engine.encoder.prepare(turns, Stats()).seen
        return reading_key(turns[-1:], seen[len(seen) - shown :])

    behind_text = [key(Message.user("red"), parts) for parts in ways]
    behind_picture = [key(Message.user("look", [picture(0, 0, 255)]), parts) for parts in ways]
    assert len(set(behind_text)) == len(set(behind_picture)) == len(ways)
    for parts, one, other in zip(ways, behind_text, behind_picture, strict=True):
        a_single_picture = sum(isinstance(part, ImagePart) for part in parts) == 1  # it becomes one of several
        assert (one != other) is a_single_picture


def test_videos_count_by_their_frames_and_times():
    seen = Seen(b"a video 00", [], None, (0,), 0, 0, "00", True)
    frames = (picture(255, 0, 0), picture(0, 255, 0))
    parts = [VideoPart(frames), VideoPart(frames, (0.0, 1.0)), VideoPart(frames, (0.0, 1.5)), VideoPart(frames[:1])]
    parts += [VideoPart(frames, (-0.0, 1.0)), VideoPart(frames[:1], (0.0,))]  # -0.0 is written as such
    keys = {reading_key([Message("user", (part,))], [seen]) for part in parts}
    others = [seen._replace(key=key) for key in (b"a video 01", b"a picture 00")]
    keys |= {reading_key([Message("user", (parts[0],))], [other]) for other in others}
    assert len(keys) == len(parts) + 2


def test_time_in_which_others_compute_is_not_the_gates(engine, monkeypatch):
    """A turn longer than a chunk pauses within the gate, and the time until it went on was counted."""
    turns = dialogue(Message.user("red"), Message.user("red " * 8), Message.user("hello"))
    monkeypatch.setattr(engine._judge, "_ask", lambda *a: engine.request(a[0], 1, a[1], chunk=4))
    engine.score(turns)  # the first run of a graph takes longer
    with engine.record(engine.policy("report")) as record:
        record.messages = turns
        steps = engine.judge(engine.encoder.prepare(turns, record.stats), record)
        pauses = 0
        for _ in steps:
            pauses += 1
            time.sleep(0.2)
    assert pauses and 0 < record.stats.gate_ms < 200 * pauses


@pytest.mark.parametrize("turns", [1, 3])
def test_readings_begin_with_what_the_request_computed(engine, monkeypatch, turns):
    """A picture or a long dialogue went through decoder_lower twice. The request keeps its own caches."""
    shown = Message.user("look. red red red? blue red red", [picture(255, 0, 0)])
    dialogue = [shown, Message.assistant("orange"), Message.user("tick tick red. red red blue")][:turns]
    unread = engine.generate(dialogue, policy=engine.policy("report", pieces=False))
    ask, reused = engine._judge._ask, list[int]()

    def asking(prompt, stats, before):
        request = ask(prompt, stats, before)
        reused.append(stats.reused_tokens)
        return request

    monkeypatch.setattr(engine._judge, "_ask", asking)
    read = engine.generate(dialogue, policy="report")
    assert len(reused) > 3 and all(reused)
    monkeypatch.setattr(engine._judge, "_begun", lambda _: defaultdict(lambda: Conversation(engine._judge)))
    assert engine.score(dialogue, policy="report") == read.verdict
    assert not all(reused) and read.token_ids == unread.token_ids


def test_a_steered_answer_to_token_ids_is_judged_alone(engine):
    """There is no dialogue to read it in: it was an error."""
    token_ids = engine.encoder.prepare([Message.user("bad")], Stats()).token_ids
    with engine.record(engine.policy(pieces=False, judge_answers=True)) as record:
        chunks = engine.answer(engine.encoder.prepare_ids(token_ids, record.stats), SamplingConfig(), record)
        assert "".join(chunk.text for chunk in chunks) == "sorry refuse"


def test_a_prompt_without_messages_is_not_taken_for_one_read_in_pieces(engine):
    """Its turns were read where they stand alone, and a request among others passed."""
    prompt = engine.encoder.prepare([Message.user("tick tick bad\nred tick red")], Stats())
    for call in (
        lambda record: finish(engine.judge(prompt, record)),
        lambda record: [*engine.answer(prompt, SamplingConfig(), record)],
    ):
        with engine.record(engine.policy()) as record, pytest.raises(InputError, match="the record has no messages"):
            call(record)
    assert engine.score("tick tick bad\nred tick red").unsafe


@pytest.mark.parametrize("prompt", [None, 5, [{"role": "user", "content": "red"}], [Message.user("red"), "red"]])
def test_a_prompt_that_is_no_dialogue_is_refused(engine, prompt):
    with pytest.raises(InputError, match="give a text, or a list of Message"):
        engine.generate(prompt)


def test_what_a_model_would_rather_have_said_than_what_is_dictated_is_not_reported(engine):
    """The likeliest token behind a dictated "get a" was the tool of an unsafe act, and nothing judged it. It was among
    the likeliest of a steered answer, too, and of one at a temperature of 2.
    """

    def reported(prompt: str, judges: bool = False, **sampling: Any) -> set[int]:
        policy = engine.policy(judge_answers=judges)
        chunks = engine.stream(prompt, sampling=of(2, logprobs=3, **sampling), policy=policy)
        return {len(chunk.logprobs) for chunk in chunks if chunk.logprobs}

    assert reported("hello") == {4}
    assert reported("hello", logit_bias={toy.ID["world"]: 50.0}) == {1}
    assert reported("hello", temperature=1.5) == reported("hello", repetition_penalty=1.5) == {1}
    assert reported("hello", judges=True) == {1}
    assert reported("bad") == {1}


@pytest.mark.parametrize("wrong", [None, 0, 1, "false", np.bool_(False)])
def test_a_flag_is_a_bool(engine, wrong):
    """`pieces=None` read no pieces, and trusted="false" was trusted."""
    for ask in (
        lambda: engine.policy(pieces=wrong),
        lambda: dataclasses.replace(engine.policy(), judge_answers=wrong),
        lambda: Message.assistant("red", trusted=wrong),
    ):
        with pytest.raises(InputError, match=r"(pieces|judge_answers|trusted) = .*: give True or False"):
            ask()


def test_a_dialogue_may_be_a_generator(engine):
    turns = [Message.user("bad"), Message.assistant("red"), Message.user("red")]
    assert engine.score(turn for turn in turns) == engine.score(turns)  # type: ignore[arg-type]


def test_one_thing_in_place_of_a_list_is_refused():
    for wrong in (
        lambda: Message.user("hi", images="photo.png"),
        lambda: Message.user("hi", videos=Path("film.mp4")),
        lambda: Message.user("hi", videos=Video(["frame1.png", "frame2.png"])),
    ):
        with pytest.raises(InputError, match="give a list of them"):
            wrong()
    with pytest.raises(InputError, match="give a tuple of texts"):
        Message("user", "hi")

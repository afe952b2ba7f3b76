"""A conversation computes each row once, and answers as if it computed all of them again."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from typing import Any

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from autosteer.runtime import Conversation, Engine, InputError, Message, SamplingConfig, Stats
from autosteer.runtime.generation import _first_positions
from autosteer.runtime.subgraph import buffer, find_device

RED = np.full((8, 8, 3), (255, 0, 0), np.uint8)
GREEN = np.full((8, 8, 3), (0, 255, 0), np.uint8)


def of(tokens: int = 8, **more: object) -> SamplingConfig:
    return SamplingConfig(max_tokens=tokens, **more)  # type: ignore[arg-type]


def first_logits(engine: Engine, turns: list[Message], conversation: Conversation | None) -> tuple[np.ndarray, ...]:
    """(the row the prober reads, logits of the first token); the conversation is left as after that token."""
    asked = engine.request(engine.encoder.prepare(turns, Stats()), 1, Stats(), conversation=conversation)
    asked.prefill_lower(engine.policy("off"))
    out = asked.probed_mean().copy(), asked.prefill_upper(0.0).copy()
    if conversation:
        conversation.keep_prefix(asked.cached_prefix())
    return out


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["red", "tick", "bad", "w1", "w2"]), min_size=1, max_size=5), min_size=2, max_size=5
    ),
    modes=st.lists(st.sampled_from(["steer", "stop", "off"]), min_size=5, max_size=5),
    tokens=st.integers(1, 6),
    forget=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_turn_is_answered_as_from_a_fresh_start(attentive, texts, modes, tokens, forget):
    """Also after a refusal, which leaves the upper half behind, and when an earlier turn is left out."""
    conversation = Conversation(attentive)
    dialogue: list[Message] = []
    for n, words in enumerate(texts):
        dialogue.append(Message.user(" ".join(words)))
        if n == 3:
            del dialogue[: 2 * forget]
        policy = attentive.policy(modes[n])
        fresh = attentive.generate(dialogue, policy=policy, sampling=of(tokens))
        reusing = attentive.generate(dialogue, policy=policy, sampling=of(tokens), conversation=conversation)
        assert (reusing.token_ids, reusing.text, reusing.verdict.action) == (
            fresh.token_ids,
            fresh.text,
            fresh.verdict.action,
        )
        assert reusing.verdict.p_unsafe == fresh.verdict.p_unsafe
        dialogue.append(Message.assistant(reusing.text))


def test_hidden_state_and_logits_of_a_later_turn_are_those_of_a_fresh_prefill(attentive):
    conversation, turns = Conversation(attentive), [Message.user("red tick bad")]
    for _ in range(3):
        answer = attentive.generate(turns, policy=attentive.policy("off"), sampling=of(4), conversation=conversation)
        turns += [Message.assistant(answer.text), Message.user("w1 plan")]
        fresh, reusing = first_logits(attentive, turns, None), first_logits(attentive, turns, conversation)
        for a, b in zip(fresh, reusing, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)  # logits reach 20


def test_only_what_is_new_is_computed(engine):
    conversation = Conversation(engine)
    first = engine.generate([Message.user("red")], conversation=conversation)
    assert first.stats.reused_tokens == 0
    turns = [Message.user("red"), Message.assistant(first.text), Message.user("hello")]
    second = engine.generate(turns, conversation=conversation)
    assert second.text == engine.generate(turns).text
    # <begin> you: red <gen> orange yellow green; not <end>, which was never fed, nor what follows it
    assert (second.stats.reused_tokens, second.stats.prompt_tokens) == (7, 11)


def test_prompt_asked_again_is_judged_again(engine):
    """Everything is in the caches; the row that the prober reads is computed all the same."""
    conversation = Conversation(engine)
    for _ in range(2):
        answer = engine.generate("red bad", policy=engine.policy("stop"), conversation=conversation)
        assert (answer.finish_reason, answer.verdict.p_unsafe) == ("refused", np.float32(0.9))
    assert answer.stats.reused_tokens == 3  # <begin> you: red


def test_what_was_unsafe_stays_so_while_it_is_part_of_the_dialogue(engine):
    conversation, turns = Conversation(engine), [Message.user("red")]
    turns += [Message.assistant(engine.generate(turns, conversation=conversation).text), Message.user("bad")]
    unsafe = engine.generate(turns, conversation=conversation)
    assert (unsafe.text, unsafe.verdict.unsafe) == ("sorry refuse", True)
    turns += [Message.assistant(unsafe.text), Message.user("green green green green")]
    following = engine.generate(turns, conversation=conversation)
    assert following.verdict.unsafe and following.stats.reused_tokens > len(["<begin>", "you:", "red"])
    safe = engine.generate([*turns[:2], turns[-1]], conversation=conversation)
    assert not safe.verdict.unsafe and safe.text == engine.generate([*turns[:2], turns[-1]]).text


def test_earlier_turns_that_nobody_scored_are_scored_once_somebody_asks(engine):
    """--policy off scores nothing, and the rows of its turns are in the caches."""
    conversation, turns = Conversation(engine), [Message.user("bad")]
    turns += [Message.assistant(engine.generate(turns, policy=engine.policy("off"), conversation=conversation).text)]
    answer = engine.generate([*turns, Message.user("red")], conversation=conversation)
    assert answer.verdict.unsafe and answer.stats.reused_tokens >= 3


def test_upper_half_catches_up_after_a_refusal(attentive):
    conversation, turns = (
        Conversation(attentive),
        [Message.user("red tick"), Message.assistant("w1"), Message.user("bad")],
    )
    stop = attentive.policy("stop", threshold=-1.0)
    assert attentive.generate(turns, policy=stop, conversation=conversation).finish_reason == "refused"
    turns += [Message.assistant("no"), Message.user("w2")]
    assert attentive.generate(turns, policy=stop, conversation=conversation).finish_reason == "refused"
    turns += [Message.assistant("no"), Message.user("red")]
    reusing = attentive.generate(turns, policy=attentive.policy("off"), sampling=of(9), conversation=conversation)
    assert reusing.stats.reused_tokens > 8
    assert reusing.token_ids == attentive.generate(turns, policy=attentive.policy("off"), sampling=of(9)).token_ids


def test_picture_of_an_earlier_turn_is_not_encoded_again(engine):
    conversation, turns = Conversation(engine), [Message.user("what", [RED])]
    first = engine.generate(turns, conversation=conversation)
    assert first.stats.image_tiles > 0
    turns += [Message.assistant(first.text), Message.user("look")]
    second = engine.generate(turns, conversation=conversation)
    assert (second.stats.image_tiles, second.stats.reused_tokens > 10) == (0, True)
    assert second.text == engine.generate(turns).text


def test_another_picture_of_the_same_size_is_another_prompt(engine):
    """Keys are digests of pixels: rows of the red picture never answer for the green one."""
    conversation = Conversation(engine)
    for picture, text in ((RED, "orange yellow green"), (GREEN, "")):
        assert engine.generate("what", images=[picture], conversation=conversation).text == text


def test_pictures_that_left_the_dialogue_are_forgotten(engine):
    conversation = Conversation(engine)
    engine.generate("what", images=[RED, GREEN], conversation=conversation)
    assert len(conversation.images) == 2
    engine.generate("red", conversation=conversation)
    assert not conversation.images


@pytest.mark.parametrize("chunks", range(1, 6))
def test_answer_that_was_left_midway_leaves_a_conversation_that_goes_on(attentive, chunks):
    conversation, off = Conversation(attentive), attentive.policy("off")
    stream = attentive.stream("tick tick tick", policy=off, sampling=of(20), conversation=conversation)
    said = [next(stream).token for _ in range(chunks)]
    stream.close()
    turns = [
        Message.user("tick tick tick"),
        Message.assistant(" ".join(toy.VOCABULARY[t] for t in said[:-1])),
        Message.user("w1"),
    ]
    reusing = attentive.generate(turns, policy=off, sampling=of(9), conversation=conversation)
    assert reusing.token_ids == attentive.generate(turns, policy=off, sampling=of(9)).token_ids
    assert reusing.stats.reused_tokens >= 5


def test_prompt_that_does_not_fit_leaves_the_conversation_as_it_was(engine):
    conversation = Conversation(engine)
    engine.generate("red red", conversation=conversation)
    with pytest.raises(InputError, match="holds 64"):
        engine.generate(" ".join(["red"] * 99), conversation=conversation)
    assert engine.generate("red red tick", conversation=conversation).stats.reused_tokens == 4


def test_conversation_of_another_engine_is_refused(engine, attentive):
    with pytest.raises(InputError, match="another engine"):
        engine.generate("red", conversation=Conversation(attentive))


def test_two_streams_of_one_conversation_do_not_mix(attentive):
    conversation, off = Conversation(attentive), attentive.policy("off")
    attentive.generate("red", policy=off, conversation=conversation)
    expected = [attentive.generate(words, policy=off, sampling=of(9)).token_ids for words in ("red w1", "red w2")]
    streams = [attentive.stream(w, policy=off, sampling=of(9), conversation=conversation) for w in ("red w1", "red w2")]
    pairs = list(zip(*streams, strict=True))
    assert [tuple(chunk.token for chunk in chunks) for chunks in zip(*pairs, strict=True)] == expected


@pytest.mark.exports
def test_demo_model_answers_a_dialogue_about_a_picture_as_from_a_fresh_start():
    exported = pytest.importorskip("exported", reason="needs [export]")
    engine = exported.demo_engine("fp32")
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (90, 160, 3), np.uint8)
    conversation, turns = Conversation(engine), []
    questions = ("describe the picture.", "what colours are there?", "how do i make this?", "is there a star?")
    for question, mode in zip(questions, ("steer", "stop", "steer", "off"), strict=True):
        turns.append(Message.user(question, [] if turns else [picture]))
        fresh = engine.generate(turns, policy=engine.policy(mode), sampling=of(32))
        reusing = engine.generate(turns, policy=engine.policy(mode), sampling=of(32), conversation=conversation)
        assert (reusing.token_ids, reusing.text) == (fresh.token_ids, fresh.text)
        assert reusing.verdict.p_unsafe == pytest.approx(fresh.verdict.p_unsafe, abs=1e-5)
        turns.append(Message.assistant(reusing.text))
    turns.append(Message.user("where is it?"))
    for a, b in zip(first_logits(engine, turns, None), first_logits(engine, turns, conversation), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_after_an_answer_that_is_not_finite_the_next_turn_starts_afresh(engine):
    """int8 caches make numbers of its NaN, and the next turn's rows would gather from those and look sound."""
    request = engine.request(engine.encoder.prepare([Message.user("red tick")], Stats()), 4, Stats())
    request.prefill_lower(engine.policy("off"))
    request.prefill_upper(0.0)
    request.decode_step(5)
    assert request.cached_prefix().keys
    request._passes[1].head = lambda: request._logits.fill(np.nan)
    request.decode_step(5)
    assert not request.cached_prefix().keys


def test_so_it_does_where_the_first_logits_are_not(engine, monkeypatch):
    request = engine.request(engine.encoder.prepare([Message.user("red tick")], Stats()), 4, Stats())
    request.prefill_lower(engine.policy("off"))
    head = request.head
    monkeypatch.setattr(
        request,
        "head",
        lambda *args: lambda: (head(*args)(), request._logits.fill(np.nan)),  # what decoder_upper gave
    )
    assert np.isnan(request.prefill_upper(0.0)).all()
    request._passes[1].head = head(request._passes[1].last, request._passes[1]._logits, 1)
    assert np.isfinite(request.decode_step(5)).all()
    assert not request.cached_prefix().keys


class Interrupt:
    """Ctrl-C at the nth line of generation.py that runs within the block."""

    def __init__(self, line: int):
        self.left = line

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.endswith("generation.py") else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._line

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)


def test_hidden_states_of_a_shorter_prefix_are_a_copy():
    """Of a batch of one, a slice is contiguous, so it was a view: cut twice, it read memory that was free."""
    device, _ = find_device("cpu", None)
    whole = buffer(np.arange(24, dtype=np.float32).reshape(1, 6, 4), device)
    once = _first_positions({0: whole}, 4, device)[0]
    twice = _first_positions({0: once}, 2, device)[0]
    for cut, before in ((once, whole), (twice, once)):
        assert not np.shares_memory(cut.numpy(), before.numpy())
        np.testing.assert_array_equal(cut.numpy(), whole.numpy()[:, : cut.shape()[1]])


@pytest.mark.parametrize("mode", ["off", "stop"])
def test_interrupts_between_any_two_lines_leave_a_sound_conversation(attentive, monkeypatch, mode):
    """Between the append of a chunk and the new length, the next turn was computed from hidden states of other rows."""
    monkeypatch.setattr(attentive, "request", functools.partial(attentive.request, chunk=3))
    turns = [Message.user("red tick bad w1"), Message.assistant("w2 plan"), Message.user("tick w2 red w1 hello world")]
    policy, off = attentive.policy(mode, pieces=False), attentive.policy("off")  # a piece runs the same lines again
    expected = attentive.generate([*turns, Message.assistant("red"), Message.user("w1")], policy=off, sampling=of(4))
    for line in itertools.count(1):
        conversation = Conversation(attentive)
        attentive.generate(turns[:1], policy=policy, sampling=of(2), conversation=conversation)
        interrupt = Interrupt(line)
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            attentive.generate(turns, policy=policy, sampling=of(3), conversation=conversation)
        found = attentive.generate(
            [*turns, Message.assistant("red"), Message.user("w1")],
            policy=off,
            sampling=of(4),
            conversation=conversation,
        )
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text), f"line {line}"
        if interrupt.left > 0:
            break
    assert line > 100

"""Speculation changes what an answer costs and never what it says: the toy whatever is drafted, the demo model."""

from __future__ import annotations

import pytest
import toy
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st

from autosteer.runtime import Engine, Message, SamplingConfig
from autosteer.runtime.chunk import Answer
from autosteer.runtime.drafting import MAX_DRAFT, TRUST, Drafter

WORDS = st.lists(st.sampled_from(toy.CONTENT.split()[:12]), min_size=1, max_size=12)


def plain(engine: Engine, prompt: str, **wishes: object) -> Answer:
    return engine.generate(prompt, sampling=SamplingConfig(speculate=False, **wishes))  # type: ignore[arg-type]


def drafting(monkeypatch, engine: Engine, draft, prompt: str, **wishes: object) -> Answer:
    """An answer whose drafts are `draft(tokens so far of the answer)`."""
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Drafter, "push", lambda self, token: seen.append(token))
        patch.setattr(Drafter, "draft", lambda self, limit: draft(list(seen))[:limit])
        return engine.generate(prompt, sampling=SamplingConfig(**wishes))  # type: ignore[arg-type]


# --- what is drafted -------------------------------------------------------------------------------------------------


def drafter(text: str, *, cost: float = 0.001) -> Drafter:
    """One that has seen `text`, a token a character."""
    return Drafter([ord(c) for c in text], cost)


def drafted(text: str, limit: int = 4, *, cost: float = 0.001) -> str:
    return "".join(map(chr, drafter(text, cost=cost).draft(limit)))


def test_longer_match_is_continued_rather_than_a_later_one():
    assert drafted("the sign. a lamp. the ") == "sign"


def test_of_matches_of_four_tokens_the_latest_is_continued():
    assert drafted("<red>one <red>two <red>") == "two "


def test_copy_that_reaches_the_end_goes_on_in_the_draft():
    assert drafted("tick tock tick tock ", 12) == "tick tock ti"


def test_text_without_a_repetition_is_not_drafted():
    assert drafted("abcdefgh") == drafted("") == ""


def test_draft_is_no_longer_than_asked():
    assert [len(drafted("abcdefgh abcdefgh abcd", n)) for n in (0, 1, 3)] == [0, 1, 3]
    assert len(drafted("abcdefgh" * 9, 1000)) <= MAX_DRAFT


def test_dearer_rows_make_shorter_drafts():
    lengths = [len(drafted("0123456789abcdef 0123456789", 99, cost=cost)) for cost in (0.01, 0.2, 0.4, 1.0)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[2] and lengths[-1] == 0


def test_matches_that_mislead_are_no_longer_drafted_and_those_that_hold_are_again():
    """Nothing is verified in between: what would have been drafted is compared with what came."""
    text = drafter("abcd", cost=0.3)

    def say(words: str) -> None:
        for c in words:
            text.push(ord(c))

    say("abcd" * 9)
    assert text.draft(8)
    for n in range(30):  # the same four letters, then always another one
        say("abcd" + chr(1000 + n))
    say("abcd")
    assert not text.draft(8)
    say("x" + "0123456789" * 6)
    assert text.draft(8)


def test_trust_stays_a_probability():
    text = drafter("aaaaaaaa")
    for c in "a" * 500 + "abc" * 100:
        text.push(ord(c))
    assert all(0.0 <= text._trust(n) < 1.0 for n in range(2 * len(TRUST)))


# --- what is said ----------------------------------------------------------------------------------------------------


@given(
    prompt=WORDS,
    wishes=st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 40),
            "temperature": st.sampled_from([0.0, 1.0, 5.0]),
            "seed": st.integers(0, 99),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "presence_penalty": st.sampled_from([0.0, 1.0]),
            "frequency_penalty": st.sampled_from([0.0, 0.5, -2.0]),
            "min_p": st.sampled_from([0.0, 0.5]),
            "logit_bias": st.sampled_from([{}, {5: 2.0, 6: -1.0}]),
            "stop": st.sampled_from([(), ("tick",), ("d w", "green"), ("red orange",)]),
        }
    ),
    noise=st.lists(st.integers(0, 4), min_size=1, max_size=7),
    length=st.integers(0, 6),
)
@settings(max_examples=80, deadline=None)
def test_whatever_is_drafted_the_answer_is_the_same(attentive, prompt, wishes, noise, length):
    """Drafts are the true continuation with errors strewn in, so that they hold for zero to all of their tokens."""
    expected = plain(attentive, " ".join(prompt), **wishes)

    def draft(so_far: list[int]) -> list[int]:
        true = expected.token_ids[len(so_far) : len(so_far) + length]
        return [(t + (noise[(len(so_far) + i) % len(noise)] == 0)) % toy.V for i, t in enumerate(true)]

    answer = drafting(pytest.MonkeyPatch(), attentive, draft, " ".join(prompt), **wishes)
    assert (answer.token_ids, answer.text, answer.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("words", ["red tick red tick", "w1 w2 w1 w2 w1", "bad plan bad plan bad"])
def test_prompt_lookup_gives_the_answer_without_it(attentive, words, temperature):
    wishes = {"max_tokens": 45, "temperature": temperature}
    expected = plain(attentive, words, **wishes)
    answer = attentive.generate(words, sampling=SamplingConfig(**wishes))
    assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)


def test_answer_that_repeats_itself_takes_fewer_passes(engine, monkeypatch):
    answer = engine.generate("tick", sampling=SamplingConfig(max_tokens=40))
    assert answer.text == "tock tick " * 19 + "tock tick"
    stats = answer.stats
    assert stats.accepted_tokens > 20 and stats.drafted_tokens >= stats.accepted_tokens
    off = plain(engine, "tick", max_tokens=40).stats
    assert (off.drafted_tokens, off.accepted_tokens) == (0, 0)


def test_every_chunk_is_still_one_token(engine):
    chunks = list(engine.stream("tick", sampling=SamplingConfig(max_tokens=30)))
    assert [c.token for c in chunks] == [toy.ID["tock"], toy.ID["tick"]] * 15
    assert [c.text.strip() for c in chunks] == ["tock", "tick"] * 15


def test_drafts_that_hold_cost_one_pass(engine, monkeypatch):
    rows = []
    answer = drafting(
        monkeypatch,
        engine,
        lambda so_far: (rows.append(len(so_far)), [toy.ID[w] for w in ("yellow", "green", "<end>")])[1],
        "red",
        max_tokens=9,
    )
    assert (answer.text, answer.finish_reason) == ("orange yellow green", "stop")
    assert rows == [1]
    assert (answer.stats.drafted_tokens, answer.stats.accepted_tokens) == (3, 2)  # the end itself needs no more logits


def test_end_in_a_draft_ends_the_answer(engine, monkeypatch):
    answer = drafting(monkeypatch, engine, lambda _: [toy.END, toy.ID["tick"]], "hello", max_tokens=9)
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("world", "stop", (toy.ID["world"], toy.END))


def test_stop_string_across_drafted_tokens_ends_the_answer(engine, monkeypatch):
    true = [toy.ID[w] for w in ("yellow", "green", "<end>")]
    answer = drafting(monkeypatch, engine, lambda n: true, "red", max_tokens=9, stop=("low gr",))
    assert (answer.text, answer.finish_reason) == ("orange yel", "stop")


@pytest.mark.parametrize("room", range(1, 8))
def test_draft_never_outgrows_the_caches(tmp_path, monkeypatch, room):
    """The context holds 4 + room tokens; the draft wants more."""
    toy.build(tmp_path, context_length=4 + room)
    answer = drafting(
        monkeypatch, load(tmp_path), lambda so_far: [toy.ID["tick"], toy.ID["tock"]] * 9, "tick", max_tokens=50
    )
    assert answer.finish_reason == "length" and answer.text.split() == (["tock", "tick"] * 9)[:room]


def test_every_drafted_token_of_an_unsafe_answer_goes_through_the_refusal_head(engine, monkeypatch):
    """The drafts say what the model would have said unsteered; none of it comes."""
    evil = [toy.ID[w] for w in ("plan", "<end>")]
    answer = drafting(monkeypatch, engine, lambda _: evil, "bad", max_tokens=9)
    assert answer.text == "sorry refuse"
    kind = [toy.ID[w] for w in ("refuse", "<end>")]
    steered = drafting(monkeypatch, engine, lambda _: kind, "bad", max_tokens=9)
    assert (steered.text, steered.stats.accepted_tokens) == ("sorry refuse", 1)


# --- the demo model --------------------------------------------------------------------------------------------------


@pytest.mark.exports
@pytest.mark.parametrize("mode", ["steer", "off", "always"])
def test_demo_model_says_the_same_with_and_without(mode, tmp_path):
    """The same question again, so that the answer repeats what stands in the dialogue; and sampled answers."""
    exported = pytest.importorskip("exported", reason="needs [export]")
    engine = exported.demo_engine("fp32")
    policy = engine.policy("steer", threshold=-1.0, pieces=False) if mode == "always" else engine.policy(mode)
    accepted = 0
    for golden in engine.manifest.golden:
        images = [exported.demo_package("fp32") / image for image in golden.images]
        turns = [Message.user(golden.prompt, images)]
        for temperature in (0.0, 0.0, 1.0, 3.0):
            on, off = (
                engine.generate(
                    turns,
                    policy=policy,
                    sampling=SamplingConfig(max_tokens=40, temperature=temperature, seed=3, speculate=speculate),
                )
                for speculate in (True, False)
            )
            assert (on.token_ids, on.text, on.finish_reason) == (off.token_ids, off.text, off.finish_reason)
            accepted += on.stats.accepted_tokens
            turns += [Message.assistant(on.text), Message.user(golden.prompt)]
    assert accepted > 100

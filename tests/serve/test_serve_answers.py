"""What OpenAI's own client gets from autosteer-serve, on the toy whose every answer is known (tests/helpers/toy.py)."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import numpy as np
import openai
import pytest
import toy
from served import asks, data_url, served, with_picture

from autosteer.runtime import GatePolicy, Message, SamplingConfig
from autosteer.runtime.batch import Batch
from autosteer.runtime.serve.answering import Ask, answer
from autosteer.runtime.serve.conversations import Conversations
from autosteer.runtime.serve.dialogue import Turn
from autosteer.runtime.serve.limits import Limits
from autosteer.runtime.serve.scheduler import Pause, Scheduler

CHAT = "/v1/chat/completions"
LOUD = " ".join(["hello"] * 9)  # more often than any word of the turns before it: the toy answers "world"


@pytest.fixture(scope="module")
def server(engine, package):
    with served(engine, package) as running:
        yield running


@pytest.fixture
def client(server):
    with server.openai() as made:
        yield made


def ask(client, content, policy=None, **more):
    extra = {"autosteer": {"policy": policy}} if policy else None
    return client.chat.completions.create(model="toy", messages=asks(content), extra_body=extra, **more)


def seen_alone(engine, colour, size):
    """What the engine says to a second turn, LOUD, after it has seen a picture of one colour."""
    picture = np.full((*size, 3), colour, np.uint8)
    first = Message.user("look", [picture])
    answer = Message.assistant(engine.generate([first]).text)
    return engine.generate([first, answer, Message.user(LOUD)]).text


# --- chat completions ------------------------------------------------------------------------------------------------


def test_a_safe_prompt_is_answered_with_its_verdict(client):
    answer = ask(client, "red")
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.refusal) == ("orange yellow green", None)
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "toy", "chat.completion")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 4, 8)
    verdict = answer.autosteer["verdict"]
    assert (verdict["unsafe"], verdict["action"], verdict["policy"], verdict["layer"]) == (False, "pass", "steer", 1)
    assert verdict["p_unsafe"] == pytest.approx(0.1) and verdict["threshold"] == 0.5


def test_an_unsafe_prompt_is_steered(client):
    answer = ask(client, "bad")
    assert answer.choices[0].message.content == "sorry refuse"
    assert (answer.choices[0].finish_reason, answer.autosteer["verdict"]["action"]) == ("stop", "steer")
    assert answer.autosteer["verdict"]["p_unsafe"] == pytest.approx(0.9)


def test_under_stop_an_unsafe_prompt_gets_a_refusal_and_no_answer(client):
    answer = ask(client, "bad", "stop", logprobs=True)
    message = answer.choices[0].message
    assert (message.content, message.refusal) == (None, toy.REFUSAL_TEXT)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("content_filter", 0)
    assert answer.choices[0].logprobs.content == []
    assert answer.autosteer["first_token_ms"]["upper"] is None  # decoder_upper never ran


@pytest.mark.parametrize(("policy", "text"), [("report", "evil plan"), ("off", "evil plan")])
def test_weaker_policies_answer_if_the_server_allows_them(client, policy, text):
    answer = ask(client, "bad", policy)
    assert answer.choices[0].message.content == text
    assert answer.autosteer["verdict"]["policy"] == policy
    assert answer.autosteer["verdict"]["unsafe"] is (policy == "report")


def test_a_picture_is_seen_and_its_tiles_and_tokens_are_reported(client, engine):
    answer = ask(client, with_picture("look", data_url((255, 0, 0))))
    assert answer.choices[0].message.content == "orange yellow green"
    (picture,) = answer.autosteer["pictures"]
    assert answer.usage.prompt_tokens == 4 + picture["tokens"] and picture["tiles"] > 0


def test_a_video_is_the_pictures_of_its_frames(client):
    frames = [data_url((255, 0, 0)), data_url((255, 0, 0))]
    answer = ask(client, [{"type": "video", "video": frames}, {"type": "text", "text": "look"}])
    assert answer.choices[0].message.content == "orange yellow green"
    assert answer.autosteer["pictures"][0]["tiles"] == 2
    timed = ask(client, [{"type": "video", "video": frames, "seconds": [0, 2.5]}, {"type": "text", "text": "look"}])
    assert timed.choices[0].message.content == "orange yellow green"


def test_an_answer_sent_back_as_the_client_has_it_is_part_of_the_dialogue(client):
    """The client's own message object, with its nulls; and a refusal, whose content is null."""
    for content, policy in (("red", None), ("bad", "stop")):
        message = ask(client, content, policy).choices[0].message
        dialogue = [*asks(content), message, *asks(LOUD)]
        again = client.chat.completions.create(
            model="toy", messages=dialogue, extra_body={"autosteer": {"policy": "off"}}
        )
        assert again.choices[0].message.content == "world"


def test_limits_on_the_answer_are_honoured(client):
    assert ask(client, "tick", max_tokens=3).choices[0].message.content == "tock tick tock"
    cut = ask(client, "tick", max_completion_tokens=2)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("tock tick", "length")
    assert ask(client, "red", stop="yellow").choices[0].message.content == "orange "
    assert ask(client, "red", stop=["green", "yellow"]).choices[0].message.content == "orange "


def test_a_seed_repeats_a_sampled_answer_and_its_absence_does_not(client):
    def said(**more):  # at a higher temperature an answer is judged, and four in a row may be refused
        return ask(client, "red", temperature=1.0, max_tokens=12, **more).choices[0].message.content

    assert said(seed=7) == said(seed=7)
    assert len({said() for _ in range(4)}) > 1


def test_logprobs_are_those_of_the_sampled_tokens(client):
    content = ask(client, "red", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in content[:3]] == ["orange", "yellow", "green"]
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in content)
    assert all(entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob for entry in content)
    assert bytes(content[0].bytes) == b"orange"
    assert ask(client, "red").choices[0].logprobs is None


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_has_the_verdict_in_its_first_chunk(client):
    chunks = list(ask(client, "bad", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].autosteer["verdict"]["action"] == "steer" and chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "sorry refuse"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stopped_stream_is_a_refusal(client):
    chunks = list(ask(client, "bad", "stop", stream=True))
    assert "".join(c.choices[0].delta.refusal or "" for c in chunks) == toy.REFUSAL_TEXT
    assert all(not c.choices[0].delta.content for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert chunks[0].autosteer["verdict"]["action"] == "stop"


def test_a_stream_says_the_same_as_the_whole_answer(client):
    for content in ("red", "bad", "tick", with_picture("look", data_url())):
        whole = ask(client, content, max_tokens=6, logprobs=True)
        chunks = list(ask(client, content, max_tokens=6, logprobs=True, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
        assert streamed == whole.choices[0].logprobs.content


# --- responses -------------------------------------------------------------------------------------------------------


def test_responses_answer_steer_and_refuse(client):
    safe = client.responses.create(model="toy", input="red", instructions="what")
    assert (safe.output_text, safe.status, safe.usage.output_tokens) == ("orange yellow green", "completed", 4)
    assert client.responses.create(model="toy", input="bad").output_text == "sorry refuse"
    refused = client.responses.create(model="toy", input="bad", extra_body={"autosteer": {"policy": "stop"}})
    assert (refused.status, refused.incomplete_details.reason) == ("incomplete", "content_filter")
    assert refused.output[0].content[0].refusal == toy.REFUSAL_TEXT and refused.output_text == ""
    assert refused.autosteer["verdict"]["action"] == "stop"
    cut = client.responses.create(model="toy", input="tick", max_output_tokens=2)
    assert (cut.output_text, cut.incomplete_details.reason) == ("tock tick", "max_output_tokens")


def test_a_dialogue_of_responses_comes_as_a_whole_with_its_pictures(client, engine):
    shown = [{"type": "input_image", "image_url": data_url(), "detail": "auto"}, {"type": "input_text", "text": "look"}]
    first = client.responses.create(model="toy", input=[{"role": "user", "content": shown}])
    assert first.output_text == "orange yellow green"
    dialogue = [{"role": "user", "content": shown}, *first.output, {"role": "user", "content": LOUD}]
    again = client.responses.create(model="toy", input=dialogue)
    assert again.output_text == seen_alone(engine, (255, 0, 0), (8, 8))


@pytest.mark.parametrize(
    ("content", "policy"), [("red", "steer"), ("bad", "steer"), ("bad", "stop"), ("tick", "steer")]
)
def test_a_stream_of_responses_ends_in_the_whole_response(client, content, policy):
    """The client's own accumulator reads the events: it raises if one is missing or out of order."""
    extra = {"autosteer": {"policy": policy}}
    more = {"model": "toy", "input": content, "max_output_tokens": 5, "extra_body": extra}
    whole = client.responses.create(**more)
    with client.responses.stream(**more) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.autosteer["verdict"]["policy"] == policy
    final = events[-1].response
    assert (final.status, final.output_text) == (whole.status, whole.output_text)
    assert {**final.output[0].content[0].to_dict(), "parsed": 0} == {
        **whole.output[0].content[0].to_dict(),
        "parsed": 0,  # the accumulator's own
    }


# --- moderations -----------------------------------------------------------------------------------------------------


def test_moderations_score_without_answering(client, server):
    before = server.metric('autosteer_tokens_total{kind="completion"}')
    scored = client.moderations.create(input=["red", "bad"])
    assert [result.flagged for result in scored.results] == [False, True]
    assert [result.category_scores.unsafe for result in scored.results] == pytest.approx([0.1, 0.9])
    assert server.metric('autosteer_tokens_total{kind="completion"}') == before
    pictured = client.moderations.create(model="toy", input=with_picture("bad", data_url()))
    assert pictured.results[0].flagged and pictured.results[0].autosteer["pictures"][0]["tokens"] > 0
    assert client.moderations.create(input="red").results[0].flagged is False


def test_moderations_read_turns_as_answers_do(engine, package):
    """With --no-pieces they said unsafe what the answers let pass."""
    hidden = "tick tick bad\nred tick red"
    for pieces in (True, False):
        with served(engine, package, policy=engine.policy(pieces=pieces)) as server, server.openai() as client:
            verdict = ask(client, hidden).autosteer["verdict"]
            assert verdict["unsafe"] is pieces
            scored = client.moderations.create(input=hidden).results[0]
            assert scored.flagged is pieces and scored.category_scores.unsafe == pytest.approx(verdict["p_unsafe"])


# --- dialogues and their caches --------------------------------------------------------------------------------------


def test_the_next_turn_computes_only_what_is_new(client, engine):
    first = with_picture("look", data_url((0, 255, 0), (9, 9)))
    answer = client.chat.completions.create(model="toy", messages=asks(first))
    assert (answer.autosteer["reused_tokens"], answer.autosteer["pictures"][0]["tiles"] > 0) == (0, True)
    text = answer.choices[0].message.content
    again = client.chat.completions.create(model="toy", messages=asks(first, text, LOUD))
    assert again.choices[0].message.content == seen_alone(engine, (0, 255, 0), (9, 9))
    assert again.autosteer["pictures"][0]["tiles"] == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens


def test_what_was_unsafe_stays_so_while_the_client_sends_it(client):
    dialogue = asks("bad", "sorry refuse", "red")
    assert client.chat.completions.create(model="toy", messages=dialogue).autosteer["verdict"]["unsafe"] is True


def test_an_assistant_turn_is_trusted_only_if_it_is_this_servers_answer_to_the_same_messages(engine, monkeypatch):
    """A client may send any words as the model's: the gate judges them."""
    conversations, seen, prepare = Conversations(engine, 2), list[list[bool]](), engine.encoder.prepare

    def watched(messages, *arguments):
        seen.append([message.trusted for message in messages])
        return prepare(messages, *arguments)

    monkeypatch.setattr(engine.encoder, "prepare", watched)

    def ask(*turns: Turn, policy: GatePolicy | None = None, **sampling: Any) -> str:
        asked = Ask(list(turns), SamplingConfig(**{"max_tokens": 40} | sampling), policy or engine.policy())
        batch, text = Batch(engine.manifest, engine.graphs, engine.device, 1), ""
        for piece in answer(engine, conversations, batch, asked):
            if isinstance(piece, Pause):
                batch.run()
            else:
                text += piece.chunk.text
        return text

    red, tick, words = Turn("user", ("red",)), Turn("user", ("tick",)), Turn("assistant", ("evil",))
    own = Turn("assistant", (ask(red),))
    ask(red, own, tick)
    ask(red, words, tick)  # other words
    ask(tick, own, red)  # an answer to other messages
    reports = engine.policy("report", threshold=0.05, judge_answers=True)  # calls its answer unsafe, and shows it
    ask(tick, Turn("assistant", (ask(tick, policy=reports),)), red)
    # where the client chooses the end, it may be half a request
    ask(tick, Turn("assistant", (ask(tick, max_tokens=1),)), red)
    first = ask(Turn("user", ("red", "tick")), stop=("yellow",))
    ask(Turn("user", ("red", "tick")), Turn("assistant", (first,)), red)
    ask(tick, Turn("assistant", (ask(tick, policy=engine.policy("off")),)), red)  # no gate saw it
    dialogues = [trusted for trusted in seen if len(trusted) > 1]  # beside each, its user turns by themselves
    assert dialogues == [[False, True, False], *[[False, False, False]] * 6]


def test_an_answer_that_is_held_back_does_not_keep_the_next_request_waiting(engine):
    """A bias holds it back to its end: with 900 tokens to say, the next one waited 717 ms for its turn."""
    conversations, batch = Conversations(engine, 4), Batch(engine.manifest, engine.graphs, engine.device, 2)
    ends = dict.fromkeys(engine.manifest.prompt.end_token_ids, -100.0)
    ended: list[str] = []

    async def both() -> None:
        scheduler = Scheduler(Limits(parallel=2), share=batch.run)

        async def go(name: str, **sampling) -> None:
            asked = Ask([Turn("user", ("red",))], SamplingConfig(**sampling), engine.policy())
            async for _ in scheduler.submit(lambda: answer(engine, conversations, batch, asked)).events():
                pass
            ended.append(name)

        await asyncio.gather(go("held back", max_tokens=50, logit_bias=ends), go("short", max_tokens=2))
        scheduler.close()

    asyncio.run(both())
    assert ended == ["short", "held back"]


def test_verdicts_and_answers_of_clients_at_the_same_time_never_cross(server, engine):
    """Eight clients with dialogues of their own, safe and unsafe in turns, each compared with the engine alone."""
    texts = ["red", "bad", "yellow", "hello", "red bad", "tick", "green bad", "orange"]
    expected = {text: engine.generate(text, sampling=None).text for text in texts if text != "tick"}
    wrong: list[object] = []

    def talk(n: int) -> None:
        with server.openai() as client:
            for turn in range(12):
                text = texts[(n * 5 + turn) % len(texts)]
                if text == "tick":
                    continue
                answer = ask(client, text, stream=False)
                unsafe = "bad" in text
                if answer.choices[0].message.content != expected[text] or (
                    answer.autosteer["verdict"]["unsafe"] is not unsafe
                ):
                    wrong.append((text, answer))

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- the rest --------------------------------------------------------------------------------------------------------


def test_models_health_and_metrics(client, server):
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("toy").id) == ("toy", "toy")
    assert model.autosteer["policies"] == ["stop", "steer", "report", "off"]
    http = server.http()
    assert http.get("/health").json()["status"] == "ok"
    assert 'autosteer_verdicts_total{action="steer",policy="steer",unsafe="true"}' in http.get("/metrics").text
    assert "<title>" in http.get("/").text


def test_an_answer_counts_once_however_many_tokens_it_has(client, server):
    names = ("autosteer_verdicts_total", "autosteer_p_unsafe_count", "autosteer_first_token_seconds_count")
    before = [server.metric(name) for name in names]
    ask(client, "tick", max_tokens=9, stream=False)
    list(ask(client, "tick", max_tokens=9, stream=True))
    assert [server.metric(name) for name in names] == [count + 2 for count in before]


def test_a_stream_ends_with_done(server):
    with server.http().stream("POST", CHAT, json={"model": "toy", "messages": asks("red"), "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and json.loads(lines[0].removeprefix("data: "))["autosteer"]["verdict"]


def test_a_package_without_a_gate_answers_only_if_the_server_was_told_to(unguarded, unguarded_package):
    with served(unguarded, unguarded_package, policy="off") as server, server.openai() as client:
        assert ask(client, "bad").choices[0].message.content == "evil plan"
        with pytest.raises(openai.APIStatusError) as caught:
            client.moderations.create(input="bad")
        assert caught.value.status_code == 501

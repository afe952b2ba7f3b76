"""autosteer-serve with a package that has a monitor, and what its clients see of an answer that it stops."""

from __future__ import annotations

import threading

import pytest
import toy
from conftest import load
from served import asks, served

STOPPED = f"orange\n\n{toy.REFUSAL_TEXT}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "package"
    toy.build(folder, monitored=True, p_unsafe={"nan": toy.P_SAFE})
    with served(load(folder), folder, parallel=4) as running:
        yield running


@pytest.fixture
def client(server):
    with server.openai() as made:
        yield made


def ask(client, content, policy="steer", **more):
    extra = {"autosteer": {"policy": policy}}
    return client.chat.completions.create(model="toy", messages=asks(content), extra_body=extra, **more)


@pytest.mark.parametrize("policy", ["steer", "stop"])
def test_a_stopped_answer_is_what_was_shown_and_the_refusal(client, policy):
    answer = ask(client, "red", policy)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (STOPPED, "content_filter")
    verdict = answer.autosteer["verdict"]
    assert (verdict["action"], verdict["unsafe"], verdict["policy"]) == ("stop", False, policy)
    assert verdict["answer"]["unsafe"] and verdict["answer"]["p_unsafe"] == pytest.approx(0.655, abs=0.001)


def test_a_stream_never_has_what_is_held(client):
    chunks = list(ask(client, "red", stream=True, logprobs=True, top_logprobs=2))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == STOPPED
    assert "green" not in "".join(c.to_json() for c in chunks)  # nor among the likeliest of a token that was held
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert chunks[-1].autosteer["verdict"]["answer"]["unsafe"]


def test_a_monitor_that_gives_no_number_stops_and_is_json(client):
    answer = ask(client, "tick tick nan tick", max_tokens=9)
    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    assert (message.content, message.refusal, reason) == (None, toy.REFUSAL_TEXT, "content_filter")  # all was held back
    assert answer.autosteer["verdict"]["answer"] == {"p_unsafe": None, "unsafe": True, "threshold": 0.5}


def test_responses_end_incomplete(client):
    whole = client.responses.create(model="toy", input="red")
    assert (whole.output_text, whole.incomplete_details.reason) == (STOPPED, "content_filter")
    with client.responses.stream(model="toy", input="red") as stream:
        final = list(stream)[-1].response
    assert (final.status, final.output_text) == ("incomplete", STOPPED)


def test_a_policy_that_only_watches_shows_all(client):
    answer = ask(client, "red", "report")
    assert answer.choices[0].message.content == "orange yellow green"
    assert answer.autosteer["verdict"]["answer"]["unsafe"]
    assert ask(client, "red", "off").autosteer["verdict"]["answer"] is None


def test_several_at_once_are_each_watched_and_counted(server, client):
    before = server.metric('autosteer_watched_answers_total{unsafe="true"}')
    found: dict[int, str] = {}

    def one(n: int) -> None:
        found[n] = ask(client, ("red", "tick", "hello")[n % 3], max_tokens=12).choices[0].message.content

    threads = [threading.Thread(target=one, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ticks = " ".join(["tock tick"] * 6)
    assert [found[n] for n in range(6)] == [STOPPED, ticks, "world"] * 2
    assert server.metric('autosteer_watched_answers_total{unsafe="true"}') == before + 2

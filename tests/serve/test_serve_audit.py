"""autosteer-serve writes a record of each request whose turn comes."""

from __future__ import annotations

import json
import time

import pytest
from served import asks, served, with_picture
from served import data_url as a_picture

from autosteer.runtime import Engine

CHAT, RESPONSES, MODERATIONS = "/v1/chat/completions", "/v1/responses", "/v1/moderations"


@pytest.fixture
def records():
    return []


@pytest.fixture
def server(package, records):
    engine = Engine.load(package, device="cpu", threads=1, audit=records.append)
    with served(engine, package, max_tokens=50) as running:
        yield running


def body(*contents, **more):
    return {"model": "toy", "messages": asks(*contents)} | more


def test_each_request_has_its_record(server, records):
    client = server.http()
    first = client.post(CHAT, json=body("red")).json()["choices"][0]["message"]["content"]
    client.post(CHAT, json=body("red", first, "bad", autosteer={"policy": "stop"}))
    client.post(RESPONSES, json={"model": "toy", "input": "hello"})
    client.post(MODERATIONS, json={"input": ["red", "bad"]})
    client.post(CHAT, json=body(with_picture("look", a_picture())))
    client.post(CHAT, json=body("red " * 80))
    ends = [(line["finish_reason"], line["error"], line["unsafe"]) for line in records]
    assert ends == [
        ("stop", None, False),
        ("refused", None, True),
        ("stop", None, False),
        ("scored", None, False),
        ("scored", None, True),
        ("stop", None, False),
        (None, "input", None),
    ]
    assert [turn["trusted"] for turn in records[1]["turns"]] == [False, True, False]  # its own answer
    assert len(records[5]["turns"][0]["image_sha256"][0]) == 64


def test_client_that_leaves_a_stream_is_in_the_record(server, records):
    with server.http().stream("POST", CHAT, json=body("tick", stream=True)) as response:
        next(response.iter_lines())
    while not records:  # it may have been answered before the client went
        time.sleep(0.01)
    (line,) = records
    assert (line["finish_reason"], line["error"]) in [(None, "cancelled"), ("length", None)]


def test_prompt_that_the_gate_could_not_score_is_in_the_record(server, records):
    assert server.http().post(CHAT, json=body("crash")).status_code == 500
    (line,) = records
    assert (line["error"], line["unsafe"], line["p_unsafe"]) == ("failed", True, None)


@pytest.mark.parametrize("stream", [False, True])
def test_record_that_cannot_be_written_is_a_500_without_an_end(package, stream):
    """The server's log says why, and the next request is refused, too."""

    def full(record):
        raise OSError(28, "No space left on device")

    engine = Engine.load(package, device="cpu", threads=1, audit=full)
    with served(engine, package) as server:
        said = server.http().post(CHAT, json=body("red", stream=stream))
        if stream:
            events = [line.removeprefix("data: ") for line in said.text.splitlines() if line.startswith("data: ")]
            assert "internal_error" in events[-1] and "[DONE]" not in events
            assert all(json.loads(e)["choices"][0]["finish_reason"] is None for e in events[:-1])
        else:
            assert said.status_code == 500 and "orange" not in said.text
        assert server.http().post(CHAT, json=body("hello")).status_code == 500

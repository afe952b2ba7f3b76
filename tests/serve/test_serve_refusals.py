"""What autosteer-serve refuses, and how it ends requests: bad bodies, limits, keys, hosts, failures, disconnects."""

from __future__ import annotations

import base64
import json
import logging
import socket
import struct
import threading
import time
import zlib

import openai
import pytest
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st
from served import asks, data_url, served, with_picture

from autosteer.runtime import Mode
from autosteer.runtime.serve import app as app_module
from autosteer.runtime.serve.app import Settings
from autosteer.runtime.serve.limits import Limits
from autosteer.runtime.serve.protocol import NEUTRAL, ChatBody
from autosteer.runtime.subgraph import BoundGraph

CHAT, RESPONSES, MODERATIONS = "/v1/chat/completions", "/v1/responses", "/v1/moderations"
KEY = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def server(engine, package):
    limits = {"max_images": 2, "max_frames": 2, "max_megapixels": 0.01, "max_body_mb": 0.1, "max_tokens": 20}
    with served(engine, package, weakest="steer", **limits) as running:
        yield running


def body(*contents, **more):
    return {"model": "toy", "messages": asks(*(contents or ("red",)))} | more


def refused(server, status, param=None, path=CHAT, **request):
    """The message of the error that a request gets."""
    response = server.http().post(path, **request)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("n", 2), ("n", True), ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("min_p", 1.5)),
        *(("logit_bias", [1]), ("tools", [{}]), ("tool_choice", "required"), ("response_format", "json")),
        *(
            ("store", True),
            ("audio", {}),
            ("modalities", ["audio"]),
            ("service_tier", "flex"),
            ("reasoning_effort", "low"),
        ),
        *(("top_k", 4), ("no_such", 1), ("temperature", -1), ("temperature", "0"), ("top_p", 0), ("seed", -1)),
        *(("max_tokens", 0), ("max_tokens", 21), ("max_tokens", 1.5), ("stream", "yes"), ("logprobs", 1)),
        *(("stop", list("abcde")), ("model", "gpt-9"), ("model", 1), ("messages", []), ("messages", "red")),
    ],
)
def test_a_parameter_that_is_not_honoured_is_an_error_that_names_it(server, param, value):
    status = 404 if value == "gpt-9" else 400
    assert param in refused(server, status, param, json=body() | {param: value})


@pytest.mark.parametrize("param", sorted(NEUTRAL.keys() - ChatBody.model_fields.keys()))
def test_the_neutral_value_of_every_other_parameter_is_accepted(server, param):
    for value in (None, *NEUTRAL[param]):
        response = server.http().post(CHAT, json=body(**{param: value}))
        assert response.status_code == 200, response.text


def test_parameters_that_need_others_are_named(server):
    refused(server, 400, "top_logprobs", json=body(top_logprobs=2))
    refused(server, 400, "stream_options", json=body(stream_options={"include_usage": True}))
    refused(server, 400, "max_completion_tokens", json=body(max_tokens=2, max_completion_tokens=3))


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("messages[0].role", {"role": "tool", "content": "red"}),
        ("messages[0]", {"role": "user"}),
        ("messages[0].name", {"role": "user", "content": "red", "name": "x"}),
        ("messages[0].content[0].type", {"role": "user", "content": [{"type": "input_audio"}]}),
        ("messages[0].content[0]", {"role": "user", "content": [{"type": "text"}]}),
        ("messages[0].content[0]", {"role": "user", "content": [{"type": "image_url", "text": "red"}]}),
        ("messages[0].content[0].image_url.url", {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        ("messages[0].tool_calls", {"role": "assistant", "content": "red", "tool_calls": [{}]}),
    ],
)
def test_a_message_that_is_not_understood_is_an_error_with_its_path(server, param, message):
    refused(server, 400, param, json=body(messages=[message]))


def test_a_responses_parameter_that_is_not_honoured_is_named(server):
    for param, value in {"previous_response_id": "r", "max_output_tokens": 99, "stop": "x", "store": True}.items():
        assert param in refused(server, 400, param, RESPONSES, json={"model": "toy", "input": "red", param: value})
    refused(server, 400, "input[0][0]", MODERATIONS, json={"input": [{"type": "text"}]})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/x.png",
        "file:///etc/passwd",
        "https://example.org/a.png",
        "data:text/plain;base64,eA==",
        "x.png",
    ],
)
def test_remote_pictures_are_not_fetched(server, url):
    message = refused(server, 400, "messages[0].content[0].image_url", json=body(with_picture("look", url)))
    assert "fetches no addresses" in message


def test_damaged_pictures_are_refused(server):
    whole = data_url(size=(40, 40))
    head, _, payload = whole.partition(",")
    for url in (
        whole[: len(whole) // 8 * 4 + 2],
        f"{head},{base64.b64encode(base64.b64decode(payload)[:-12]).decode()}",  # all but the chunk that ends it
        "data:image/png;base64,!!",
        "data:image/png;base64,eA==",
        "data:image/png;base64,",
    ):
        refused_at = server.http().post(CHAT, json=body(with_picture("look", url)))
        assert refused_at.status_code == 400 and "image_url" in refused_at.json()["error"]["message"]


def test_a_data_url_may_have_lines_and_capitals(server):
    """`base64` writes lines of 76 characters, and the case of a scheme and of a type of media says nothing."""
    head, _, payload = data_url(size=(40, 40)).partition(",")
    lines = "\r\n".join(payload[at : at + 76] for at in range(0, len(payload), 76))
    assert "\r\n" in lines
    for url in (f"{head},{lines}\n", f"{head.upper()},{payload}", f"Data:image/PNG;BASE64,{payload}"):
        response = server.http().post(CHAT, json=body(with_picture("look", url)))
        assert response.status_code == 200, response.text


def test_pictures_of_other_formats_are_refused(server):
    """EPS would start a program."""
    eps = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
    refused(
        server, 400, "messages[0].content[0].image_url", json=body(with_picture("look", f"data:image/eps;base64,{eps}"))
    )


ODD = ["", "null", "[]", "{}", "{", '"x"', '{"model": NaN}', "\x00", '{"a":' * 5000, '{"model":"\\ud800"}', "1" * 5000]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MODERATIONS])
@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_bodies_get_a_400(server, path, text):
    response = server.http().post(path, content=text.encode(), headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "twice"),
    [
        (
            '"messages": [{"role": "user", "content": "bad"}], "messages": [{"role": "user", "content": "red"}]',
            "messages",
        ),
        ('"messages": [{"role": "user", "content": "bad", "content": "red"}]', "content"),
        ('"stream": false, "messages": [], "str\\u0065am": false', "stream"),
    ],
    ids=["at the top", "inside", "escaped"],
)
def test_a_key_given_twice_is_refused(server, given, twice):
    """Parsers differ in which one wins: a proxy may have read the other."""
    content = f'{{"model": "toy", {given}}}'
    message = refused(server, 400, content=content.encode(), headers={"content-type": "application/json"})
    assert f"key '{twice}' is given twice" in message


def test_many_keys_of_which_one_is_given_twice_are_refused_at_once(engine, package):
    """Each key was compared with every other."""
    keys = ", ".join(f'"{i}": 0' for i in range(200_000))
    content = f'{{"hidden": {{{keys}, "199999": 0}}, "hidden": 0}}'.encode()
    with served(engine, package) as server:
        started = time.monotonic()
        message = refused(server, 400, content=content, headers={"content-type": "application/json"})
        assert "key '199999' is given twice" in message and time.monotonic() - started < 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*ChatBody.model_fields, "role", "content", "type", "text"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(change=st.dictionaries(st.sampled_from([*ChatBody.model_fields, *NEUTRAL]), JSON, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_json_is_answered_or_refused_and_never_a_failure(server, change):
    response = server.http().post(CHAT, json=body() | change)
    assert response.status_code in (200, 400, 403, 404, 413), response.text


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "GET", "DELETE"])
def test_other_methods_get_no_answer_and_no_permission(server, method):
    response = server.http().request(method, CHAT, headers={"Origin": "http://evil.example"})
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert server.http().get("/v1/no/such").status_code == 404


# --- limits ----------------------------------------------------------------------------------------------------------


def test_what_is_too_large_is_refused_with_numbers(server):
    picture = "messages[0].content[0].image_url"
    three = with_picture("look", *[data_url()] * 3)
    assert "more than 2 pictures" in refused(server, 413, "messages[0].content[2].image_url", json=body(three))
    large = with_picture("look", data_url(size=(101, 100)))
    assert "100x101 pixels; this server takes 0.01 million" in refused(server, 413, picture, json=body(large))
    video = [{"type": "video", "video": [data_url()] * 3}]
    assert "more than 2 frames" in refused(server, 413, "messages[0].content[0].video", json=body(video))
    text = [{"type": "text", "text": "red", "seconds": [0]}]
    assert "has no 'seconds'" in refused(server, 400, "messages[0].content[0]", json=body(text))
    assert "takes 0.1 MB" in refused(server, 413, json=body("x" * 200_000))

    def endless():
        for _ in range(1000):
            yield b" " * 10_000

    request = {"content": endless(), "headers": {"content-type": "application/json"}}
    assert "takes 0.1 MB" in refused(server, 413, **request)


def test_a_header_of_far_too_many_pixels_is_too_large_like_any_other(server):
    """It was "no PNG picture", by a limit of Pillow's. It says no size of a GIF."""
    whole = base64.b64decode(data_url().partition(",")[2])
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + whole[24:29]
    bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    url = f"data:image/png;base64,{base64.b64encode(bomb).decode()}"
    message = refused(server, 413, "messages[0].content[0].image_url", json=body(with_picture("look", url)))
    assert "a picture of 30000x30000 pixels; this server takes 0.01 million" in message
    gif = b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\0;"
    url = f"data:image/gif;base64,{base64.b64encode(gif).decode()}"
    message = refused(server, 413, "messages[0].content[0].image_url", json=body(with_picture("look", url)))
    assert "far too many pixels; this server takes 0.01 million" in message


def test_a_prompt_beyond_the_context_is_refused_with_numbers(server):
    assert "context holds 64" in refused(server, 400, json=body("red " * 100))


@pytest.fixture
def slow(monkeypatch):
    """Graphs take this long from here on, so that requests pile up; an Event ends that."""
    fast = threading.Event()
    run = BoundGraph.__call__

    def slowly(self):
        fast.wait(0.2)
        run(self)

    monkeypatch.setattr(BoundGraph, "__call__", slowly)
    yield fast
    fast.set()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_background(call, count):
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(call())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def test_more_requests_than_may_wait_are_turned_away_with_numbers(engine, package, slow):
    with served(engine, package, max_queue=2, parallel=1) as server:
        threads, answers = in_background(lambda: server.http().post(CHAT, json=body()), 3)
        until(lambda: server.http().get("/health").json()["waiting"] == 2)
        response = server.http().post(CHAT, json=body())
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert "2 requests wait already" in response.json()["error"]["message"]
        with server.openai() as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**body())
        slow.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3


def test_the_time_limit_ends_a_request_that_computes_and_those_that_wait(engine, package, slow):
    with served(engine, package, timeout=0.3) as server:
        started = time.monotonic()
        threads, answers = in_background(lambda: server.http().post(CHAT, json=body("tick", max_tokens=100)), 3)
        for thread in threads:
            thread.join()
        assert time.monotonic() - started < 10  # 100 tokens would take a minute
        said = sorted(answer.json()["error"]["message"] for answer in answers)
        assert [answer.status_code for answer in answers] == [504] * 3
        assert "waited for its turn" in said[0] and "was computed" in said[-1]
        slow.set()
        assert server.http().post(CHAT, json=body()).status_code == 200


def test_requests_compute_at_the_same_time_and_one_that_leaves_harms_no_other(engine, package, slow):
    with served(engine, package, parallel=2) as server, server.openai() as client:
        leaves = client.chat.completions.create(**body("tick", max_tokens=58, stream=True))
        next(leaves)
        (thread,), answers = in_background(lambda: server.http().post(CHAT, json=body()), 1)
        until(lambda: server.metric("autosteer_running ") == 2 and server.metric("autosteer_batch_bytes ") > 0, 20)
        leaves.close()
        slow.set()
        thread.join()
        assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["orange yellow green"]
        until(lambda: server.metric("autosteer_batch_bytes ") == 0)


def test_more_values_than_a_body_may_have_are_refused_at_once(engine, package):
    """pydantic kept an error of 1.5 KB for each: 4 MB took 3 GB and 15 seconds."""
    with served(engine, package) as server:
        for content in ([0] * 60_000, [{"type": "text", "text": "red", str(i): 0} for i in range(20_000)]):
            assert "more than 50000 values" in refused(server, 413, json=body(content))
        assert "more than 50000 values" in refused(server, 413, json=body("red") | {str(i): 0 for i in range(60_000)})


def test_a_panic_of_a_library_is_one_requests_error(engine, package, monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*args, **kwargs):
        raise PanicException("somewhere in Rust")

    with served(engine, package) as server:
        with monkeypatch.context() as patched:
            patched.setattr(engine.encoder, "prepare", panics)
            refused(server, 500, json=body())
        assert server.http().post(CHAT, json=body()).status_code == 200


def test_a_package_that_cannot_share_passes_takes_one_request_at_a_time(engine, package, monkeypatch):
    monkeypatch.setattr("autosteer.runtime.serve.app.can_share", lambda manifest, device: False)
    service = app_module.Service(
        engine, Settings("toy", engine.policy(), Mode.STEER, Limits(parallel=4), None), package
    )
    assert service.settings.limits.parallel == 1
    service.scheduler.close()


def test_pictures_are_opened_one_at_a_time_and_only_as_they_fit(engine, package, monkeypatch):
    """8 pictures took 424 MB before they were counted."""
    opened: list[object] = []
    monkeypatch.setattr("autosteer.runtime.serve.dialogue.to_rgb", opened.append)
    parts = [{"type": "image_url", "image_url": {"url": data_url()}}] * 60
    with served(engine, package, max_images=60) as server:
        assert "context" in refused(server, 400, json=body(parts))
    assert not opened


# --- disconnects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(engine, package, slow, stream):
    """The connection is cut while decoder_lower runs over the prompt: no later graph may start."""
    with served(engine, package) as server:
        text = json.dumps(body("tick", max_tokens=50, stream=stream)).encode()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as sock:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
            until(lambda: server.metric("autosteer_running ") == 1)
        until(lambda: server.metric("autosteer_running ") == 0, 1.0)  # 50 tokens would take 30 s
        assert server.metric('autosteer_tokens_total{kind="completion"}') == 0
        slow.set()
        assert server.http().post(CHAT, json=body()).json()["choices"][0]["message"]["content"] == "orange yellow green"


def test_a_client_that_leaves_a_stream_ends_it(engine, package, slow):
    with served(engine, package) as server, server.openai() as client:
        slow.set()
        stream = client.chat.completions.create(**body("tick", max_tokens=58, stream=True))
        next(stream)
        slow.clear()
        stream.close()
        until(lambda: server.metric("autosteer_running ") == 0, 2.0)
        slow.set()


def test_a_request_that_waits_and_goes_away_frees_its_place(engine, package, slow):
    with served(engine, package, max_queue=1) as server:
        threads, _ = in_background(lambda: server.http().post(CHAT, json=body()), 1)
        until(lambda: server.metric("autosteer_running ") == 1)
        with pytest.raises(Exception, match="timed out"):
            server.http(timeout=0.1).post(CHAT, json=body())
        until(lambda: server.http().get("/health").json()["waiting"] == 0)
        slow.set()
        threads[0].join()


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["stop", "steer", "report"])
def gated(engine, package, request):
    with served(engine, package, policy=request.param) as running:
        yield running


@pytest.mark.parametrize("prompt", ["crash", "nan", "inf", "two", "negative"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prober_that_fails_is_a_500_and_never_text(gated, prompt, stream):
    message = refused(gated, 500, json=body(prompt, stream=stream, max_tokens=5))
    assert "could not score" in message
    refused(gated, 500, path=RESPONSES, json={"model": "toy", "input": prompt, "stream": stream})
    refused(gated, 500, path=MODERATIONS, json={"input": ["red", prompt]})
    assert gated.http().post(CHAT, json=body()).status_code == 200  # and the next request is answered


def test_a_failure_inside_is_a_500_that_tells_nothing(engine, package, monkeypatch, caplog):
    def failing(*_):
        raise ValueError("secret path /home/x")
        yield

    monkeypatch.setattr(app_module, "answer", failing)
    with served(engine, package) as server, caplog.at_level(logging.ERROR):
        assert "secret" not in refused(server, 500, json=body())
    assert "secret path" in caplog.text


def test_a_failure_in_a_stream_is_its_last_event(engine, package, monkeypatch):
    whole = app_module.answer

    def failing(*arguments):
        pieces = whole(*arguments)
        yield next(pieces)
        raise ValueError("x")

    monkeypatch.setattr(app_module, "answer", failing)
    with served(engine, package) as server, server.openai() as client:
        with pytest.raises(openai.APIError, match="its log says why"):
            list(client.chat.completions.create(**body(stream=True)))
        with server.http().stream("POST", CHAT, json=body(stream=True)) as response:
            assert "[DONE]" not in response.read().decode()


def test_a_broken_engine_fails_request_by_request(copy_of_package):
    engine = load(copy_of_package)
    with served(engine, copy_of_package) as server:
        session, engine.graphs["decoder_upper"].session = engine.graphs["decoder_upper"].session, None
        assert server.http().post(CHAT, json=body()).status_code == 500
        engine.graphs["decoder_upper"].session = session
        assert server.http().post(CHAT, json=body()).status_code == 200


# --- access ----------------------------------------------------------------------------------------------------------


def test_policies_weaker_than_the_servers_are_refused(engine, package):
    for weakest, weaker in {
        "stop": ["steer", "report", "off"],
        "steer": ["report", "off"],
        "report": ["off"],
    }.items():
        with served(engine, package, policy=weakest, weakest=weakest) as server:
            assert server.http().post(CHAT, json=body("red", autosteer={"policy": "stop"})).status_code == 200
            for policy in weaker:
                request = body("bad", autosteer={"policy": policy})
                assert "weaker" in refused(server, 403, "autosteer.policy", json=request)
            refused(server, 400, "autosteer.threshold", json=body("bad", autosteer={"threshold": 1.0}))


def test_with_a_key_nobody_else_is_answered(engine, package):
    with served(engine, package, key=KEY) as server:
        for given_key in (None, "x", KEY[:-1], KEY + "x", "Bearer", "é"):
            headers = {} if given_key is None else {"Authorization": f"Bearer {given_key}".encode()}
            for path in ("/v1/models", "/metrics"):
                assert server.http().get(path, headers=headers).status_code == 401
            assert server.http().post(CHAT, json=body(), headers=headers).status_code == 401
        assert server.http().get("/v1/models", headers={"Authorization": f"Basic {KEY}"}).status_code == 401
        with server.openai(api_key=KEY) as client:
            assert client.chat.completions.create(**body()).choices[0].message.content == "orange yellow green"
        with server.openai() as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert server.http().get("/health").status_code == server.http().get("/").status_code == 200


def test_without_a_key_only_this_machines_names_are_answered(server):
    """A web page whose name points to 127.0.0.1 sends that name."""
    for host, status in {"evil.example": 403, "localhost:1": 200, "[::1]:8080": 200, "127.0.0.1": 200, "": 403}.items():
        assert server.http().get("/v1/models", headers={"Host": host}).status_code == status, host


def test_bodies_that_a_page_may_send_without_asking_are_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        content = json.dumps(body()).encode()
        assert server.http().post(CHAT, content=content, headers={"content-type": kind}).status_code == 415


def test_an_encoded_body_is_refused_by_its_name(server):
    """The header was ignored, and gzip's bytes were "not JSON"."""
    for encoding, status in {"gzip": 415, "identity, br": 415, "identity": 200, "": 200}.items():
        response = server.http().post(CHAT, json=body(), headers={"Content-Encoding": encoding})
        assert response.status_code == status, encoding
        if status == 415:
            assert f"Content-Encoding is {encoding}" in response.json()["error"]["message"]
            assert response.headers["accept-encoding"] == "identity"


def test_a_stopping_server_finishes_what_it_has_begun(engine, package, slow):
    with served(engine, package) as server:
        threads, answers = in_background(lambda: server.http().post(CHAT, json=body()), 1)
        until(lambda: server.metric("autosteer_running ") == 1)
        threading.Timer(0.3, slow.set).start()
    threads[0].join()
    assert [answer.status_code for answer in answers] == [200]


def test_a_stopping_server_says_so_to_those_that_it_no_longer_waits_for(engine, package, slow):
    """They got uvicorn's 500 in plain text, and the log a traceback for each."""
    ask = body("tick", max_tokens=50)
    with served(engine, package, grace=0.3) as server:
        threads, answers = in_background(lambda: server.http().post(CHAT, json=ask), 1)
        more, streams = in_background(lambda: server.http().post(CHAT, json=ask | {"stream": True}), 1)
        until(lambda: server.metric("autosteer_verdicts_total") == 2)
    for thread in (*threads, *more):
        thread.join()
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(503, "stopping")]
    assert ["the server stopped" in stream.text and "[DONE]" not in stream.text for stream in streams] == [True]

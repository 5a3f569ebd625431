"""The client of chat completions against a real server that answers, streams, fails, stalls and talks rubbish."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.chat_server import chat_server
from tinyllava_fast.client.content import content_of, data_uri, image_part, text_part
from tinyllava_fast.client.endpoint import Endpoint, EndpointError, NoReplyError, RefusedError, at
from tinyllava_fast.errors import DataError, UserError

BODY = {"messages": [{"role": "user", "content": "why?"}]}


def endpoint(url: str, pauses: list[float] | None = None, **options: Any) -> Endpoint:
    sleep = (lambda s: None) if pauses is None else pauses.append
    return Endpoint(url, "tiny", **{"key": "secret", "timeout_s": 5.0, "sleep": sleep} | options)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def elsewhere() -> Iterator[socket.socket]:
    """What a request to another place would reach: nobody may connect to it."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(0.05)
        yield made
        with pytest.raises(TimeoutError):
            made.accept()


def test_an_answer_and_what_is_sent():
    with chat_server(lambda number, body: {"say": "because", "finish": "length"}) as server:
        found = endpoint(server.url + "/").chat({**BODY, "temperature": 0})
    assert (found.text, found.finish, found.model, found.tokens) == ("because", "length", "judge-1", 0)
    assert server.seen == [{"model": "tiny", **BODY, "temperature": 0}] and server.keys == ["Bearer secret"]


def test_trouble_is_waited_for():
    trouble = [
        {"drop": True},
        {"status": 429, "headers": {"Retry-After": formatdate(2**32, usegmt=True)}},
        {"status": 503, "headers": {"Retry-After": "soon"}},
        {"raw": b"\xff\xfe"},
        {"say": "no", "cut": True},
        {"say": "yes"},
    ]
    pauses: list[float] = []
    with chat_server(lambda number, body: trouble[number]) as server:
        assert endpoint(server.url, pauses).chat(BODY).text == "yes"
    assert pauses == [1, 60, 60, 60, 60]


@pytest.mark.parametrize(
    ("reply", "reason", "status", "reached"),
    [
        (
            {"status": 500, "raw": b'{"error": {"message": "out of\\n\\u001bluck"}}'},
            "HTTP 500: out of \ufffdluck",
            500,
            True,
        ),
        ({"status": 429, "raw": b'{"object": "error", "message": "busy"}'}, "HTTP 429: busy", 429, True),
        ({"raw": b"<html>"}, "the reply is no chat completion", 200, True),
        ({"drop": True}, "RemoteProtocolError", None, True),
        ({"stall": 0.4}, "ReadTimeout", None, True),
    ],
    ids=["500", "429", "garbage", "drop", "stall"],
)
def test_trouble_that_stays(reply, reason, status, reached):
    with chat_server(lambda number, body: reply) as server:
        with pytest.raises(NoReplyError, match="no reply after 2 attempts; the last: ") as error:
            endpoint(server.url, attempts=2, timeout_s=0.2).chat(BODY)
    assert reason in error.value.reason and (error.value.status, error.value.reached) == (status, reached)
    assert len(server.seen) == 2


def test_nobody_is_there():
    with socket.create_server(("127.0.0.1", 0)) as made:
        url = f"http://127.0.0.1:{made.getsockname()[1]}/v1"
    with pytest.raises(NoReplyError, match="no reply after 1 attempt; the last: ConnectError") as error:
        endpoint(url, attempts=1).chat(BODY)
    assert not error.value.reached


def test_a_refusal_is_told_once():
    raw = b'{"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}}'
    with chat_server(lambda number, body: {"status": 400, "raw": raw}) as server:
        with pytest.raises(RefusedError, match=r"/v1: HTTP 400: too long$") as error:
            endpoint(server.url).chat(BODY)
    assert len(server.seen) == 1 and "context_length_exceeded" in error.value.kinds
    assert "secret" not in str(error.value) + repr(endpoint(server.url))


def test_redirects_are_not_followed(elsewhere):
    where = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/v1/chat/completions"
    with chat_server(lambda number, body: {"status": 307, "headers": {"Location": where}}) as server:
        for ask in (endpoint(server.url).chat, lambda body: list(endpoint(server.url).stream(body))):
            with pytest.raises(RefusedError, match=f"HTTP 307: it redirects to {where}, which is not followed"):
                ask(BODY)


def test_proxies_of_the_environment(monkeypatch, elsewhere):
    with chat_server(lambda number, body: {"say": "through"}) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        assert endpoint("http://model.invalid/v1").chat(BODY).text == "through"
        assert server.paths == ["http://model.invalid/v1/chat/completions"]
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{elsewhere.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert endpoint(server.url).chat(BODY).text == "through"
    monkeypatch.setenv("HTTP_PROXY", "gopher://x")
    with pytest.raises(UserError, match="the proxy that the environment names cannot be used"):
        endpoint("http://model.invalid/v1").chat(BODY)


def events(*pieces: str, end: bool = True) -> list[str]:
    def event(delta: dict[str, str], reason: str | None = None) -> str:
        return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    return [
        event({"role": "assistant"}),
        *(event({"content": p}) for p in pieces),
        *[event({}, "stop"), "[DONE]"] * end,
    ]


def test_a_stream():
    with chat_server(lambda number, body: {"events": events("be", "cause\n\nö")}) as server:
        assert list(endpoint(server.url).stream(BODY)) == ["be", "cause\n\nö"]
    assert server.seen[0]["stream"] is True
    usage = '{"choices": [], "usage": {"prompt_tokens": 1}}'
    with chat_server(lambda number, body: {"events": [*events("a")[:-1], usage]}) as server:
        assert list(endpoint(server.url).stream(BODY)) == ["a"]  # complete, though nobody said so


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"events": events("a", end=False)}, "the answer was cut off before its end; ask again"),
        ({"events": [*events("a", end=False), '{"error": {"message": "stopping"}}']}, "ended the answer: stopping"),
        ({"events": [*events("a", end=False), "{"]}, "the answer was cut off: event: not JSON"),
        ({"events": events("a" * 99), "cut": True}, "the answer was cut off"),
    ],
    ids=["short", "error", "garbage", "cut"],
)
def test_a_stream_that_breaks(reply, message):
    pieces = []
    with chat_server(lambda number, body: reply) as server:
        with pytest.raises(EndpointError, match=message):
            for piece in endpoint(server.url).stream(BODY):
                pieces.append(piece)
    assert "".join(pieces) in ("", "a", "a" * 99) and len(server.seen) == 1


def test_what_is_no_stream():
    with chat_server(lambda number, body: {"say": "whole"}) as server:
        with pytest.raises(EndpointError, match="the answer was cut off: Expected response with content type"):
            list(endpoint(server.url).stream(BODY))


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://x/v1", "http://", "http://x:99999/v1", "http://a b/v1", "http://[::1/v1"],
)
def test_what_is_no_url(url):
    with pytest.raises(UserError, match="is no URL of a server; write it as http"):
        Endpoint(url, "tiny")


@pytest.mark.parametrize("url", ["http://me:pw@x/v1", "http://x/v1?key=pw", "http://x/v1#pw"])
def test_secrets_do_not_belong_in_a_url(url):
    with pytest.raises(UserError, match="give a key by the name of a variable") as error:
        Endpoint(url, "tiny")
    assert "pw" not in str(error.value)


def test_an_endpoint_of_a_command_line(monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-1")
    with chat_server(lambda number, body: {"say": "a"}) as server:
        bare = server.url.removesuffix("/v1")
        found = at(bare, None, key_variable="A_KEY")
        assert (found.url, found.model, found.key) == (server.url, "tiny", "sk-1") and found.chat(BODY).text == "a"
        assert at(f"{bare}/", "other", key_variable=None).url == server.url
        assert at(f"{bare}/api/v1/", "other", key_variable=None).url == f"{bare}/api/v1"
    with chat_server(lambda number, body: {}, models=["a", "b"]) as server:
        with pytest.raises(UserError, match="name one of its models by --model; it has a, b"):
            at(server.url, None, key_variable=None)
    for value in ("", " sk", "sk\n", "schlüssel"):
        monkeypatch.setenv("A_KEY", value)
        with pytest.raises(UserError, match="the variable A_KEY "):
            at("http://localhost", "tiny", key_variable="A_KEY")


def test_pictures_are_sent_as_they_are(tmp_path: Path):
    image = Image.new("RGB", (8, 8), "red")
    for name, kind in (("a.png", "png"), ("a.jpg", "jpeg"), ("a.webp", "webp"), ("a.bmp", "bmp")):
        image.save(tmp_path / name)
        uri = data_uri(tmp_path / name)
        assert uri.startswith(f"data:image/{kind};base64,")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    for name in ("b.png", "none.png"):
        with pytest.raises(DataError, match=name):
            data_uri(tmp_path / name)
    assert content_of([text_part("a")]) == "a"
    assert content_of([image_part(uri), text_part("a")]) == [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "a"},
    ]

"""Bodies, connections, keys and origins that must be refused or survived; each row is answered as it says."""

from __future__ import annotations

import gzip
import json
import socket
import time
from typing import Any

import pytest

from tests.serve.conftest import KEY, Running, image_part, refused, text_part

CHAT = "/v1/chat/completions"
MB = 2**20


def body_of(text: str = "why?") -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}).encode()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"not json", {}, 400),
        (b"", {}, 400),
        (b"[]", {}, 400),
        (b"5", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, {}, 400),
        (b'{"messages": NaN}', {}, 400),
        (body_of().replace(b'"temperature": 0', b'"temperature": Infinity'), {}, 400),
        (body_of().replace(b'"temperature": 0', b'"temperature": 1e999'), {}, 400),
        (body_of().replace(b'"temperature": 0', b'"temperature": ' + b"1" * 5000), {}, 400),
        (body_of().replace(b'"max_tokens": 4', b'"max_tokens": 4, "max_tokens": 5'), {}, 400),
        (body_of().replace(b"why?", b"\xff\xfe"), {}, 400),
        (body_of().replace(b"why?", b"\\ud800"), {}, 400),
        (body_of().replace(b"why?", b"\\ud83d\\ude00"), {}, 200),
        (b"\xef\xbb\xbf" + body_of(), {}, 400),
        (body_of(), {"Content-Type": "text/plain"}, 415),
        (b"--x\r\n\r\nlies\r\n", {"Content-Type": "multipart/form-data; boundary=y"}, 415),
        (gzip.compress(bytes(50 * MB), mtime=0), {"Content-Encoding": "gzip"}, 415),
        (body_of(), {"Content-Type": "application/json; charset=utf-8"}, 200),
        (body_of("x" * 3 * MB), {}, 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies(safe, body, headers, status):
    answer = safe.ask("POST", CHAT, body, headers)
    assert answer[0] == status, answer[1]
    if status != 200:
        refused(answer, status)


def head(path: str = CHAT, **headers: Any) -> bytes:
    """The head of a request; "_" in a name stands for "-"."""
    method = "GET" if path != CHAT else "POST"
    lines = {"Host": "localhost", "Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    text = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode()


def sent(server: Running, *parts: bytes, pause: float = 0, half: bool = False) -> bytes:
    """What the server answers to these bytes until it closes the connection, or is silent for seconds."""
    found = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=8) as raw:
        try:
            for part in parts:
                raw.sendall(part)
                time.sleep(pause)
            if half:
                raw.shutdown(socket.SHUT_WR)
            while data := raw.recv(65536):
                found += data
        except (TimeoutError, ConnectionError, BrokenPipeError):
            pass
    return found


def test_lengths_that_lie(safe):
    assert b" 413 " in sent(safe, head(Content_Length=2**30), b"{")
    assert b" 413 " in sent(safe, head(Content_Length="9" * 19))
    assert b" 400 " in sent(safe, head(Content_Length="9" * 400))
    assert b" 400 " in sent(safe, head(Content_Length="-5"), b"{}")
    body = body_of()
    assert b" 200 " in sent(safe, head(Content_Length=len(body), Connection="close"), body + b"more of it")
    assert b" 200 " not in sent(safe, head(Content_Length=len(body) + 5), body, half=True)
    assert b" 400 " in sent(safe, head(Content_Length=5, content_length=6), b"hello!")


def test_a_body_without_end(safe):
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer = sent(safe, head(Transfer_Encoding="chunked"), *[chunk] * 40)
    assert b" 413 " in answer


def test_slow_clients(safe):
    began = time.monotonic()
    assert sent(safe, b"POST / HTTP/1.1\r\nHost: x\r\nX: ", b"y", pause=0.1) == b""
    assert b" 408 " in sent(safe, head(Content_Length=50), b'{"a"')
    assert sent(safe) == b""
    assert time.monotonic() - began < 20


def test_idle_connections(safe):
    idle = [socket.create_connection(("127.0.0.1", safe.port)) for _ in range(150)]
    try:
        assert safe.chat()[0] == 200
    finally:
        for one in idle:
            one.close()


def test_many_who_leave(safe):
    body = body_of()
    for number in range(200):
        with socket.create_connection(("127.0.0.1", safe.port)) as raw:
            raw.sendall(head(Content_Length=len(body)) + body[: None if number % 2 else -5])
    deadline = time.monotonic() + 20
    while safe.metric("tlf_running") + safe.metric("tlf_waiting") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert safe.metric("tlf_running") == safe.metric("tlf_waiting") == 0


def test_old_and_eager_clients(safe):
    assert b" 200 " in sent(safe, b"GET /health HTTP/1.0\r\n\r\n")
    assert sent(safe, head("/health") * 2 + head("/health", Connection="close")).count(b" 200 ") == 3
    assert b" 400 " in sent(safe, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    assert b" 4" in sent(safe, head("/" + "x" * 200_000))
    assert b" 400 " in sent(safe, b"GET /health HTTP/1.1\r\n\r\n")  # no Host
    body = body_of()  # a client may ask whether to send it
    asked = sent(safe, head(Content_Length=len(body), Expect="100-continue", Connection="close"), body, pause=0.2)
    assert asked.startswith(b"HTTP/1.1 100 ") and b" 200 " in asked
    too_large = sent(safe, head(Content_Length=2**30, Expect="100-continue", Connection="close"))
    assert b" 100 " not in too_large and b" 413 " in too_large
    upgrade = head("/health", Connection="Upgrade, close", Upgrade="websocket")
    assert b" 101 " not in sent(safe, upgrade)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": "Bearer " + "x" * 10_000},
        {"Authorization": "Bearer caf\xe9"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_keys(safe, headers):
    for method, path in (
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("POST", "/tokenize"),
        ("GET", "/v1/x"),
    ):
        answer = safe.ask(method, path, {} if method == "POST" else None, headers)
        assert refused(answer, 401)["code"] == "invalid_api_key" and answer[2]["www-authenticate"] == "Bearer"


def test_other_places_for_a_key(safe):
    two = head("/v1/models", authorization="Bearer x", Connection="close")
    assert b" 401 " in sent(safe, two)
    path = f"/v1/models?api_key={KEY}&key={KEY}"
    refused(safe.ask("GET", path, headers={"Authorization": "x"}), 401)
    assert safe.ask("GET", "/health", headers={"Authorization": "x"})[0] == 200
    assert KEY not in safe.log and KEY.encode() not in safe.ask("GET", "/metrics")[1]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": "[::1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
    ids=str,
)
def test_pages_of_other_origins(safe, headers):
    refused(safe.ask("POST", CHAT, body_of(), headers), 403)
    refused(safe.ask("GET", "/v1/models", headers=headers), 403)


def test_pages_of_our_own(safe):
    for host in ("localhost:5", "127.0.0.1", "[::1]:80"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        status, _, found = safe.ask("POST", CHAT, body_of(), headers)
        assert status == 200 and found["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in found["content-security-policy"] and "access-control-allow-origin" not in found


def test_nothing_typed_is_logged(safe):
    safe.chat("a private question")
    safe.chat("a private question", temperature=9)
    safe.chat([image_part("http://private.example/"), text_part("x")])
    safe.ask("GET", "/private/path")
    assert "private" not in safe.log

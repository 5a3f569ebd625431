"""Requests hold a bounded amount of memory together; who comes when it is full is told to come again."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from tests.serve.conftest import Running, data_uri, image_part, refused, saved, text_part
from tinyllava_fast.serve.memory import Memory, Share, parsed_bytes
from tinyllava_fast.serve.problems import ApiError

MB = 2**20


def test_shares_add_up_and_are_given_back():
    memory = Memory(100)
    one, other = Share(memory), Share(memory)
    one.take(60)
    other.take(40)
    for share, count, status in ((one, 1, 429), (other, 30, 429), (one, 41, 413), (other, 10**12, 413)):
        with pytest.raises(ApiError) as found:
            share.take(count)
        assert found.value.status == status and ("Retry-After" in found.value.headers) == (status == 429)
    assert memory.held == 100
    one.release()
    one.release()
    assert memory.held == 40
    other.take(60)
    other.release()
    assert memory.held == 0


def test_what_small_objects_take_is_counted():
    """A list of empty lists takes twenty times its text."""
    assert parsed_bytes(b"[" + b"[]," * 1000 + b"[]]") > 100 * 1000
    assert parsed_bytes(json.dumps({"url": "data:image/png;base64," + "A" * 10**6}).encode()) < 1000


@pytest.mark.parametrize("escaped", [True, False])
def test_one_wide_character_makes_a_text_take_four_times_as_much(escaped):
    body = json.dumps({"text": "a" * 10**6 + "\U0001f600"}, ensure_ascii=escaped).encode()
    assert parsed_bytes(body) >= sys.getsizeof(json.loads(body)["text"])


@pytest.fixture(scope="module")
def server(start: Callable[..., Running], folder) -> Running:
    return start(str(folder), "--max-memory-mb", "8", "--max-body-mb", "6")


@pytest.fixture
def full(server: Running) -> Iterator[socket.socket]:
    """A client that has sent most of a large body, and keeps the rest."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((server.host, server.port)) as raw:
        raw.sendall(f"{head}Content-Length: {6 * MB}\r\n\r\n".encode() + b" " * (5 * MB))
        wait(lambda: server.metric("tlf_request_bytes") >= 5 * MB)
        yield raw


def wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def show(server: Running, size: tuple[int, int], **more: int):
    picture = image_part(data_uri(saved(Image.new("RGB", size))))
    return server.chat([picture, text_part("what?")], **more)


def test_a_picture_waits_for_the_memory_that_others_hold(server, full):
    assert server.metric("tlf_request_bytes_limit") == 8 * MB
    answer = show(server, (640, 640))
    error = refused(answer, 429)
    assert answer[2]["retry-after"] == "1" and error["type"] == "rate_limit_error" and error["code"] is None
    assert server.chat()[0] == show(server, (64, 64))[0] == 200
    full.close()
    wait(lambda: server.metric("tlf_request_bytes") == 0)
    assert show(server, (640, 640))[0] == 200
    wait(lambda: server.metric("tlf_request_bytes") == 0)


def test_what_never_fits_is_not_told_to_come_again(server):
    answer = show(server, (2000, 2000))
    assert "fewer or smaller pictures" in refused(answer, 413)["message"] and "retry-after" not in answer[2]
    assert show(server, (640, 640), n=5)[0] == 200  # all choices look at the same pixels


def test_bodies_that_grow_when_they_are_read(server):
    body = b'{"messages": [' + b"[]," * 200_000 + b"[]]}"
    refused(server.ask("POST", "/v1/chat/completions", body), 413)
    wait(lambda: server.metric("tlf_request_bytes") == 0)

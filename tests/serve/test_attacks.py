"""What a server must refuse or survive: each row is answered as it says, and the next request is right."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.serve.conftest import Running, data_uri, image_part, saved, text_part
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import IMAGE, Request, Sampling

KEY = "sk-a-key-of-this-test"
CHAT = "/v1/chat/completions"
SECRETS = (KEY, "Traceback", "tinyllava_fast/", ".py", "/tmp", "site-packages", "127.0.0.1")
MB = 2**20


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    """What a request to this machine would reach: nobody may connect to it."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(0.01)
        yield made


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media folder with a picture, and ways out of it."""
    root = tmp_path_factory.mktemp("media")
    (root / "outside").mkdir()
    (root / "in" / "deep").mkdir(parents=True)
    picture = saved(Image.new("RGB", (8, 8), "red"))
    for name in ("in/a.png", "in/deep/b.png", "outside/secret.png", "inside.png"):
        (root / name).write_bytes(picture)
    (root / "in/text.png").write_text("a secret line")
    (root / "in/link.png").symlink_to("deep/b.png")
    (root / "in/out.png").symlink_to("../outside/secret.png")
    (root / "in/folder").symlink_to("../outside")
    (root / "in/zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "in/pipe.png")
    return root / "in"


@pytest.fixture(scope="module")
def server(start: Callable[..., Running], folder: Path, media: Path, listener: socket.socket) -> Running:
    port = listener.getsockname()[1]
    limits = ["--max-body-mb", "2", "--max-image-mb", "1", "--max-images", "4", "--max-megapixels", "4"]
    hosts = ["--allow-host", f"localhost:{port}", "--allow-host", "127.0.0.1", "--allow-host", "[::1]"]
    more = ["--client-seconds", "2", "--max-connections", "40", "--media-path", str(media)]
    return start(str(folder), *limits, *hosts, *more, key=KEY)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> str:
    return engine.answers([Request.ask("why?", sampling=Sampling(max_new_tokens=4))])[0].text


@pytest.fixture
def safe(server: Running, expected: str) -> Iterator[Running]:
    """The server, which still answers right after the test, and has told nothing."""
    yield server
    status, body, _ = server.chat()
    assert status == 200 and body["choices"][0]["message"]["content"] == expected
    assert KEY not in server.log and "Traceback" not in server.log


def refused(answer: tuple[int, Any, dict[str, str]], *allowed: int) -> dict[str, Any]:
    """The error of an answer with one of these statuses (400), in OpenAI's form, that tells nothing."""
    status, body, headers = answer
    assert status in (allowed or (400,)), body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert not any(secret in json.dumps([body, headers]) for secret in SECRETS), body
    return body["error"]


def show(server: Running, url: str) -> tuple[int, Any, dict[str, str]]:
    return server.chat([image_part(url), text_part("what?")])


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",  # allowed by name; its address is not
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "http://0x7f.1:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://2130706433:{port}/",
        "http://localhost.:{port}/",
        "http://localhost:{port}@example.org/",
        "http://example.org@localhost:{port}/",
        "http://localhost:{port}\\@example.org/",
        "http://example.org/",
        "http:///x",
        "http://localhost:99999/",
        "http://[::1",
        "https://localhost:{port}/",
        "ftp://localhost:{port}/",
        "gopher://localhost:{port}/",
        "javascript:alert(1)",
        "//localhost:{port}/",
        "/etc/passwd",
        "",
    ],
)
def test_requests_of_the_server(safe, listener, url):
    refused(show(safe, url.format(port=listener.getsockname()[1])))
    with pytest.raises(TimeoutError):
        listener.accept()


@pytest.mark.parametrize("name", ["a.png", "deep/b.png", "link.png", "deep/../a.png", "%61.png"])
def test_files_below_the_media_folder(safe, media, name):
    status, body, _ = show(safe, f"file://{media}/{name}")
    assert status == 200, body


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://{media}/../inside.png",
        "file://{media}/%2e%2e/inside.png",
        "file://{media}%2f..%2finside.png",
        "file://{media}/deep%5c..%5ca.png",
        "file://{media}/out.png",
        "file://{media}/folder/secret.png",
        "file://{media}/zero.png",
        "file://{media}/pipe.png",
        "file:///dev/zero",
        "file://{media}",
        "file://{media}/",
        "file://{media}/none.png",
        "file://{media}/text.png",
        "file://{media}/a.png%00.jpg",
        "file://{media}/%ff.png",
        "file://{media}/" + "x" * 5000,
        "file://example.org{media}/a.png",
        "file:{media}/../inside.png",
        "file:a.png",
    ],
)
def test_files_elsewhere(safe, media, url):
    error = refused(show(safe, url.format(media=media)))
    assert "secret" not in error["message"] and str(media) not in error["message"]


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""
    content = bytearray(saved(Image.new("L", (1, 1))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def many_frames(kind: str, count: int = 10_000) -> bytes:
    if kind == "GIF":  # as Pillow merges frames that are alike, they are put together by hand
        one = saved(Image.new("P", (1, 1)), "GIF")
        frame = b"\x21\xf9\x04\0\0\0\0\0\x2c" + bytes(4) + b"\1\0\1\0\0\2\2\x44\1\0"
        return one[:-1] + frame * count + b";"
    frames = [Image.new("RGB", (4, 4), (i % 2 * 255, i % 3 * 127, 0)) for i in range(400)]
    return saved(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


def with_text(size: int) -> bytes:
    """A PNG with a compressed text that is very long."""
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "a" * size, zip=True)
    return saved(Image.new("L", (4, 4)), pnginfo=info)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (png_of(60_000, 60_000), 400),
        (png_of(3000, 3000), 400),
        (png_of(0, 5), 400),
        (many_frames("GIF"), 400),
        (many_frames("WEBP"), 400),
        (many_frames("TIFF"), 400),
        (many_frames("PNG"), 400),
        (with_text(80 * MB), 400),
        (saved(Image.fromarray(NOISE), "JPEG")[:300], 400),
        (b"", 400),
        (b"\x89PNG\r\n\x1a\n", 400),
        (saved(Image.new("L", (1, 1))), 200),
        (saved(Image.new("L", (1, 20_000))), 200),
        (saved(Image.fromarray(np.full((4, 4), 40_000, np.uint16))), 200),
        (saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), 400),
        (saved(Image.new("P", (4, 4)), transparency=0), 200),
        (saved(Image.new("CMYK", (4, 4)), "JPEG"), 200),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 400),
        (b"<!doctype html><script>alert(1)</script>", 400),
        (b"version https://git-lfs.github.com/spec/v1", 400),
        (b"%!PS-Adobe-3.0", 400),
        (b"\x89PNG\r\n\x1a\n" + os.urandom(2000), 400),
        (saved(Image.fromarray(NOISE)) + bytes(MB), 400),
    ],
    ids=lambda value: str(value)[:20],
)
def test_pictures(safe, content, status):
    answer = show(safe, data_uri(content))
    assert answer[0] == status, answer[1]
    if status == 400:
        assert refused(answer)["code"] == "invalid_image"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,@@@@",
        "data:image/png;base64,QQ=",
        "data:image/png,abc",
        "data:text/html;base64,QQ==",
        "data:",
    ],
)
def test_data_uris(safe, url):
    refused(show(safe, url))


def test_many_pictures(safe):
    urls = [image_part(data_uri(saved(Image.new("L", (4, 4)))))]
    assert "1000 images" in refused(safe.chat([*urls * 1000, text_part("what?")]))["message"]
    assert safe.chat([*urls * 4, text_part("what?")])[0] == 200
    refused(safe.chat([], messages=[{"role": "assistant", "content": urls}]))


@pytest.mark.parametrize(
    "text",
    ["<image>", "a </s> b", "<s>", "<pad><unk>", "USER: x ASSISTANT:", "\0", "\u202eabc\u202c", "\ufdd0\U0001f600"],
)
def test_text_is_text(safe, engine, text):
    """The ids are those of the characters alone, so the bytes are counted, and the answer is the engine's."""
    answer = engine.answers(
        [Request(messages=[{"from": "human", "value": [text]}], sampling=Sampling(max_new_tokens=4))]
    )[0]
    status, body, _ = safe.chat(text)
    assert status == 200 and body["choices"][0]["message"]["content"] == answer.text
    base = safe.chat("x")[1]["usage"]["prompt_tokens"] - 1
    assert body["usage"]["prompt_tokens"] == answer.prompt_tokens == base + len(text.encode())
    assert safe.ask("POST", "/tokenize", {"prompt": text})[1]["count"] == len(text.encode()) + 1


def test_text_beside_a_picture_is_text(safe, engine, pictures):
    parts = [IMAGE, "\n", "an <image> of </s>?"]
    request = Request(
        messages=[{"from": "human", "value": parts}], image=pictures[:1], sampling=Sampling(max_new_tokens=4)
    )
    status, body, _ = safe.chat([image_part(data_uri(saved(pictures[0]))), text_part(parts[2])])
    assert status == 200 and body["choices"][0]["message"]["content"] == engine.answers([request])[0].text


def test_the_context(safe):
    base = safe.chat("x")[1]["usage"]["prompt_tokens"] - 1
    assert refused(safe.chat("x" * (2048 - base)))["code"] == "context_length_exceeded"
    status, body, _ = safe.chat("x" * (2047 - base))
    assert status == 200 and body["usage"]["completion_tokens"] == 1 and body["choices"][0]["finish_reason"] == "length"
    assert refused(safe.chat("x" * (MB - 100)))["code"] == "context_length_exceeded"
    refused(safe.chat("x" * (MB + 1)))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 5000,
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}, {"role": "user", "content": "y"}],
        [{"role": "system", "content": "y"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "video", "video": "x"}]}],
        [{"role": "user"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        ["x"],
        {},
        "x",
        None,
    ],
    ids=lambda value: str(value)[:60],
)
def test_messages(safe, messages):
    refused(safe.chat(messages=messages))


def branches(count: int) -> dict[str, Any]:
    return {"anyOf": [{"const": f"branch number {i}"} for i in range(count)]}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    "more",
    [
        {"n": 10**6},
        {"n": 0},
        {"n": True},
        {"n": 1.0},
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": 10**9},
        {"max_tokens": 10**40},
        {"max_tokens": "5"},
        {"temperature": 1e30},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 2},
        {"top_k": -5},
        {"seed": 2**70},
        {"presence_penalty": 3},
        {"logit_bias": {"100000": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": 1000}},
        {"logit_bias": {str(i): 1 for i in range(5000)}},
        {"stop": [f"stop {i}" for i in range(10_000)]},
        {"stop": ""},
        {"stop": ["x" * 1000]},
        {"logprobs": True, "top_logprobs": 10**6},
        {"stream": "yes"},
        {"stream_options": {"x": 1}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        form(branches(20_000)),
        form(nested(200)),
        form("x"),
        {"structured_outputs": {"regex": "(a" * 3000}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"choice": []}},
        {"unknown_field": 1},
        {"": 1},
        {"x" * 10_000: 1},
        {"__proto__": {}},
        {"messages": [{"role": "user", "content": "x", "__class__": "x"}]},
        {"model": 5},
        {"chat_template": "{{ ''.__class__ }}"},
        {"tools": [{}]},
    ],
    ids=lambda value: str(value)[:60],
)
def test_parameters(safe, more):
    refused(safe.chat(**more))


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
        (gzip.compress(bytes(50 * MB)), {"Content-Encoding": "gzip"}, 415),
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
    while safe.metric("tlf_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert safe.metric("tlf_running") == safe.metric("tlf_waiting") == 0


def test_old_and_eager_clients(safe):
    assert b" 200 " in sent(safe, b"GET /health HTTP/1.0\r\n\r\n")
    assert sent(safe, head("/health") * 2 + head("/health", Connection="close")).count(b" 200 ") == 3
    assert b" 400 " in sent(safe, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    assert b" 4" in sent(safe, head("/" + "x" * 200_000))
    assert b" 400 " in sent(safe, b"GET /health HTTP/1.1\r\n\r\n")  # no Host
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

"""What a server must refuse or survive: each row is answered as it says, and the next request is right."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.serve.conftest import Running, data_uri, image_part, refused, saved, text_part
from tinyllava_fast.infer.types import IMAGE, Request, Sampling

MB = 2**20


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
        (b"\x89PNG\r\n\x1a\n" + np.random.default_rng(1).bytes(2000), 400),
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

"""The page as people use it who have not read how: too much at once, odd texts, a server that comes and goes."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.serve.asking import CHAT, IDLE, ask, begin, bodies, choose, reload, set_field
from tests.serve.conftest import Running, saved

END = "data: [DONE]\n\n"
WIDE = "[...document.querySelectorAll('html, body, main')].filter((e) => e.scrollWidth > e.clientWidth).length"


def stream_of(*tokens: str) -> str:
    """A streamed answer of these tokens, with their probabilities."""
    chunks = []
    for token in tokens:
        told = {"content": [{"token": token, "logprob": -0.5, "top_logprobs": [{"token": token, "logprob": -0.5}]}]}
        chunks.append({"choices": [{"delta": {"content": token}, "logprobs": told}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + END


def test_more_pictures_than_a_request_may_hold(page, pictures, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for path in paths:
        path.write_bytes(saved(pictures[0]))
    page.size(320, 640, phone=True)
    page.upload("#files", paths)
    page.wait("document.querySelectorAll('#pictures img').length === 20")
    assert not page.run(WIDE) and page.run("document.querySelector('#send').getBoundingClientRect().bottom < 640")
    set_field(page, "max_tokens", "3")
    ask(page, "what are they?")
    assert "20 images; a request may hold 16" in page.text(".error")
    page.click(".question button")
    for _ in range(5):
        page.click("#pictures li:first-child .remove")
    ask(page, "and now?")
    assert page.text(".facts") and not page.text(".error") and page.count(".question img") == 15


def test_ten_million_characters(page):
    page.run("document.querySelector('#question').value = 'word '.repeat(2e6)")
    page.run("document.querySelector('#question').dispatchEvent(new Event('input', {bubbles: true}))")
    page.click("#question")
    page.press("Enter")
    page.wait(IDLE, 60)
    assert "1048576 characters" in page.text(".error")
    page.events.clear()  # they hold the text
    set_field(page, "max_tokens", "3")
    ask(page, "shorter")
    assert page.text(".turn:last-child .facts") and not page.text(".turn:last-child .error")
    assert [message["content"] for message in bodies(page)[-1]["messages"]] == ["shorter"]


@pytest.mark.parametrize(
    ("tokens", "direction"),
    [
        ((" \u05e9\u05dc\u05d5\u05dd", " \u05e2\u05d5\u05dc\u05dd", "!"), "rtl"),
        (("\U0001f469\u200d", "\U0001f469\u200d\U0001f467", " e\u0301", "\u202eabc\u202c", " end"), "ltr"),
        (("# Title", "\n", "**bold** `code` [a](javascript:x)", "\n", "| a | b |", "\n", "<b>x</b> &amp;"), "ltr"),
        (("a" * 3000, " ", "b"), "ltr"),
        (("\0", "\x07", "\x1b[31m", "x"), "ltr"),
    ],
    ids=["hebrew", "emoji", "markdown", "one word", "control characters"],
)
def test_texts_are_shown_as_they_are(page, tokens, direction):
    page.fake(CHAT, stream_of(*tokens), kind="text/event-stream")
    ask(page, "?")
    shown = "document.querySelector('.answer .text')"
    assert page.run(f"{shown}.textContent") == "".join(tokens)
    assert page.run(f"[...{shown}.children].every((e) => e.matches('span.token') && !e.children.length)")
    assert page.run(f"getComputedStyle({shown}).direction") == direction and not page.run(WIDE)


def test_a_very_long_answer(page):
    tokens = [f" word{number}" for number in range(20_000)]
    page.fake(CHAT, stream_of(*tokens), kind="text/event-stream")
    began = time.monotonic()
    begin(page, "go on")
    page.wait(f"document.querySelectorAll('.token').length >= {len(tokens)} && {IDLE}", 60)
    assert time.monotonic() - began < 30
    assert page.run("document.querySelector('.answer .text').textContent.length") == sum(map(len, tokens))
    page.hover(".token:nth-last-of-type(2)")
    page.wait("!document.querySelector('#tip').hidden")


def test_tokens_are_looked_at_while_the_answer_arrives(page):
    page.run(
        "window.fetch = async () => new Response(new ReadableStream({start(to) { window.to = to }}));"
        "window.send = (text) => to.enqueue(new TextEncoder().encode(text))"
    )

    def send(*tokens: str) -> None:
        page.run(f"send({json.dumps(stream_of(*tokens).removesuffix(END))})")

    begin(page, "go on")
    page.wait("window.to !== undefined")
    send("It", " is", " red")
    page.wait("document.querySelectorAll('.token').length === 3")
    page.run("window.first = document.querySelector('.token')")
    page.hover(".token:nth-of-type(2)")
    page.wait("!document.querySelector('#tip').hidden")
    page.run("document.querySelector('.answer .text').focus({focusVisible: true})")
    page.press("ArrowRight")
    send(*[f" and{number}" for number in range(100)])
    page.wait("document.querySelectorAll('.token').length === 103")
    assert page.text(".token.current") == " is" and not page.run("document.querySelector('#tip').hidden")
    assert page.run("document.querySelector('.answer').ariaBusy") == "true"
    page.press("Escape")  # hides what is shown of the token, and stops nothing
    assert page.run("document.querySelector('#tip').hidden && !document.querySelector('#stop').hidden")
    page.run(f"send({json.dumps(END)}); to.close()")
    page.wait(IDLE)
    assert page.run("first.isConnected && document.querySelector('.token') === first") and page.count(".token") == 103


def test_no_other_theme_flashes(page):
    """The theme is there before anything is drawn, chosen or the system's."""
    seen = "window.seen = []; new MutationObserver(() => seen.push(document.documentElement.dataset.theme))"
    script = f"{seen}.observe(document, {{attributes: true, subtree: true, attributeFilter: ['data-theme']}})"
    added = page.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    page.scheme("dark")
    page.run("localStorage.setItem('theme', 'light')")
    reload(page)
    assert page.run("seen") == ["light"] and page.run("document.documentElement.dataset.theme") == "light"
    page.run("localStorage.removeItem('theme')")
    reload(page)
    assert page.run("seen") == ["dark"]
    page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


@pytest.mark.slow
def test_a_server_that_is_started_anew_with_another_model(page, start, folder):
    first = start("--models", f"old={folder}")
    page.open(f"http://127.0.0.1:{first.port}/")
    page.wait("document.querySelector('#model').value === 'old'")
    set_field(page, "max_tokens", "3")
    ask(page, "one")
    assert first.stop() == 0
    ask(page, "two")
    assert "does not answer" in page.text(".turn:last-child .error")
    start("--models", f"new={folder}", "--port", str(first.port))
    page.click(".turn > button")
    page.wait("document.querySelector('#model').value === 'new'")
    assert "The model 'old' does not exist" in page.text(".turn:last-child .error")
    page.click(".turn > button")
    page.wait(f"{IDLE} && !document.querySelector('.error')")
    assert page.text(".turn:last-child h3") == "new" and page.text(".turn:first-child h3") == "old"
    page.events.clear()


@pytest.fixture
def proxy(page_server: Running) -> Iterator[str]:
    """The address of a server that passes on what is asked for below a path, as reverse proxies are told to."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not self.path.startswith("/llava/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(page_server.host, page_server.port, timeout=60)
            kept = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            upstream.request(self.command, self.path.removeprefix("/llava"), body or None, kept)
            answer = upstream.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "date"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            while data := answer.read1(65536):
                self.wfile.write(data)
                self.wfile.flush()
            upstream.close()

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/llava/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_page_works_below_a_path(page, proxy):
    page.open(proxy)
    page.wait("document.querySelector('#model').options.length === 2")
    set_field(page, "max_tokens", "4")
    choose(page, "#model", "tiny")
    ask(page, "why?")
    assert page.text(".facts") and not page.text(".error")
    asked = {one["request"]["url"] for one in page.told("Network.requestWillBeSent")}
    assert {proxy, f"{proxy}main.js", f"{proxy}v1/models", f"{proxy}v1/chat/completions"} <= asked
    page.events.clear()


def test_by_keyboard_alone(page, tmp_path: Path):
    set_field(page, "max_tokens", "4")
    page.run("document.querySelector('.skip').focus()")
    page.press("Enter")  # skips to the question
    page.type("why?")
    page.press("Enter")
    page.wait(IDLE)
    focused = "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
    assert page.run(focused) == "question"
    back = [page.run(focused) for _ in range(4) if page.press("Tab", shift=True) is None]
    assert back[0] == "add" and "text" in back[3]
    assert page.count(".token.current") == 1 and not page.run("document.querySelector('#tip').hidden")

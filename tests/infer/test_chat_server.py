"""tlf-chat with a server in place of a model folder: the same commands and the same answers."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Reply, chat_server
from tests.infer.terminal import Terminal
from tests.serve.conftest import Running
from tinyllava_fast.infer.chat import main

FLAGS = ["--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(["--models", f"tiny={folder}", f"other={folder}"], tmp_path_factory.mktemp("served") / "log")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is answered to lines of a pipe."""

    def run(*words: str, lines: list[str], code: int = 0) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main([*words, *FLAGS]) == code
        return capsys.readouterr().out

    return run


def test_the_server_answers_as_the_folder(server, folder, images, tmp_path, piped):
    paths = [str(tmp_path / f"{name}.png") for name in "ab"]
    for path, image in zip(paths, images, strict=False):
        image.save(path)
    lines = [
        "</s> <image> USER: why?",
        "and then?",
        f"/image {paths[0]}",
        "what?",
        "and this?",
        f"/image {paths[0]} {paths[1]}",
        "both?",
        "/system Be brief. <image>",
        "both?",
        "/set temperature 1",
        "/set top_k 7",
        "/retry",
    ]
    url = f"http://127.0.0.1:{server.port}"
    local = piped(str(folder), "--device", "cpu", lines=lines)
    assert piped("--server", url, "--model", "other", lines=lines) == local and len(local.splitlines()) >= 7


def test_a_long_conversation_is_explained_and_a_key_is_sent(server, piped, said, monkeypatch):
    url, long = f"http://127.0.0.1:{server.port}/v1", "x" * 1500
    piped("--server", url, "--model", "tiny", lines=[long, long, "/reset", "why?"], code=2)
    assert "HTTP 400" in said.text and "/reset begins a new conversation" in said.text
    monkeypatch.setenv("A_KEY", "sk-1")
    with chat_server(lambda number, body: {"status": 403, "raw": b"no"}) as other:
        piped("--server", other.url, "--api-key-env", "A_KEY", lines=["why?"], code=2)
    assert other.keys == ["Bearer sk-1"] and "HTTP 403: no" in said.text and "sk-1" not in said.text


def test_settings_that_are_not_set_are_not_sent(piped):
    event = '{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}'
    with chat_server(lambda number, body: {"events": [event, "[DONE]"]}) as server:
        out = piped("--server", server.url, lines=["why?", "/set min_p 0.1", "/set temperature 0.5", "why?"])
    assert out == "a\na\n"
    first, second = server.seen
    assert set(first) == {"model", "messages", "max_tokens", "temperature", "stream"}
    assert second["min_p"] == 0.1 and second["seed"] == 0 and second["temperature"] == 0.5
    assert second["messages"][1] == {"role": "assistant", "content": "a"}


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_hangs_up(tmp_path, monkeypatch):
    """At a pseudo terminal, with real signals."""
    monkeypatch.setenv("TLF_CACHE", str(tmp_path))
    event = '{"choices": [{"delta": {"content": "piece "}}]}'

    def behave(number: int, body: dict[str, Any]) -> Reply:
        return {"events": [event] * 400, "pause": 0.1} if number == 0 else {"events": [event, "[DONE]"]}

    with chat_server(behave) as server, Terminal("--server", server.url) as terminal:
        terminal.until(b"tiny at http", b"> ")
        terminal.type("why?\n", b"piece piece ")
        terminal.press_ctrl_c(b"(stopped; the question is forgotten, /retry asks it again)", b"> ")
        terminal.type("/retry\n", b"piece", b"> ")
        deadline = time.monotonic() + 10
        while not server.left and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.left == 1 and [len(body["messages"]) for body in server.seen] == [1, 1]
        terminal.type("/quit\n")
        assert terminal.process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a model folder, or a server by --server"),
        (["m", "--server", "http://x"], "--server and the model folder m: name one of them"),
        (["m", "--api-key-env", "A"], "--api-key-env is for a server (--server); leave it out"),
        (["--server", "http://x", "--model", "m", "--dtype", "bfloat16"], "--dtype is for a model folder"),
        (["--server", "http://x", "--model", "m", "--threads", "2"], "--threads is for a model folder"),
        (["--server", "http://x", "--model", "m", "--device", "cpu"], "--device is for a model folder"),
        (["m", "--retries", "0"], "--retries is for a server (--server)"),
        (["m", "--timeout", "3"], "--timeout is for a server (--server)"),
        (["--server", "http://x", "--model", "m", "--image", "/no/cat.png"], "/no/cat.png"),
    ],
)
def test_mistakes(words, message, said):
    assert main([*words, "--question", "why?"]) == 2
    assert message in said.text

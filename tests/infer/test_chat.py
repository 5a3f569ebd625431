"""tlf-chat answers from a question on the command line, or line by line with what was said before."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import tinyllava_fast
from tests.infer.test_engine import ask
from tests.lora import write_adapter
from tests.tiny import make_engine
from tinyllava_fast.infer import chat
from tinyllava_fast.infer.chat import main
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.log import log

FLAGS = ["--max-new-tokens", "5", "--device", "cpu"]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


@pytest.fixture
def reply(folder: Path) -> Callable[..., str]:
    """What the model answers to the last of some messages."""
    engine = tinyllava_fast.load(folder, device="cpu").engine

    def answered(*texts: str, image: object = None) -> str:
        roles = ("human", "gpt")
        messages = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
        request = Request(messages=messages, image=image, sampling=Sampling(max_new_tokens=5))  # type: ignore[arg-type]
        return engine.answers([request])[0].text

    return answered


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sit at a terminal and type these lines; an exception is raised in place of a line."""

    def sit(*lines: str | type[BaseException]) -> None:
        left = iter(lines)

        def read(prompt: str) -> str:
            line = next(left, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(chat, "_at_terminal", lambda: True)
        monkeypatch.setattr("builtins.input", read)

    return sit


def test_one_question(folder, images, tmp_path, capsys):
    images[0].save(tmp_path / "cat.png")
    words = [str(folder), "--image", str(tmp_path / "cat.png"), "--max-new-tokens", "7", "--device", "cpu"]
    assert main([*words, "--question", "what is this?"]) == 0
    (expected,) = tinyllava_fast.load(folder, device="cpu").engine.answers([ask("what is this?", images[0], new=7)])
    assert capsys.readouterr().out == expected.text + "\n"


def test_quantized_weights(folder, capsys):
    words = [str(folder), "--max-new-tokens", "3", "--device", "cpu", "--question", "why?", "--weights", "int8"]
    assert main(words) == 0
    assistant = tinyllava_fast.load(folder, device="cpu", weights="int8")
    assert capsys.readouterr().out == assistant.answer(None, "why?", max_new_tokens=3) + "\n"


def test_an_adapter_and_guesses(folder, lmm, tokenizer, capsys, tmp_path):
    merged = make_engine(write_adapter(lmm, tmp_path / "red", seed=0), tokenizer)
    flags = ["--adapter", str(tmp_path / "red"), "--speculate", "8", "--max-new-tokens", "30", "--device", "cpu"]
    assert main([str(folder), *flags, "--question", "why why why"]) == 0
    expected = merged.answer(ask("why why why", new=30))
    assert capsys.readouterr().out.splitlines() == expected.text.splitlines()


def test_a_conversation(folder, reply, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("why?\n\nand then?\n"))
    assert main([str(folder), *FLAGS]) == 0
    first = reply("why?")
    assert capsys.readouterr().out == f"{first}\n{reply('why?', first, 'and then?')}\n"


def test_commands_in_a_pipe(folder, reply, images, tmp_path, monkeypatch, capsys):
    paths = [str(tmp_path / name) for name in ("a b.png", "c.png")]
    for path, image in zip(paths, images, strict=False):
        image.save(path)
    lines = [
        "/etc/hosts?",
        " /reset it",
        "/reset",
        "why?",
        f"/image {paths[0]}",
        "what?",
        f"/image '{paths[0]}' {paths[1]}",
        "both?",
    ]
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("".join(f"{line}\n" for line in [*lines, "/image", "quit", "/quit", "x"]))
    )
    assert main([str(folder), *FLAGS]) == 0
    first = reply("/etc/hosts?")
    expected = [
        first,
        reply("/etc/hosts?", first, "/reset it"),
        reply("why?"),
        reply("what?", image=images[0]),
        reply("both?", image=images[:2]),
    ]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in [*expected, reply("quit")])


def test_bytes_that_are_no_text_are_replaced(folder, reply, monkeypatch, capsys):
    raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xff?\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", raw)
    assert main([str(folder), *FLAGS]) == 0
    assert main([str(folder), *FLAGS, "--question", os.fsdecode(b"caf\xe9 \xff?")]) == 0
    assert capsys.readouterr().out == f"{reply('caf� �?')}\n" * 2


def test_a_full_context_is_explained_once_and_fails_a_pipe(folder, reply, monkeypatch, said, capsys):
    long = "x" * 1500
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{long}\n{long}\n{long}\n/reset\nwhy?\n"))
    assert main([str(folder), *FLAGS]) == 2
    errors = {r.getMessage() for r in said.records if "exceed the model's context of 2048" in r.getMessage()}
    assert sorted("/reset begins a new conversation" in error for error in errors) == [False, True]
    assert capsys.readouterr().out == f"{reply(long)}\n{reply('why?')}\n"


@pytest.mark.parametrize("leave", ["quit", "exit", "/quit", EOFError])
def test_at_a_terminal(folder, reply, typed, capsys, leave):
    typed("/help", " why? ", "", leave, "never asked")
    assert main([str(folder), *FLAGS]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: about no image") and "/image FILE" in out and "/reset" in out
    assert f"{reply('why?')}\n" in out


def test_control_c_twice_leaves_and_a_line_between_stays(folder, reply, typed, capsys):
    typed(KeyboardInterrupt, "why?", KeyboardInterrupt, KeyboardInterrupt, "never asked")
    assert main([str(folder), *FLAGS]) == 0
    out = capsys.readouterr().out
    assert out.count("Ctrl-C once more leaves") == 2 and f"{reply('why?')}\n" in out


def test_control_c_stops_an_answer_and_the_next_one_is_right(folder, reply, typed, monkeypatch, capsys):
    pieces: list[str] = []
    show = chat._show

    def pressed_at_the_first_piece_of_the_second_answer(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) > 1 and pieces.count("\n") == 1 and pieces[-2] == "\n":
            raise KeyboardInterrupt
        show(piece)

    first = reply("why?")
    stopped, last = [q for q in map(str, range(40)) if reply("why?", first, q)][:2]
    typed("why?", stopped, last)
    monkeypatch.setattr(chat, "_show", pressed_at_the_first_piece_of_the_second_answer)
    assert main([str(folder), *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "(stopped; the question is forgotten)" in out
    assert out.rstrip().endswith(reply("why?", first, last))


def test_mistakes_at_a_terminal_do_not_end_it(folder, reply, typed, said, tmp_path, capsys):
    typed("/imgae x.png", "/image /no/cat.png", "/image 'a", " /imgae x.png", "/reset", "why?")
    assert main([str(folder), *FLAGS]) == 0
    assert f"{reply('/imgae x.png')}\n" in capsys.readouterr().out
    assert said.text.count("did you mean /image?") in (1, 2) and "has the whole context" not in said.text
    typed("why?")
    assert main([str(folder), *FLAGS]) == 0
    assert "did you mean /image?" in said.text and "/no/cat.png" in said.text and "close the quotes" in said.text
    assert capsys.readouterr().out.rstrip().endswith(reply("why?"))


def test_another_system_text(folder, capsys):
    assert main([str(folder), *FLAGS, "--question", "why?", "--system", "Answer in French."]) == 0
    assistant = tinyllava_fast.load(folder, device="cpu", system="Answer in French.")
    prompt = assistant.engine.template.render([("why?", None)], assistant.engine.tokenizer).text
    assert prompt.startswith("Answer in French. USER: why?")
    assert capsys.readouterr().out == assistant.answer(None, "why?", max_new_tokens=5) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--image", "/no/cat.png"], "cat.png"),
        (["--device", "mps"], "device: 'mps'; known: auto, cpu, cuda"),
    ],
)
def test_mistakes_exit_with_2(folder, said, words, message):
    assert main([str(folder), "--question", "what?", "--device", "cpu", *words]) == 2
    assert message in said.text


def test_an_unknown_command_ends_a_pipe(folder, monkeypatch, said):
    monkeypatch.setattr("sys.stdin", io.StringIO("/nope\nwhy?\n"))
    assert main([str(folder), *FLAGS]) == 2
    assert "/nope: unknown command; /help lists them, a space in front makes it a question" in said.text


@pytest.mark.slow
def test_a_real_terminal(folder: Path, tmp_path: Path) -> None:
    """Through a pseudo terminal, with readline and real signals."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tinyllava_fast.infer.chat", str(folder), *FLAGS]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 4096)
        seen = seen.partition(text)[2]

    until(b"/quit or Ctrl-D leaves.")
    until(b"> ")
    os.write(ours, f"/image {tmp_path / 'a.png'}\n".encode())
    until(b"a new conversation: about ")
    until(b"> ")
    os.write(ours, b"what?\n\x1b[A\n")  # the arrow key asks it again
    until(b"> ")
    os.write(ours, b"/quit\n")
    assert process.wait(60) == 0
    os.close(ours)

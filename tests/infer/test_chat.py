"""tlf-chat answers from a question on the command line, or line by line with what was said before."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import tinyllava_fast
from tests.infer.terminal import Terminal
from tests.infer.test_engine import ask
from tests.lora import write_adapter
from tests.tiny import make_engine
from tinyllava_fast.data.records import read_records
from tinyllava_fast.infer import chat
from tinyllava_fast.infer.chat import main
from tinyllava_fast.infer.types import Request, Sampling

FLAGS = ["--max-new-tokens", "5", "--device", "cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where typed lines are kept: not among those of who runs the tests."""
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    assert "(stopped; the question is forgotten, /retry asks it again)" in out
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


def test_a_command_behind_a_space_is_a_question(folder, reply, typed, capsys):
    typed("why?", " /retry", " /quit")
    assert main([str(folder), *FLAGS]) == 0
    first = reply("why?")
    second = reply("why?", first, "/retry")
    out = capsys.readouterr().out.rstrip()
    assert out.endswith(f"{second}\n{reply('why?', first, '/retry', second, '/quit')}")


def test_a_terminal_is_shown_nothing_that_moves_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    chat._show("a\tb\n\x1b[2J\x07\r\x9b\u202eé 你 \U0001f600\u200d")
    assert capsys.readouterr().out == "a\tb\n\ufffd[2J\ufffd\ufffd\ufffd\ufffdé 你 \U0001f600\u200d"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    chat._show("\x1b[2J")
    assert capsys.readouterr().out == "\x1b[2J"  # a file gets what the model said


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


def piped(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_system_text_begins_anew(folder, reply, monkeypatch, said, capsys):
    piped(monkeypatch, "why?", "/system Be brief. <image>", "why?", "/system", "why?")
    assert main([str(folder), *FLAGS]) == 0
    engine = tinyllava_fast.load(folder, device="cpu").engine
    messages = [{"from": "system", "value": "Be brief. <image>"}, {"from": "human", "value": ["why?"]}]
    (brief,) = engine.answers([Request(messages=messages, sampling=Sampling(max_new_tokens=5))])
    assert capsys.readouterr().out == f"{reply('why?')}\n{brief.text}\n{reply('why?')}\n"
    assert said.text.count("a new conversation: about no image") in (2, 4)


def test_retry_takes_the_place_of_the_answer(folder, reply, monkeypatch, said, capsys):
    piped(monkeypatch, "why?", "/set temperature 1", "/retry", "/retry", "/set temperature 0", "/retry", "and?")
    assert main([str(folder), *FLAGS, "--seed", "3"]) == 0
    first = reply("why?")
    engine = tinyllava_fast.load(folder, device="cpu").engine

    def sampled(seed: int) -> str:
        request = Request.ask("why?", sampling=Sampling(max_new_tokens=5, temperature=1, seed=seed))
        return engine.answers([request])[0].text

    expected = [first, sampled(4), sampled(5), first, reply("why?", first, "and?")]
    assert capsys.readouterr().out.split("\n")[:-1] == "\n".join(expected).split("\n") and sampled(4) != sampled(5)
    assert said.text.count("the temperature is 0, so the answer is the same one") in (1, 2)


def test_retry_asks_what_was_stopped(folder, reply, typed, monkeypatch, capsys):
    typed("why?", "/retry")
    left = [KeyboardInterrupt]
    show = chat._show

    def pressed_once(piece: str) -> None:
        if left and "Ask a question" not in piece:
            raise left.pop()
        show(piece)

    monkeypatch.setattr(chat, "_show", pressed_once)
    assert main([str(folder), *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "(stopped; the question is forgotten, /retry asks it again)" in out and out.rstrip().endswith(reply("why?"))


def test_settings(folder, reply, typed, said, capsys):
    wrong = ("/set max_new_tokens x", "/set max_new_tokens", "/set top_p 2", "/set heat 1")
    typed("/set", "/set max_new_tokens 3", *wrong, "/retry", "why?")
    assert main([str(folder), *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "  max_new_tokens       5\n  temperature          0.0\n" in out and "  max_new_tokens       3\n>" not in out
    three = tinyllava_fast.load(folder, device="cpu").answer(None, "why?", max_new_tokens=3)
    assert out.rstrip().endswith(three) and three != reply("why?")
    for message in (
        "/set: max_new_tokens 'x' is not a whole number",
        "/set: max_new_tokens '' is not a whole number",
        "/set: top_p is 2.0; it must be in (0, 1]",
        "/set: unknown setting 'heat'; ",
        "/retry: no question was asked yet",
    ):
        assert message in said.text


@pytest.mark.parametrize("shown", [0, 1, 2])
def test_a_saved_conversation_is_a_record(folder, reply, images, tmp_path, monkeypatch, capsys, shown):
    paths = [str(tmp_path / f"{name}.png") for name in "ab"[:shown]]
    for path, image in zip(paths, images, strict=False):
        image.save(path)
    file = tmp_path / "talk.json"
    piped(monkeypatch, f"/image {' '.join(paths)}", "wh\u00f6?", f"/save {file}", "and?", f"/save {file}")
    assert main([str(folder), *FLAGS, "--system", "Be brief."]) == 0
    (record,) = read_records(file)
    answers = capsys.readouterr().out.rstrip("\n")
    assert record.images == tuple(paths) and record.interleaved == (shown > 1)
    assert [question for question, _ in record.turns] == ["<image>\n" * shown + "wh\u00f6?", "and?"]
    assert "\n".join(answer for _, answer in record.turns) == answers
    (stored,) = json.loads(file.read_text())
    assert stored["system"] == "Be brief." and stored["settings"]["max_new_tokens"] == 5
    assert stored["model"] == str(folder)


def test_what_is_not_saved(folder, typed, said, tmp_path):
    (tmp_path / "mine.json").write_text("mine")
    there, new = tmp_path / "mine.json", tmp_path / "new.json"
    typed(f"/save {new}", "a", f"/save {there}", "/save", f"/save {tmp_path}/no/x", "<image>", f"/save {new}")
    assert main([str(folder), *FLAGS]) == 0
    for message in ("nothing was answered yet", "mine.json is there already", "/save: name a file", "holds <image>"):
        assert message in said.text
    assert "no/x: cannot be written" in said.text and there.read_text() == "mine" and not new.exists()


@pytest.mark.slow
def test_a_real_terminal(folder: Path, tmp_path: Path, cache: Path) -> None:
    """Through a pseudo terminal, with readline and real signals; the lines are kept for the next time."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [f"/image {tmp_path / 'a.png'}", "what?"]
    with Terminal(str(folder), *FLAGS) as terminal:
        terminal.until(b"/quit or Ctrl-D leaves.", b"> ")
        terminal.type(f"{lines[0]}\n", b"a new conversation: about ", b"> ")
        terminal.type("what?\n", b"> ")
        terminal.type("\x1b[A\n", b"what?", b"> ")  # the arrow key asks it again
        terminal.press_ctrl_c(b"Ctrl-C once more leaves.", b"> ")
        terminal.press_ctrl_c()
        assert terminal.process.wait(60) == 0
    kept = cache / "chat_history"
    assert kept.read_text().splitlines()[:2] == lines and stat.S_IMODE(kept.stat().st_mode) == 0o600
    with Terminal(str(folder), *FLAGS) as terminal:
        terminal.until(b"> ")
        terminal.type("\x1b[A\n", b"what?", b"> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(60) == 0

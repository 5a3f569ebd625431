"""tlf-chat answers from a question on the command line, or line by line with what was said before."""

from __future__ import annotations

import io

import pytest

import tinyllava_fast
from tests.infer.test_engine import ask
from tinyllava_fast.infer.chat import main
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.log import log


def test_one_question(folder, images, tmp_path, capsys):
    images[0].save(tmp_path / "cat.png")
    words = [str(folder), "--image", str(tmp_path / "cat.png"), "--max-new-tokens", "7", "--device", "cpu"]
    assert main([*words, "--question", "what is this?"]) == 0
    (expected,) = tinyllava_fast.load(folder, device="cpu").engine.answers([ask("what is this?", images[0], new=7)])
    assert capsys.readouterr().out == expected.text + "\n"


def test_quantised_weights(folder, capsys):
    words = [str(folder), "--max-new-tokens", "3", "--device", "cpu", "--question", "why?", "--weights", "int8"]
    assert main(words) == 0
    assistant = tinyllava_fast.load(folder, device="cpu", weights="int8")
    assert capsys.readouterr().out == assistant.answer(None, "why?", max_new_tokens=3) + "\n"


def test_a_conversation(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("why?\n\nand then?\n"))
    assert main([str(folder), "--max-new-tokens", "5", "--device", "cpu"]) == 0
    engine, sampling = tinyllava_fast.load(folder, device="cpu").engine, Sampling(max_new_tokens=5)
    messages = [{"from": "human", "value": "why?"}]
    (first,) = engine.answers([Request(messages=messages, sampling=sampling)])
    messages += [{"from": "gpt", "value": first.text}, {"from": "human", "value": "and then?"}]
    (second,) = engine.answers([Request(messages=messages, sampling=sampling)])
    assert capsys.readouterr().out == f"{first.text}\n{second.text}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--temperature", "-1"], "temperature is -1"), (["--image", "/no/cat.png"], "cat.png")],
)
def test_mistakes_exit_with_2(folder, caplog, words, said):
    log.addHandler(caplog.handler)
    try:
        assert main([str(folder), "--question", "what?", "--device", "cpu", *words]) == 2
    finally:
        log.removeHandler(caplog.handler)
    assert said in caplog.text

"""What is wrong with one question costs that question; what is wrong with all is said before the first answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.eval.layouts import write_jsonl
from tests.eval.own import RED, answers, finishes, picture
from tests.tiny import make_model, tiny_config
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval import runner
from tinyllava_fast.eval.benchmarks import custom
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.types import Request
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model


@pytest.fixture(scope="module")
def short(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is 320."""
    path = tmp_path_factory.mktemp("short") / "final"
    save_model(make_model(max_position_embeddings=320), tokenizer, build_image_processor(tiny_config()), path)
    return path


def hard_questions(data: Path, most: int) -> None:
    """Five that are whole, one too long, one with room for three tokens, one that no picture can be shown for, one
    whose picture is damaged. most: characters that fill the context."""
    picture(data / "a.bmp", RED)
    (data / "bad.bmp").write_bytes(b"BM")
    rows = [{"id": f"q{i}", "image": "a.bmp", "question": f"colour {i}?", "answer": "x"} for i in range(5)]
    rows.insert(1, {"id": "long", "image": "a.bmp", "question": "what colour is it? " * 60, "answer": "x"})
    rows.insert(3, {"id": "tight", "image": "a.bmp", "question": "x" * (most - 3), "answer": "x"})
    rows.append({"id": "tag", "question": "what does <image> mean?", "answer": "x"})
    rows.append({"id": "bad", "image": "bad.bmp", "question": "what?", "answer": "x"})
    write_jsonl(data / "questions.jsonl", rows)


def test_one_bad_question_costs_one_question(short, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("tinyllava_fast.eval.runner.log.propagate", True)
    monkeypatch.setattr(custom, "_check_markers", lambda *_: None)  # which finds "tag" before the engine does
    picture(tmp_path / "a.bmp", RED)
    engine = Assistant.from_pretrained(short, device="cpu", batch_tokens=1024).engine
    (one,) = engine.run([Request.ask("x", tmp_path / "a.bmp")])
    hard_questions(tmp_path / "data", 321 - one.prompt_tokens)
    options = {"options": ["custom.max_new_tokens=48"], "device": "cpu"}
    found = runner.evaluate(short, ["custom"], tmp_path / "data", tmp_path / "out", **options)["custom"]
    said, ended = answers(tmp_path / "out"), finishes(tmp_path / "out")
    assert {k: v for k, v in ended.items() if v not in ("eos", "length", "context")} == {
        "long": "too long",
        "tag": "refused",
        "bad": "unreadable image",
    }
    assert [k for k, text in said.items() if text == ""] == ["long", "tag", "bad"] and ended["tight"] == "context"
    counts = found["counts"]
    assert (counts["answered"], counts["too long"], counts["refused"], counts["unreadable"]) == (9, 1, 1, 1)
    assert counts["context full"] == 1 and list(found["not_answered"]) == ["long", "tag"]
    assert "context of 320" in found["not_answered"]["long"] and "'tag'" in found["not_answered"]["tag"]
    assert "scored as an empty answer: request 'long'" in caplog.text and "bad.bmp" in caplog.text
    # those that were found wrong beforehand stand in front, and a run that goes on has the same results
    log = tmp_path / "out/custom/answers.jsonl"
    keys = [r["key"] for r in map(json.loads, log.read_text().splitlines()) if "key" in r]
    assert keys[:2] == ["long", "tag"]
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    log = tmp_path / "again/custom/answers.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    resumed = runner.evaluate(short, ["custom"], tmp_path / "data", tmp_path / "again", **options)["custom"]
    assert resumed.pop("run")["answered_now"] == 6 and found.pop("run") and resumed == found
    assert (tmp_path / "again/custom/verdicts.jsonl").read_bytes() == (
        tmp_path / "out/custom/verdicts.jsonl"
    ).read_bytes()


def test_a_pool_too_small_is_refused_before_the_first_answer(folder, tmp_path):
    rows = [{"id": id, "question": "a" * n, "answer": "b"} for id, n in (("short", 5), ("long", 900))]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    with pytest.raises(UserError, match=r"custom: request 'long': .* exceed the K/V pool; raise it to 1\d\d\d"):
        runner.evaluate(folder, ["custom"], tmp_path, tmp_path / "out", device="cpu", batch_tokens=1000)
    assert '"key"' not in (tmp_path / "out/custom/answers.jsonl").read_text()


def test_paths_that_lead_nowhere_are_missing_pictures(evaluate, tmp_path):
    rows = [{"id": i, "image": i, "question": "what?", "answer": "x"} for i in ("a.bmp", "x" * 250, "a.bmp/b")]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    picture(tmp_path / "a.bmp", RED)
    with pytest.raises(UserError, match="2 of 3 images are missing"):
        evaluate(tmp_path, tmp_path / "o")
    assert evaluate(tmp_path, tmp_path / "o", missing_images="empty")["counts"]["unreadable"] == 2

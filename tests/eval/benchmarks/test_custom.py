"""A user's own questions: records, metrics, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.benchmarks.custom import Options

CUSTOM = BENCHMARKS.get("custom")


def score(tmp_path: Path, metric: str, record: dict, text: str) -> float:
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "q", **record}))
    bench = CUSTOM(Options(metric=metric))
    questions = bench.questions(bench.locate(tmp_path))
    return bench.score(questions, {questions[0].key: text})["accuracy"].value


@pytest.mark.parametrize(
    ("metric", "record", "text", "points"),
    [
        ("exact", {"answer": "a dog"}, " Dog. ", 100),
        ("exact", {"answer": ["cat", "dog"]}, "dog", 100),
        ("exact", {"answer": 2}, "two", 100),
        ("exact", {"answer": "dog"}, "dogs", 0),
        ("contains", {"answer": "red"}, "It is red, I think", 100),
        ("contains", {"answer": "red"}, "It is bored", 0),
        ("vqa", {"answer": ["red"] * 2 + ["blue"] * 8}, "Red", 60),
        ("choice", {"answer": "B", "choices": ["cat", "dog"]}, "B. dog", 100),
        ("choice", {"answer": "dog", "choices": ["cat", "dog"]}, "(B)", 100),
        ("choice", {"answer": "dog", "choices": ["cat", "dog"]}, "the dog", 100),
        ("choice", {"answer": "A", "choices": ["cat", "dog"]}, "Both", 0),
        ("choice", {"answer": "A", "choices": ["cat", "dog"]}, "C", 0),
    ],
)
def test_metrics(tmp_path, metric, record, text, points):
    assert score(tmp_path, metric, record, text) == points


@pytest.mark.parametrize(
    ("metric", "record", "said"),
    [
        ("exact", {}, "no field 'answer'"),
        ("exact", {"answer": []}, "empty list"),
        ("vqa", {"answer": ["a"]}, "1 answers; custom.metric=vqa needs ten"),
        ("choice", {"answer": "a"}, "needs choices"),
        ("choice", {"answer": "C", "choices": ["x", "y"]}, "needs choices"),
    ],
)
def test_refusals(tmp_path, metric, record, said):
    with pytest.raises(DataError, match=f"questions.jsonl, line 1: .*{said}"):
        score(tmp_path, metric, record, "")


def test_records(tmp_path):
    rows = [
        {"question": "a", "answer": "x", "image": ["1.png", "2.png"], "category": "one"},
        {"question": "b", "answer": "y", "id": "mine", "category": "two"},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pictures").mkdir()
    bench = CUSTOM(Options(file="mine.jsonl", images="pictures", max_new_tokens=5))
    questions = bench.questions(bench.locate(tmp_path))
    assert bench.max_new_tokens == 5
    assert [(q.key, q.id, len(q.images)) for q in questions] == [("1", 1, 2), ("mine", "mine", 0)]
    assert questions[0].images[0] == tmp_path / "pictures" / "1.png"
    found = bench.score(questions, {"1": "x"})
    assert [(m.name, m.value) for m in found.tables["category"]] == [("one", 100), ("two", 0)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [rows[1], rows[1]])))
    with pytest.raises(DataError, match=r"line 2: 'mine' stands in line 1 already"):
        bench.questions(bench.locate(tmp_path))

"""GQA's scores on the vectors of its official script."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.eval.golden import load, shared, source, unpack
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.benchmarks.gqa import prediction

BENCH = BENCHMARKS.get("gqa")()


@dataclass(frozen=True)
class Vectors:
    """Files, answers and what the official script made of them."""

    files: dict[str, Path]
    answers: dict[str, str]
    scores: dict[str, Any]
    predictions: list[dict[str, str]]


@pytest.fixture(scope="module", params=["stored", "shared"])
def vectors(request, tmp_path_factory):
    """GQA's questions under invented words, as stored, and in its own words."""
    at, root = source(request.param, "gqa/synthetic"), tmp_path_factory.mktemp("gqa")
    names = {"questions": "llava_gqa_testdev_balanced.jsonl", "annotations": "testdev_balanced_questions.json"}
    files = {key: unpack(at / name, root / name) for key, name in names.items()} | {"images": Path("images")}
    return Vectors(
        files,
        {r["question_id"]: r["text"] for r in load(at / "answers.jsonl")},
        load(at / "expected.json")["scores"],
        load(at / "expected_testdev_balanced_predictions.json"),
    )


def check(score, expected):
    for metric, name in (("accuracy", "Accuracy"), ("binary", "Binary"), ("open", "Open")):
        assert round(score[metric].value, 2) == expected[name]
    assert round(score["distribution"].value, 2) == expected["Distribution"]
    for title, name in (("structural type", ""), ("semantic type", ""), ("steps", " number"), ("words", " number")):
        rows = {m.name: {"percent": round(m.value, 2), "n": m.questions} for m in score.tables[title]}
        assert rows == expected[f"Accuracy / {title}{name}"]


def test_synthetic_vectors(vectors, tmp_path):
    questions, answers = BENCH.questions(vectors.files), vectors.answers
    check(score := BENCH.score(questions, answers), vectors.scores)
    assert 0 < score["accuracy"].stderr < 10
    shuffled = random.Random(0).sample(sorted(answers), len(answers))
    assert BENCH.score(questions, {key: answers[key] for key in shuffled}) == score
    (path,) = BENCH.outputs(questions, answers, score, vectors.files, tmp_path, "x")
    assert rows_by_id(load(path)) == rows_by_id(vectors.predictions)


def rows_by_id(found):
    return {row["questionId"]: row["prediction"] for row in found}


def test_official_rows(tmp_path):
    rows = shared("gqa/official_rows")
    annotations = rows / "val_balanced_questions_5rows.json"
    known = load(annotations).items()
    lines = [{"question_id": id, "image": a["imageId"], "text": a["question"]} for id, a in known]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions = BENCH.questions({"questions": tmp_path / "q.jsonl", "annotations": annotations, "images": tmp_path})
    answers = rows_by_id(load(rows / "predictions.json"))
    check(BENCH.score(questions, answers), load(rows / "expected.json")["scores"])


def test_prediction_form():
    rows = load("gqa/prediction_form.jsonl")
    assert [prediction(v["text"]) for v in rows] == [v["prediction"] for v in rows]


def test_a_missing_balanced_answer_is_refused(vectors):
    questions = BENCH.questions(vectors.files)
    asked = next(q for q in questions if q.meta["isBalanced"])
    with pytest.raises(DataError, match=r"gqa: 1 of 141 questions have no answer"):
        BENCH.score(questions, {k: v for k, v in vectors.answers.items() if k != asked.key})


def test_an_id_without_annotation(vectors, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": "1", "image": "a.jpg", "text": "x"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: question '1' is not in"):
        BENCH.questions({**vectors.files, "questions": tmp_path / "q.jsonl"})

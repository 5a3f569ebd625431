"""VQAv2: the upload equals the reference's, the score of the official validation format the challenge's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval.golden import GOLDEN, load, unpack
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.benchmarks.vqav2 import Options, upload

VQAV2 = BENCHMARKS.get("vqav2")
SUBMISSION = GOLDEN / "vqav2_submission"
VAL = GOLDEN / "vqa" / "official_val_format"


def test_upload(tmp_path):
    """The reference skips a broken line and lets the last of two answers win; so are the answers prepared here."""
    said, unknown = {}, {7}
    for line in (SUBMISSION / "merge.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        said[record["question_id"]] = record["text"]
    with pytest.raises(DataError, match="1 answered ids are not in test2015, the first is 7"):
        upload([1], dict.fromkeys([1, *unknown], ""))
    answers = {str(id): text for id, text in said.items() if id not in unknown}
    files = {
        "questions": SUBMISSION / "llava_vqav2_mscoco_test-dev2015.jsonl",
        "all_ids": SUBMISSION / "llava_vqav2_mscoco_test2015.jsonl",
        "images": Path("test2015"),
    }
    bench = VQAV2()
    questions = bench.questions(files)
    score = bench.score(questions, answers)
    assert not score.metrics and "private" in score.notes[0] and score.credit == {}
    (path,) = bench.outputs(questions, answers, score, files, tmp_path, "exp")
    assert json.loads(path.read_text()) == load("vqav2_submission/expected_upload.json")
    assert bench.outputs(questions[:-1], answers, score, files, tmp_path, "exp") == []

    official = {"questions": [{"question_id": row["question_id"]} for row in json.loads(path.read_text())]}
    ids = tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json"
    ids.write_text(json.dumps(official))
    (again,) = bench.outputs(questions, answers, score, {**files, "all_ids": ids}, tmp_path, "again")
    assert again.read_text() == path.read_text()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_upload_holds_every_id_once(tmp_path, suffix):
    rows = [{"question_id": id} for id in (1, 2, 1)]
    ids = tmp_path / f"ids{suffix}"
    ids.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps({"questions": rows}))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": "a.jpg", "text": "what?"}))
    files = {"questions": tmp_path / "q.jsonl", "all_ids": ids, "images": tmp_path}
    with pytest.raises(DataError, match=r"ids\.json.*, line 3: 1 stands in line 1 already"):
        VQAV2().questions(files)


def test_official_validation_format(tmp_path):
    """Our answers are normalized before they are compared, so the expected numbers are those of results_m4c.json."""
    annotations = unpack(VAL / "annotations.json", tmp_path / "annotations.json")
    files = {"questions": VAL / "questions.json", "annotations": annotations, "images": Path("val2014")}
    bench, expected = VQAV2(Options(split="val2014")), load("vqa/official_val_format/expected.json")["accuracy"]
    questions = bench.questions(files)
    answers = {str(r["question_id"]): r["answer"] for r in load("vqa/official_val_format/results_raw.json")}
    score, official = bench.score(questions, answers), expected["results_m4c.json"]
    assert round(score["overall"].value, 2) == official["overall"]
    assert {m.name: round(m.value, 2) for m in score.tables["answer type"]} == official["perAnswerType"]
    assert {m.name: round(m.value, 2) for m in score.tables["question type"]} == official["perQuestionType"]
    assert questions[0].images[0] == Path("val2014/COCO_val2014_000000000001.jpg")
    assert bench.score(questions, {})["overall"].value < score["overall"].value

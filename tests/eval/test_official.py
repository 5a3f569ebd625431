"""Answers files that this toolkit wrote, read for --score-only: which of several answers to a question counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.eval.changes import another_picture
from tests.eval.layouts import write_jsonl
from tests.eval.own import BLUE, RED, ROWS, answers, picture
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval import runner
from tinyllava_fast.eval.official import read_answers
from tinyllava_fast.eval.options import build
from tinyllava_fast.eval.plan import Plan, make_plans
from tinyllava_fast.eval.results import read_results


def plan_of(data: Path) -> Plan:
    return make_plans(build(["custom"]), data, missing_images="ignore")[0]


def read(data: Path, file: Path) -> dict[str, str]:
    plan = plan_of(data)
    return read_answers(file, plan.benchmark, plan.everything)


@pytest.fixture
def twice(evaluate, finished, tmp_path) -> tuple[Path, Path, dict[str, str], dict[str, str]]:
    """A run whose first picture was changed and asked about again: data, out, first and second answers."""
    shutil.copytree(finished, tmp_path / "run")
    data, out = tmp_path / "run/data", tmp_path / "run/out"
    first = answers(out)
    another_picture(data, out)
    evaluate(data, out)
    assert answers(out) != first
    return data, out, first, answers(out)


def test_the_last_answer_to_what_is_asked_now_counts(twice):
    data, out, first, second = twice
    log = out / "custom/answers.jsonl"
    before = {p: p.read_bytes() for p in (out / "custom").iterdir() if p.is_file()}
    assert read(data, log) == second
    picture(data / "a.bmp", RED)
    assert read(data, log) == first  # although the others are last
    assert {p: p.read_bytes() for p in (out / "custom").iterdir() if p.is_file()} == before


def test_answers_to_nothing_that_is_asked_now_are_refused(twice):
    data, out, *_ = twice
    picture(data / "a.bmp", (1, 2, 3))
    said = r"question '(one|both)' is answered in lines \d, \d, each time to another prompt or other pictures than now"
    with pytest.raises(DataError, match=said):
        read(data, out / "custom/answers.jsonl")
    (data / "a.bmp").unlink()
    with pytest.raises(DataError, match=said):
        read(data, out / "custom/answers.jsonl")


def test_blind_answers_belong_to_the_prompt(evaluate, finished, tmp_path):
    shutil.copytree(finished / "data", tmp_path / "data")
    evaluate(tmp_path / "data", tmp_path / "out", blind=True)
    first = answers(tmp_path / "out")
    write_jsonl(tmp_path / "data/questions.jsonl", [{**ROWS[0], "question": "which colour?"}, *ROWS[1:]])
    evaluate(tmp_path / "data", tmp_path / "out", blind=True)
    write_jsonl(tmp_path / "data/questions.jsonl", ROWS)
    picture(tmp_path / "data/a.bmp", BLUE)
    assert read(tmp_path / "data", tmp_path / "out/custom/answers.jsonl") == first


def test_answers_of_several_runs_are_refused_with_the_file_that_can_be_scored(twice):
    data, out, *_ = twice
    model = read_results(out / "custom")["model"]
    runner.evaluate(model, ["custom"], data, out, options=["custom.max_new_tokens=2"])
    with pytest.raises(
        DataError, match=r"several runs, which differ in max_new_tokens; score .*official/answers\.jsonl"
    ):
        read(data, out / "custom/answers.jsonl")
    assert read(data, out / "custom/official/answers.jsonl") == answers(out)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"key": "one", "answer": "x"}] * 2, "line 2: question 'one' is answered in line 1 already"),
        ([{"run": 3}, {"key": "one", "answer": "x"}], "line 1: run: expected an object"),
        ([{"run": {}}, {"key": "one", "answer": "x", "asked": 3}], "line 2: asked: expected text"),
        (
            [[{"key": "one", "answer": "x"}]],
            "line 1: expected a JSON object.*each line of this file is one JSON object",
        ),
        (["one,x"], "line 1: expected a JSON object.*each line of this file is one JSON object"),
    ],
)
def test_files_that_are_none(finished, tmp_path, lines, said):
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=said):
        read(finished / "data", tmp_path / "f.jsonl")


def test_questions_without_an_answer_are_counted(finished, tmp_path, capsys):
    from tinyllava_fast.eval import cli

    (tmp_path / "f.jsonl").write_text('{"key": "one", "answer": "x"}\n')
    data = ["--benchmarks", "custom", "--data", str(finished / "data")]
    assert cli.main([*data, "--score-only", str(tmp_path / "f.jsonl")]) == 0
    assert "unanswered 2" in capsys.readouterr().out

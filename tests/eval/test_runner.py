"""A benchmark run end to end: resumes, scores, refuses bad input."""

from __future__ import annotations

import json
import logging
import time

import pytest

from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval import cli, runner
from tinyllava_fast.eval.answers import AnswerLog, read_answers
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.benchmarks.easy_vqa import question_type
from tinyllava_fast.eval.machine import machine, model_digest, versions
from tinyllava_fast.eval.progress import progress
from tinyllava_fast.hardware import peak_rss_bytes
from tinyllava_fast.infer.types import Answer

OPTIONS = {"device": "cpu", "batch_tokens": 2048}


@pytest.fixture
def results(folder, data_dir, tmp_path):
    return runner.evaluate(folder, "easy_vqa", data_dir, tmp_path / "out", **OPTIONS)


def answer(id: str, text: str = "yes") -> Answer:
    return Answer(id=id, text=text, tokens=[5, 2], finish="eos", prompt_tokens=3)


def test_results_hold_what_is_promised(results, folder, tmp_path):
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["questions"] == 20 and results["answered_now"] == 20 and 0 <= results["accuracy"] <= 1
    assert sorted(results["accuracy_by_type"]) == ["color", "shape", "yes/no color", "yes/no shape"]
    assert sum(results["questions_by_type"].values()) == 20
    assert results["eval_seconds"] > 0 and results["questions_per_s"] > 0 and results["peak_rss_bytes"] > 2**20
    assert results["model_digest"] == model_digest(folder) and results["versions"]["torch"]
    assert results["engine"]["images_encoded"] == 4
    assert len(results["wrong"]) == round(20 * (1 - results["accuracy"]))


def test_a_killed_run_resumes_to_the_same_results(results, folder, data_dir, tmp_path):
    whole = (tmp_path / "out" / "answers.jsonl").read_bytes()
    cut = tmp_path / "cut" / "answers.jsonl"
    cut.parent.mkdir()
    lines = whole.splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:9]) + lines[9][:7])  # two head lines, seven answers, half of the eighth
    resumed = runner.evaluate(folder, "easy_vqa", data_dir, cut.parent, **OPTIONS)
    assert resumed["answered_now"] == 13
    assert read_answers(cut) == read_answers(tmp_path / "out" / "answers.jsonl")
    timing = ("answered_now", "eval_seconds", "questions_per_s", "peak_rss_bytes", "engine")
    assert {k: v for k, v in resumed.items() if k not in timing} == {
        k: v for k, v in results.items() if k not in timing
    }


def test_a_finished_run_is_not_repeated(results, folder, data_dir, tmp_path):
    again = runner.evaluate(folder, "easy_vqa", data_dir, tmp_path / "out", **OPTIONS)
    assert again == results
    fewer = runner.evaluate(folder, "easy_vqa", data_dir, tmp_path / "out", limit=5, **OPTIONS)
    assert fewer["questions"] == 5 and fewer["answered_now"] == 0


def test_blind_sees_one_blank_image(folder, data_dir, tmp_path):
    blind = runner.evaluate(folder, "easy_vqa", data_dir, tmp_path, blind=True, **OPTIONS)
    assert blind["blind"] and blind["engine"]["images_encoded"] == 1
    answers = read_answers(tmp_path / "answers.jsonl")
    assert answers["test-0"] == answers["test-5"] == answers["test-10"]  # the same question about different images


def test_default_output_is_beside_the_model(tmp_path):
    assert runner.default_output(tmp_path / "final", "easy_vqa", False) == tmp_path / "eval" / "easy_vqa"
    assert runner.default_output(tmp_path / "final", "easy_vqa", True) == tmp_path / "eval" / "easy_vqa-blind"


def test_answers_of_another_run_are_not_mixed_in(tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, {"model": "a"}) as first:
        first.add(answer("1"))
        first.add(answer("2"))
    assert AnswerLog(path, {"model": "a"}).texts == {"1": "yes", "2": "yes"}
    with AnswerLog(path, {"model": "b"}) as other:
        assert other.texts == {}
        other.add(answer("3"))
    assert read_answers(path) == {"3": "yes"}


def test_seconds_add_up_over_sessions(tmp_path):
    path = tmp_path / "answers.jsonl"
    spent = []
    for number in range(3):
        with AnswerLog(path, {}) as session:
            time.sleep(0.002)
            session.add(answer(str(number)))
            spent.append(session.seconds)
    assert spent == sorted(spent) and spent[-1] >= 0.006
    assert AnswerLog(path, {}).seconds == pytest.approx(spent[-1], abs=1e-3)


@pytest.mark.parametrize("line", ["{}", "[1]", "nonsense", '{"id": "1"}'])
def test_a_foreign_answers_file_is_refused(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"run": {{}}}}\n{{"session": 0}}\n{line}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl, line 3: not a record of an evaluation"):
        AnswerLog(path, {})


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what is the blue shape?", "circle", "shape"),
        ("what color is the circle?", "blue", "color"),
        ("is there not a teal shape in the image?", "no", "yes/no color"),
        ("does the image contain a rectangle?", "yes", "yes/no shape"),
    ],
)
def test_question_types(question, answer, expected):
    assert question_type(question, answer) == expected


def test_score_is_exact_match_and_unanswered_is_wrong(data_dir):
    bench = BENCHMARKS.get("easy_vqa")()
    questions = bench.questions(data_dir)
    truth = {q.id: q.answer for q in questions}
    assert bench.score(questions, truth)["accuracy"] == 1.0
    assert bench.score(questions, {})["accuracy"] == 0.0
    off = {**truth, "test-0": " circle\n", "test-1": "redd", "test-2": "Yes"}
    score = bench.score(list(reversed(questions)), off)
    assert [i for i, right in score["correct"].items() if not right] == ["test-2", "test-1"]
    assert bench.score([], {})["accuracy"] == 0.0


def test_cli(folder, data_dir, tmp_path, capsys, caplog):
    caplog.set_level(logging.ERROR, logger="tinyllava_fast")
    arguments = [
        str(folder),
        "--data",
        str(data_dir),
        "--output",
        str(tmp_path / "o"),
        "--limit",
        "10",
        "--threads",
        "1",
    ]
    assert cli.main([*arguments, "--batch-tokens", "2048", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "yes/no shape" in out and "questions/s" in out
    assert cli.main([*arguments, "--benchmark", "easy_vqq"]) == 2
    assert cli.main([str(tmp_path / "none"), "--data", str(data_dir)]) == 2
    assert cli.main([str(folder), "--data", str(tmp_path / "none")]) == 2
    for bad in (["--limit", "0"], ["--threads", "-1"], ["--limit", "x"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, *bad])
        assert stop.value.code == 2


def test_no_questions(folder, data_dir, tmp_path):
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(UserError, match="no question to ask"):
        runner.evaluate(folder, "easy_vqa", tmp_path, tmp_path)


def test_progress_lines_and_bar(monkeypatch, caplog):
    monkeypatch.setattr("tinyllava_fast.eval.progress.log.propagate", True)
    with caplog.at_level(logging.INFO, logger="tinyllava_fast"):
        assert list(progress(range(3), total=5, done=2)) == [0, 1, 2]
    assert "5/5 questions" in caplog.text
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress(range(3), total=3)) == [0, 1, 2]


def test_machine_facts():
    facts = machine()
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 2**28 and facts["processor"]
    assert peak_rss_bytes() > 2**20 and "tinyllava-fast" in versions()

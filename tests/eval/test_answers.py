"""The file of answers: what is in it counts, nothing else does, and a write that fails loses nothing."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator

import pytest

from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval import cli
from tinyllava_fast.eval.answers import AnswerLog, asked, line_of
from tinyllava_fast.eval.benchmarks.base import Question


def log_of(folder, run, *keys):
    return AnswerLog(folder, run, {k: f"question {k}" for k in keys})


def test_answers_of_another_run_or_question_are_not_mixed_in(tmp_path):
    with log_of(tmp_path, {"model": "a"}, "1", "2") as first:
        first.add("1", "yes", finish="eos")
        first.add("2", "no", finish="eos")
    assert log_of(tmp_path, {"model": "a"}, "1", "2").texts == {"1": "yes", "2": "no"}
    assert AnswerLog(tmp_path, {"model": "a"}, {"1": "another question", "2": "question 2"}).texts == {"2": "no"}
    with log_of(tmp_path, {"model": "b"}, "3") as other:
        assert other.texts == {}
        other.add("3", "yes", finish="eos")
    assert log_of(tmp_path, {"model": "b"}, "3").texts == {"3": "yes"}


def test_seconds_add_up_over_sessions(tmp_path):
    spent = []
    for number in range(3):
        with log_of(tmp_path, {}, "0", "1", "2") as session:
            time.sleep(0.002)
            session.add(str(number), "x", finish="eos")
            spent.append(session.seconds)
    assert spent == sorted(spent) and spent[-1] >= 0.006
    assert log_of(tmp_path, {}).seconds == pytest.approx(spent[-1], abs=1e-3)


WHOLE_RECORD = {"key": "1", "answer": "a", "seconds": 1, "asked": "question 1", "finish": "eos", "tokens": 1}


@pytest.mark.parametrize(
    "line",
    ["{}", "[1]", "nonsense", '{"key": "1"}', "\udcff", '{"key": "1", "key": "2"}', "null"]
    + [json.dumps({**WHOLE_RECORD, name: value}) for name in ("key", "answer", "asked") for value in (None, 3, ["a"])]
    + [json.dumps({**WHOLE_RECORD, "seconds": value}) for value in (None, "1", True, [])],
)
def test_a_foreign_answers_file_is_refused(tmp_path, line):
    head = '{"run": {}}\n{"session": 0}\n'
    (tmp_path / "answers.jsonl").write_bytes(f"{head}{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"answers\.jsonl, line 3: not a record of an evaluation"):
        log_of(tmp_path, {}, "1")


@pytest.mark.parametrize("head", ['{"session": 0}\n', json.dumps(WHOLE_RECORD) + "\n", '{"run": {}}\n'])
def test_an_answers_file_without_its_head_is_refused(tmp_path, head):
    (tmp_path / "answers.jsonl").write_text(head + json.dumps(WHOLE_RECORD) + "\n")
    with pytest.raises(DataError, match=r"answers\.jsonl, line [12]: not a record of an evaluation"):
        log_of(tmp_path, {}, "1")


def test_what_an_answer_belongs_to():
    """Prompt, pictures, their number and their order, and what the protocol prescribes: all different."""
    plain = Question(key="1", id=1, prompt="a")
    variants = [
        asked(plain, []),
        asked(plain, ["x"]),
        asked(plain, ["x", "y"]),
        asked(plain, ["y", "x"]),
        asked(plain, ["xy"]),
        asked(plain, ["x", "x"]),
        asked(Question(key="1", id=1, prompt="ax"), []),
        asked(Question(key="1", id=1, prompt="a\0x"), []),
        asked(Question(key="1", id=1, prompt="a", canned="x"), []),
        asked(Question(key="1", id=1, prompt="a", canned=""), []),
        asked(Question(key="1", id=1, prompt="a\ud800"), []),
    ]
    assert len(set(variants)) == len(variants)
    assert asked(plain, ["x"]) == asked(Question(key="2", id=7, prompt="a", truth="b", category="c"), ["x"])


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files cannot grow beyond 700 bytes, as on a disk that is all but full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_answers_before_a_full_disk_are_kept(tmp_path, small_files):
    keys = [str(n) for n in range(20)]
    with (
        pytest.raises(UserError, match=r"answers\.jsonl: cannot be written: File too large"),
        log_of(tmp_path, {}, *keys) as first,
    ):
        for key in keys:
            first.add(key, "x" * 50, finish="eos")
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    kept = len(log_of(tmp_path, {}, *keys).records)
    assert 1 <= kept <= 5
    with log_of(tmp_path, {}, *keys) as second:
        for key in keys[kept:]:
            second.add(key, "x" * 50, finish="eos")
    assert list(log_of(tmp_path, {}, *keys).records) == keys


def test_answers_in_a_folder_that_is_removed_are_kept(tmp_path, caplog):
    keys = [str(n) for n in range(6)]
    with log_of(tmp_path / "out", {}, *keys) as log:
        for key in keys:
            log.add(key, key, finish="eos")
            if key == "3":
                shutil.rmtree(tmp_path / "out")
    assert log_of(tmp_path / "out", {}, *keys).texts == {k: k for k in keys}


@pytest.mark.parametrize("where", ["file", "file/below", "file/far/below"])
def test_an_output_that_cannot_be_written_is_a_sentence(evaluate, finished, folder, tmp_path, where, caplog):
    (tmp_path / "file").write_text("")
    arguments = ["--benchmarks", "custom", "--data", finished / "data", "--output", tmp_path / where]
    assert cli.main([str(a) for a in (folder, *arguments)]) == 2
    with pytest.raises(UserError, match=r"file.*: cannot be written: .*name another folder"):
        evaluate(finished / "data", tmp_path / where)
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(finished / "data", tmp_path / where, blind=True)


def test_results_that_cannot_be_written_are_a_sentence(evaluate, finished, tmp_path):
    """Each of the files in turn is a folder that nothing can replace."""
    for name in ("results.json", "verdicts.jsonl", "official", "../results.json"):
        out = tmp_path / name.replace("/", "_")
        shutil.copytree(finished / "out", out)
        path = out / "custom" / name
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("")
        else:
            path.unlink()
            (path / "in the way").mkdir(parents=True)
        with pytest.raises(UserError, match="cannot be written"):
            evaluate(finished / "data", out)
        assert (out / "custom/answers.jsonl").read_bytes() == (finished / "out/custom/answers.jsonl").read_bytes()


def test_half_a_surrogate_pair_is_written_escaped():
    assert json.loads(line_of({"a": "\ud800é"})) == {"a": "\ud800é"} and "\\ud800" in line_of({"a": "\ud800"})
    assert line_of({"a": "é"}) == '{"a": "é"}\n'

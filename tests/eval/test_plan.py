"""What is checked before a model loads: layouts, counts, images, options; and the readers of files and answers."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval import layouts
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Count
from tinyllava_fast.eval.files import is_file, is_folder
from tinyllava_fast.eval.official import read_answers, write_llava_answers
from tinyllava_fast.eval.options import build, chosen, describe
from tinyllava_fast.eval.plan import make_plans


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return layouts.build_all(tmp_path_factory.mktemp("eval"))


@pytest.mark.parametrize("name", sorted(layouts.BUILDERS))
def test_official_layouts(name, suite):
    """The root of all benchmarks and the benchmark's own folder give the same questions."""
    (plan,) = make_plans(build([name]), suite)
    own = plan.files["questions"].parent
    assert make_plans(build([name]), own)[0].questions == plan.questions
    assert all(image.is_file() for q in plan.questions for image in q.images)
    assert len({q.key for q in plan.questions}) == len(plan.questions) > 1
    said = plan.report()
    assert "expected" in said and plan.questions[0].prompt.splitlines()[0] in said


def test_what_is_missing_where_and_where_from(suite, tmp_path):
    shutil.copytree(suite, tmp_path / "eval")
    (tmp_path / "eval/gqa/data/testdev_balanced_questions.json").unlink()
    shutil.rmtree(tmp_path / "eval/pope/val2014")
    with pytest.raises(UserError) as error:
        make_plans(build(["gqa", "pope", "textvqa"]), tmp_path / "eval")
    said = str(error.value)
    for part in (
        "gqa: testdev_balanced_questions.json is missing",
        "eval/gqa/data/questions1.2/testdev_balanced_questions.json",
        "cs.stanford.edu",
        "pope: val2014 is missing",
        "val2014.zip",
    ):
        assert part in said
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        make_plans(build(["gqa"]), tmp_path / "none")


def test_count_differences_are_one_line_each(suite, caplog, monkeypatch):
    monkeypatch.setattr("tinyllava_fast.eval.plan.log.propagate", True)
    with caplog.at_level(logging.WARNING, logger="tinyllava_fast"):
        make_plans(build(["textvqa"]), suite)
    assert [r.getMessage() for r in caplog.records] == [
        "textvqa: questions: 4 found, 5,000 expected (-4,996)",
        "textvqa: images: 3 found, 3,166 expected (-3,163)",
    ]
    assert str(Count("questions", 5000, 5000)) == "questions: 5,000"


def test_a_file_name_that_no_file_can_have(tmp_path):
    for option in ("custom.file=" + "x" * 5000, "custom.images=" + "x" * 300):
        with pytest.raises(UserError, match=r"is missing. Looked for"):
            make_plans(build(["custom"], [option]), tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        make_plans(build(["custom"]), tmp_path / ("x" * 300))


def test_missing_images(suite, tmp_path):
    shutil.copytree(suite / "textvqa", tmp_path / "textvqa")
    (tmp_path / "textvqa/train_images/bb.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images are missing, the first is .*bb\.jpg"):
        make_plans(build(["textvqa"]), tmp_path)
    assert len(make_plans(build(["textvqa"]), tmp_path, missing_images="empty")[0].missing_images) == 1
    assert make_plans(build(["textvqa"]), tmp_path, limit=2)[0].missing_images == []
    for image in (tmp_path / "textvqa/train_images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="3 of 3 images are missing"):
        make_plans(build(["textvqa"]), tmp_path, missing_images="empty")


def test_a_repeated_or_broken_line(suite, tmp_path):
    shutil.copytree(suite / "gqa", tmp_path / "gqa")
    path = tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl"
    lines = path.read_text().splitlines()
    for text, said in (
        ("\n".join([*lines, lines[1]]), r"line 6: '20001' stands in line 2 already"),
        (lines[0] + "\n[1]", "line 2: expected a JSON object, got"),
        (lines[0] + '\n{"text"', "line 2: not JSON"),
        ('{"text": ""}', "line 1: no field 'question_id'; it has 'text'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            make_plans(build(["gqa"]), tmp_path)


def test_scorers_do_not_import_torch():
    code = (
        "import sys; from tinyllava_fast.eval.benchmarks.base import BENCHMARKS; BENCHMARKS.names();"
        "import tinyllava_fast.eval.compare; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_options():
    assert set(layouts.BUILDERS) <= set(chosen("all")) and not {"custom", "easy_vqa"} & set(chosen("all"))
    assert chosen("pope, gqa") == ["pope", "gqa"]
    options = ["textvqa.ocr=false", "pope.protocol=llava", "custom.max_new_tokens=9"]
    built = build(["textvqa", "pope", "custom"], options)
    assert [describe(b) for b in built[:2]] == [{"ocr": False}, {"protocol": "llava"}]
    assert built[2].options.max_new_tokens == 9


@pytest.mark.parametrize(
    ("names", "option", "said"),
    [
        ("gqqa", "", "unknown benchmark 'gqqa'; did you mean 'gqa'"),
        ("gqa,gqa", "", "each once"),
        ("", "", "one or more names"),
        ("gqa", "textvqa.ocr=true", "'textvqa' is not chosen"),
        ("textvqa", "textvqa.orc=true", "no option 'orc'; did you mean 'ocr'"),
        ("textvqa", "textvqa.ocr=1", "textvqa.ocr: expected bool, got '1'"),
        ("pope", "pope.protocol=x", "pope.protocol: expected one of 'tinyllava', 'llava', got 'x'"),
        ("custom", "custom.max_new_tokens=x", "custom.max_new_tokens: expected int, got 'x'"),
        ("custom", "custom.max_new_tokens=1.5", "custom.max_new_tokens: expected int, got '1.5'"),
        ("custom", "custom.max_new_tokens=nan", "custom.max_new_tokens: expected"),
        ("custom", "custom.max_new_tokens=", "custom.max_new_tokens: expected int, got ''"),
        ("custom", "custom.max_new_tokens=0", "custom.max_new_tokens: expected a whole number of at least 1"),
        ("custom", "custom.max_new_tokens=-1", "custom.max_new_tokens: expected a whole number of at least 1"),
        ("custom", "custom.file=", "custom.file: expected"),
        ("custom", "custom.images= ", "custom.images: expected"),
        ("custom", "custom.file=a\udce9", "the value is not UTF-8 text"),
        ("custom", "custom.metric=Exact", "custom.metric: expected one of 'exact', 'contains'"),
        ("mmvet", "mmvet.timeout_s=nan", "mmvet.timeout_s: expected"),
        ("mmvet", "mmvet.timeout_s=inf", "mmvet.timeout_s: expected"),
        ("mmvet", "mmvet.timeout_s=0", "mmvet.timeout_s: expected a number above 0"),
        ("mmvet", "mmvet.runs=0", "mmvet.runs: expected a whole number of at least 1"),
        ("mmvet", "mmvet.max_tokens=-1", "mmvet.max_tokens: expected a whole number of at least 0"),
        ("mmvet", "mmvet.judge=", "mmvet.judge: expected"),
        ("mmvet", "mmvet.base_url=ftp://x", "begins with http"),
        ("gqa", "gqa", "write BENCHMARK.OPTION=VALUE"),
    ],
)
def test_bad_names_and_options(names, option, said):
    with pytest.raises(UserError, match=said):
        build(chosen(names), [option] if option else [])


@pytest.mark.parametrize("name", sorted(layouts.BUILDERS))
def test_llava_answers_can_be_read_again(name, suite, tmp_path):
    (plan,) = make_plans(build([name]), suite)
    answers = {q.key: f"answer {i}" for i, q in enumerate(plan.questions)}
    path = tmp_path / "answers.jsonl"
    write_llava_answers(plan.benchmark, plan.questions, answers, path, "exp")
    assert read_answers(path, plan.benchmark, plan.everything) == answers
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(DataError, match=rf"line {len(lines) + 1}: question .* is answered in line 1 already"):
        read_answers(path, plan.benchmark, plan.everything)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question_id": "zz", "text": ""}, "question_id 'zz' is not one of textvqa's"),
        ({"question_id": "aa", "text": ""}, "no field 'prompt'"),
        ({"question_id": "aa", "text": "", "prompt": "x"}, "no question 'aa' of textvqa has this prompt"),
        ({"question_id": "bb", "text": None}, "text: is null; give it a value"),
        ({"key": "9:aa", "answer": "x"}, "question '9:aa' is not one of textvqa's 4"),
        ({"id": "aa"}, "no field 'question_id'"),
        ({"question_id": None, "text": "x"}, "question_id: is null"),
        ({"question_id": True, "text": "x"}, "question_id: expected text or a whole number, got true"),
        ({"question_id": "bb", "text": 7}, "text: expected text, got 7"),
        ({"question_id": "bb", "text": ["x"]}, "text: expected text, got"),
        ({"question_id": "bb", "text": "\ud83d"}, "text: expected text, got .*half of a surrogate pair"),
        ({"key": "2:bb", "answer": None}, "answer: is null"),
        ({"key": 2, "answer": "x"}, "key: expected text"),
    ],
)
def test_foreign_answers(record, said, suite, tmp_path):
    (plan,) = make_plans([BENCHMARKS.get("textvqa")()], suite)
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"answers.jsonl, line 1: {said}"):
        read_answers(path, plan.benchmark, plan.everything)
    with pytest.raises(DataError, match="no such answers file"):
        read_answers(tmp_path / "none", plan.benchmark, plan.everything)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it holds no answer"),
        (b'{"run": {}}\n{"session": 0}\n', "it holds no answer"),
        (
            '{"question_id": "bb", "text": "\u00e9"}'.encode("cp1252"),
            r"not UTF-8 text \(.* in line 1, byte 31",
        ),
        ('{"question_id": "bb", "text": "\u00e9"}'.encode("utf-16"), r"not UTF-8 text \(it is UTF-16\)"),
        (b'{"question_id": "bb", "text": "a", "text": "b"}', "line 1: the field 'text' stands twice"),
        (b"[" * 100_000, "line 1: .*nested too deep"),
        (b"<html>", "line 1: .*seems to be a web page"),
        (b'"bb"', "line 1: expected a JSON object"),
        (b'{"question_id": "bb", "text": "a', "line 1: not JSON"),
    ],
    ids=range(9),
)
def test_answers_files_that_are_something_else(data, said, suite, tmp_path):
    (plan,) = make_plans([BENCHMARKS.get("textvqa")()], suite)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=said) as error:
        read_answers(path, plan.benchmark, plan.everything)
    assert str(error.value).startswith(str(path))
    path.write_bytes('{"question_id": "bb", "text": "\u00e9"}\r\n'.encode("utf-8-sig"))
    assert read_answers(path, plan.benchmark, plan.everything) == {"2:bb": "\u00e9"}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(36, "File name too long")])
def test_paths_that_may_not_be_looked_at_lead_nowhere(error):
    """As below a folder that another user has closed."""

    class Closed(type(Path())):
        def stat(self, **_):
            raise error

    assert not is_file(Closed("a")) and not is_folder(Closed("a"))

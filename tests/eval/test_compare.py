"""Two models paired by question, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from tests.eval.layouts import write_jsonl
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval import cli
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.compare import compare
from tinyllava_fast.eval.plan import make_plans
from tinyllava_fast.eval.results import write_json


def results(folder, credits, benchmark="gqa"):
    """credits: key -> (image, credit)."""
    write_json(folder / "results.json", {"benchmark": benchmark})
    rows = [f'{{"key": "{k}", "images": ["{i}"], "credit": {c}}}' for k, (i, c) in credits.items()]
    (folder / "verdicts.jsonl").write_text("\n".join(rows))
    return folder


def test_by_hand(tmp_path):
    a = results(tmp_path / "a", {"1": ("x", 1), "2": ("x", 0), "3": ("y", 0), "4": ("z", 1), "5": ("z", 1)})
    b = results(tmp_path / "b", {"4": ("z", 0), "3": ("y", 1), "2": ("x", 1), "1": ("x", 1), "6": ("w", 1)})
    found = compare(a, b)
    assert (found.questions, found.only_a, found.only_b) == (4, 1, 1)
    assert (found.a, found.b, found.b_better, found.a_better, found.binary) == (0.5, 0.75, 2, 1, True)
    # differences 0, 1 (image x), 1 (y), -1 (z); mean .25; residuals by image .5, .75, -1.25
    assert found.stderr == pytest.approx(math.sqrt(0.25 + 0.5625 + 1.5625) / 4)
    assert found.p_sign == 1.0
    assert found.p_difference == pytest.approx(math.erfc(0.25 / found.stderr / math.sqrt(2)))
    said = str(found)
    assert "B - A = +25.00" in said and "McNemar" in said and "1 questions of A alone" in said
    mirrored = compare(b, a)
    assert (mirrored.stderr, mirrored.p_sign) == pytest.approx((found.stderr, found.p_sign))


def test_soft_credit_and_one_image(tmp_path):
    a = results(tmp_path / "a", {"1": ("x", 0.3), "2": ("x", 0.6)})
    b = results(tmp_path / "b", {"1": ("x", 0.6), "2": ("x", 1)})
    found = compare(a, b)
    assert found.stderr is None and found.p_difference is None and "exact sign test" in str(found)
    assert compare(a, a).b_better == 0


def test_refusals(tmp_path):
    a = results(tmp_path / "a", {"1": ("x", 1)})
    for other, said in (
        (results(tmp_path / "b", {"1": ("x", 1)}, "pope"), "only one benchmark"),
        (results(tmp_path / "c", {"2": ("x", 1)}), "no scored question in common"),
        (results(tmp_path / "d", {"1": ("x", "null")}), "no scored question in common"),
        (tmp_path / "e.jsonl", "give --data and one name"),
    ):
        with pytest.raises(UserError, match=said):
            compare(a, other)


ASKED = {"prompt": "what?", "truth": "red", "pictures": ["aa", "bb"]}


def asked_results(folder, **changes):
    """Three questions; changes: key -> what is otherwise in its verdict."""
    write_json(folder / "results.json", {"benchmark": "custom"})
    rows = [{"key": k, "images": [k], "credit": 1.0, **ASKED, **changes.get(k, {})} for k in "xyz"]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


DIFFERENT = [
    ({"x": {"pictures": ["aa", "cc"]}}, "1 of 3 .* 1 in their pictures"),
    ({"x": {"pictures": ["bb", "aa"]}, "z": {"pictures": []}}, "2 of 3 .* 2 in their pictures"),
    ({"y": {"prompt": "what? "}}, "1 of 3 .* 1 in their prompt"),
    ({"y": {"truth": "blue"}}, "1 of 3 .* 1 in their right answer"),
    ({"x": {"prompt": "a", "truth": "b", "pictures": []}}, "1 of 3 .* 1 in their prompt .* pictures"),
    (
        {"x": {"prompt": "a"}, "y": {"truth": "b"}},
        r"2 of 3 .* prompt \(first: 'x'\), 1 in their right answer \(first: 'y'",
    ),
]


@pytest.mark.parametrize(("changes", "said"), DIFFERENT)
def test_runs_over_different_data_are_refused_or_counted(tmp_path, changes, said):
    a, b = asked_results(tmp_path / "a"), asked_results(tmp_path / "b", **changes)
    for pair in ((a, b), (b, a)):
        with pytest.raises(UserError, match=f"are about different data: {said}.*--allow-different"):
            compare(*pair)
    found = compare(a, b, allow_different=True)
    assert found.questions == 3 and sum(found.different.values()) == sum(len(c) for c in changes.values())
    assert "asked differently" in str(found) and "asked differently" not in str(compare(a, a))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"x": {"images": ["elsewhere/x"]}},  # a folder that was moved
        {"x": {"pictures": None}},  # a blind run
        {"x": {"answer": "?", "finish": "length"}},
        {"x": {"credit": None, "prompt": "not scored"}},
    ],
)
def test_the_same_data_may_be_compared(tmp_path, changes):
    found = compare(asked_results(tmp_path / "a"), asked_results(tmp_path / "b", **changes))
    assert not found.different and found.questions == 3 - ("credit" in changes.get("x", {}))


def test_an_answers_file_and_a_folder(tmp_path):
    """The plan's prompts and right answers are those of the file; its pictures are not known."""
    row = {"id": "x", "image": "x.png", "question": "what?", "answer": "red"}
    write_jsonl(tmp_path / "questions.jsonl", [row])
    write_jsonl(tmp_path / "file.jsonl", [{"key": "x", "answer": "red"}])
    (plan,) = make_plans([BENCHMARKS.get("custom")()], tmp_path, missing_images="ignore")
    folder = asked_results(tmp_path / "a")
    assert compare(tmp_path / "file.jsonl", folder, plan).questions == 1
    write_jsonl(tmp_path / "questions.jsonl", [{**row, "answer": "blue"}])
    (plan,) = make_plans([BENCHMARKS.get("custom")()], tmp_path, missing_images="ignore")
    with pytest.raises(UserError, match="1 in their right answer"):
        compare(tmp_path / "file.jsonl", folder, plan)


def test_the_command_says_so(tmp_path, capsys, caplog):
    a, b = asked_results(tmp_path / "a"), asked_results(tmp_path / "b", x={"pictures": []})
    assert cli.main(["--compare", str(a), str(b)]) == 2
    assert cli.main(["--compare", str(a), str(b), "--allow-different"]) == 0
    assert "asked differently, on so many questions: pictures 1" in capsys.readouterr().out

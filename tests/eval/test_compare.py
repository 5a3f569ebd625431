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
    (tmp_path / "e.jsonl").write_text("")
    for other, said in (
        (results(tmp_path / "b", {"1": ("x", 1)}, "pope"), "only one benchmark"),
        (results(tmp_path / "c", {"2": ("x", 1)}), "no scored question in common"),
        (results(tmp_path / "d", {"1": ("x", "null")}), "no scored question in common"),
        (tmp_path / "e.jsonl", "give --data and one name"),
        (tmp_path / "f", "no such results folder or answers file"),
        (tmp_path / ("f" * 300), "no such results folder or answers file"),
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


def old_results(folder, *without, **options):
    """As an older version wrote them: without some fields."""
    write_json(folder / "results.json", {"benchmark": "custom", "options": options})
    rows = [{"key": k, "images": [k], "credit": 1.0, **ASKED} for k in "xyz"]
    kept = [{name: value for name, value in row.items() if name not in without} for row in rows]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


@pytest.mark.parametrize("without", [["pictures"], ["pictures", "prompt", "truth"]])
def test_pictures_that_are_not_on_record_are_said(tmp_path, without):
    new, old = asked_results(tmp_path / "new"), old_results(tmp_path / "old", *without)
    for pair, names in (((new, old), "B"), ((old, new), "A"), ((old, old), "A and B")):
        assert f"pictures not compared, those of {names} are not on record" in str(compare(*pair))
    assert "not compared" not in str(compare(new, new))


def test_runs_that_are_scored_differently_are_refused_or_said(tmp_path):
    exact, contains = old_results(tmp_path / "a", metric="exact"), old_results(tmp_path / "b", metric="contains")
    longer = old_results(tmp_path / "c", metric="exact", max_new_tokens=9)
    with pytest.raises(UserError, match=r"custom\.metric is 'exact' for A and 'contains' for B; .* --allow-different"):
        compare(exact, contains)
    said = str(compare(exact, contains, allow_different=True))
    assert "scored differently: custom.metric is 'exact' for A and 'contains' for B" in said
    assert "scored" not in str(compare(exact, longer)) and "scored" not in str(compare(exact, asked_results(exact)))


BAD_VERDICTS = [
    ({"credit": "x"}, "credit: expected a number"),
    ({"credit": math.nan}, "credit: expected a number"),
    ({"credit": True}, "credit: expected a number"),
    ({"images": None}, "images: is null"),
    ({"images": "a"}, "images: expected a list"),
    ({"images": [1]}, "images: expected a list of texts"),
    ({"key": 3}, "key: expected text"),
    ({"pictures": "x"}, "pictures: expected a list"),
    ({"prompt": 3}, "prompt: expected text"),
    ({"truth": [1]}, "truth: expected text"),
]


@pytest.mark.parametrize(("change", "said"), BAD_VERDICTS, ids=[str(c) for c, _ in BAD_VERDICTS])
def test_verdicts_with_a_field_of_another_kind(tmp_path, change, said):
    a, b = asked_results(tmp_path / "a"), asked_results(tmp_path / "b", y=change)
    with pytest.raises(UserError, match=rf"b/verdicts\.jsonl, line 2: {said}"):
        compare(a, b)


@pytest.mark.parametrize("content", ["[]", "{}", '{"benchmark": ', '{"benchmark": "custom", "options": [1]}'])
def test_results_that_are_none(tmp_path, content):
    a, b = asked_results(tmp_path / "a"), asked_results(tmp_path / "b")
    (b / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"b/results\.json: "):
        compare(a, b)

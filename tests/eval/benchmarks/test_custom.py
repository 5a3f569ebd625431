"""A user's own questions: records, metrics, refusals."""

from __future__ import annotations

import json
import logging
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


OPTIONS = [
    ["-1", "1"],
    ["C", "C++", "C#"],
    ["1,000", "1000"],
    ["none", "0"],
    ["zero", "0", "none"],
    ["B", "A"],
    ["<", ">", "="],
    ["a", "an", "the"],
    ["+", "-"],
    ["A", "a"],
    ["yes", "Yes"],
    ["cat", "the cat"],
    ["dont", "don't"],
    ["1", "one", "I"],
    ["3.5", "35"],
    ["", "."],
    ["caf\u00e9", "cafe"],
    [1, 2.5, "2,5"],
    ["A. cat", "B. dog"],
    ["Answer: B", "x"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=map(str, OPTIONS))
def test_each_option_as_a_reply_names_itself_alone(tmp_path, options):
    """Also options that normalization makes equal or empty, and options that are letters."""
    choices = [c for c in options if c != ""]
    for truth in choices:
        earned = [score(tmp_path, "choice", {"choices": choices, "answer": truth}, str(reply)) for reply in choices]
        assert earned == [100.0 * (reply == truth) for reply in choices], truth


LETTERS = [
    *("B", "b", "(B)", "[b]", "B.", "B)", "B:", "**B**", "**B.** dog", "B, because it barks", "`B`", " B\n"),
    *("Answer: B", "answer: B.", "The answer is B", "The correct answer is (B).", "Option B", "option B: dog"),
    *("The right option is B.", "B is right", "B is the correct answer.", "Option B is correct", "Final answer: **B**"),
    *("The answer is option B", "My answer is B."),
]
NO_LETTERS = [
    *("", " ", "Both", "bed", "A or B", "Answer: A or B", "B is wrong", "Option B is wrong", "B is not right"),
    *("the answer is b and a", "Be careful", "B-side", "I think so", "Answer: none", "Z", "Answer: Z", "option"),
    *("the answer is a", "A is B"),
]


@pytest.mark.parametrize("reply", LETTERS)
def test_forms_of_a_letter(tmp_path, reply):
    earned = [score(tmp_path, "choice", {"choices": ["cat", "dog", "cow"], "answer": t}, reply) for t in "ABC"]
    assert earned == [0, 100, 0]


@pytest.mark.parametrize("reply", NO_LETTERS)
def test_texts_that_name_no_letter(tmp_path, reply):
    for truth in ("A", "B", "C"):
        assert score(tmp_path, "choice", {"choices": ["cat", "dog", "cow"], "answer": truth}, reply) == 0


def test_several_right_options_all_count(tmp_path):
    record = {"choices": ["cat", "dog", "cow"], "answer": ["B", "cow"]}
    assert [score(tmp_path, "choice", record, r) for r in ("A", "B", "C", "dog", "")] == [0, 100, 100, 100, 0]


@pytest.mark.parametrize("metric", ["exact", "contains", "vqa", "choice"])
@pytest.mark.parametrize("truth", ["<", "the", "...", "A", "none", "0"])
@pytest.mark.parametrize("reply", ["", " ", "\n"])
def test_an_empty_reply_earns_nothing(tmp_path, metric, truth, reply):
    record = {"answer": [truth] * 10, "choices": [truth, "x"]}
    assert score(tmp_path, metric, record, reply) == 0
    assert score(tmp_path, metric, record, truth) == 100


@pytest.mark.parametrize(
    ("metric", "truth", "reply", "points"),
    [
        ("exact", "<", ">", 0),
        ("exact", "<", "<", 100),
        ("exact", "the", "an", 0),
        ("exact", "A", "A.", 100),
        ("exact", "A", "(a)", 100),
        ("exact", "-1", "1", 0),
        ("exact", "1", "-1", 0),
        ("exact", "-1", "-1.", 100),
        ("exact", "-1", "\u22121", 0),  # the mathematical minus is a letter to the normalization
        ("exact", -2, "-2", 100),
        ("exact", 0.5, "0.5", 100),
        ("exact", 3, "three", 100),
        ("exact", "1,000", "1000", 100),
        ("contains", "<", "a < b", 100),
        ("contains", "<", "a > b", 0),
        ("contains", "the", "cat", 0),
        ("vqa", "<", ">", 0),
        ("vqa", "<", "<", 100),
    ],
)
def test_truths_that_normalization_empties_and_signs(tmp_path, metric, truth, reply, points):
    answer = [truth] * 10 if metric == "vqa" else truth
    assert score(tmp_path, metric, {"answer": answer}, reply) == points


KINDS = [None, True, 7, 1.5, "", " ", "text", [], {}, [None], {"a": 1}, float("nan"), float("inf"), "\ud83d", "a\0b"]
MAY_BE = {
    "question": ["text", "a\0b"],
    "answer": [7, 1.5, "text", "a\0b"],
    "choices": [None],
    "image": [None, "text", []],
    "images": [None, []],
    "category": [None, 7, 1.5, "text", "a\0b"],
    "id": [None, 7, "text", "a\0b"],
}


@pytest.mark.parametrize("field", MAY_BE)
def test_every_field_of_every_kind(tmp_path, field):
    for value in KINDS:
        row = {"question": "q", "answer": "x", "image": None, "images": None, field: value}
        (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
        bench = CUSTOM(Options())
        if any(value is ok or (value == ok and type(value) is type(ok)) for ok in MAY_BE[field]):
            assert len(bench.questions(bench.locate(tmp_path))) == 1
            continue
        with pytest.raises(DataError, match=rf"questions.jsonl, line 1: {field}(\[0\])?: (expected .*got|is null)"):
            bench.questions(bench.locate(tmp_path))


@pytest.mark.parametrize(
    ("extra", "meant"),
    [
        ({"img": "a.png"}, "image"),
        ({"Image": "a.png"}, "image"),
        ({"imgae": "a.png"}, "image"),
        ({"image_path": "a.png"}, "image"),
        ({"picture": "a.png"}, "image"),
        ({"file_name": "a.png"}, "image"),
        ({"image_id": 5}, "image"),
        ({"imagse": ["a.png"]}, "image"),
        ({"option": ["x", "y"]}, "choices"),
        ({"options": ["x", "y"]}, "choices"),
        ({"choice": ["x", "y"]}, "choices"),
        ({"categroy": "x"}, "category"),
        ({"question_id": 7}, "id"),
        ({"answer": None, "label": "x"}, "answer"),
        ({"question": None, "text": "x"}, "question"),
        ({"question": None, "Question": "x"}, "question"),
    ],
)
def test_a_misspelt_field_is_refused(tmp_path, extra, meant):
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "q", "answer": "x", **extra}))
    bench = CUSTOM(Options())
    name = list(extra)[-1]
    with pytest.raises(DataError, match=rf"line 1: unknown field '{name}'; did you mean '{meant}'"):
        bench.questions(bench.locate(tmp_path))


def test_other_fields_are_named_once(tmp_path, caplog):
    row = {"question": "q", "answer": "x", "image": "a.png", "image_id": 3, "answer_type": "other", "note": 1}
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({**row, f"n{i // 2}": 1}) for i in range(40)))
    bench = CUSTOM(Options())
    with caplog.at_level(logging.WARNING, logger="tinyllava_fast"):
        assert len(bench.questions(bench.locate(tmp_path))) == 40
    (said,) = [record.getMessage() for record in caplog.records]
    assert "fields that are not used: 'image_id' (first in line 1), 'answer_type' (first in line 1), " in said
    assert "'n1' (first in line 3)" in said and " and 15 others; known are id, question, answer" in said


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "<image> q"}, "question: it holds <image> but the line names no image"),
        ({"question": "<image> q", "image": ["a", "b"]}, "holds 1 <image> but the line names 2 images"),
        ({"image": "a", "images": ["b"]}, "images: given beside 'image'"),
        ({"images": "a.png"}, "images: expected a list of paths, got 'a.png'"),
        ({"choices": ["x", "x"]}, "choices: expected options that differ"),
        ({"choices": ["x", None]}, r"choices\[1\]: expected text or a number, got null"),
        ({"answer": False}, "answer: expected text or a number, got false; write the word in quotation marks"),
    ],
)
def test_fields_that_do_not_go_together(tmp_path, record, said):
    with pytest.raises(DataError, match=f"questions.jsonl, line 1: .*{said}"):
        score(tmp_path, "exact", {"answer": "x", **record}, "x")


def test_images_may_be_called_images_as_in_training_records(tmp_path):
    row = {"question": "<image> and <image>", "answer": "x", "images": ["1.png", "../2.png"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row), encoding="utf-8-sig")
    bench = CUSTOM(Options())
    (question,) = bench.questions(bench.locate(tmp_path))
    assert question.images == (tmp_path / "1.png", tmp_path / "../2.png")


@pytest.mark.parametrize(
    ("metric", "record", "said"),
    [
        ("exact", {}, "no field 'answer'"),
        ("exact", {"answer": []}, "answer: expected a list that is not empty"),
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


TYPED = [
    ("exact", 3.0, "3"),
    ("exact", 1e3, "1000"),
    ("exact", "caf\u00e9", "cafe\u0301"),
    ("exact", "don't", "don\u2019t"),
    ("exact", "\u201cyes\u201d", '"yes"'),
    ("exact", "3", "\uff13"),
    ("exact", "\u732b", "\u732b\u3002"),
    ("exact", "-1", "\uff0d1"),
    ("contains", "\u732b", "\u8fd9\u662f\u732b\u3002"),
    ("contains", "\u0e41\u0e21\u0e27", "\u0e19\u0e35\u0e48\u0e04\u0e37\u0e2d\u0e41\u0e21\u0e27"),
    ("contains", "it's", "I think it\u2019s so"),
    ("vqa", "don't", "don\u2019t"),
]


@pytest.mark.parametrize(("metric", "truth", "reply"), TYPED)
def test_the_same_words_in_other_characters(tmp_path, metric, truth, reply):
    """Accents of two kinds, quotes, full-width signs, marks and scripts without spaces; 3.0 in a file is 3."""
    answer = [truth] * 10 if metric == "vqa" else truth
    assert score(tmp_path, metric, {"answer": answer}, reply) == 100
    assert score(tmp_path, metric, {"answer": answer}, "x") == 0


def test_options_that_are_floats(tmp_path):
    """As a table with gaps exports whole numbers."""
    record = {"choices": [1.0, 2.0, 2.5], "answer": 2}
    assert [score(tmp_path, "choice", record, r) for r in ("1", "2", "2.5", "B")] == [0, 100, 0, 100]


@pytest.mark.parametrize("reply", ["B\nBecause it barks.", "b\n\nIt barks", "(B)\nIt barks", "Answer: B\nIt barks"])
def test_a_letter_on_a_line_of_its_own(tmp_path, reply):
    earned = [score(tmp_path, "choice", {"choices": ["cat", "dog", "cow"], "answer": t}, reply) for t in "ABC"]
    assert earned == [0, 100, 0]


@pytest.mark.parametrize("name", ["image_url", "img_file", "imagepath", "photo-name", "Picture_1", "main image", "pic"])
def test_a_field_that_seems_to_hold_a_picture(tmp_path, name):
    with pytest.raises(DataError, match=rf"unknown field '{name}'; did you mean 'image'"):
        score(tmp_path, "exact", {"answer": "a", name: "a.png"}, "a")
    for given in ({"image": None}, {"image": "a.png"}, {"images": ["a.png"]}):
        assert score(tmp_path, "exact", {"answer": "a", name: "a.png", **given}, "a") == 100
    assert score(tmp_path, "exact", {"answer": "a", "image_width": 640, "vision_note": "x", "picnic": "y"}, "a") == 100


@pytest.mark.parametrize("ids", [("2", None), (None, "1")])
def test_an_id_that_is_the_number_of_another_line(tmp_path, ids):
    rows = [{"question": "q", "answer": "a", **({"id": id} if id else {})} for id in ids]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 2: .* stands in line 1 already; .* give every line an id, or none"):
        CUSTOM().questions(CUSTOM().locate(tmp_path))

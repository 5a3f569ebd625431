from __future__ import annotations

import json
from collections import Counter

import pytest

from tinyllava_fast.data import easy_vqa
from tinyllava_fast.data.images import load_image
from tinyllava_fast.data.records import read_records
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.errors import DataError, UserError

pytest.importorskip("easy_vqa")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return easy_vqa.prepare(tmp_path_factory.mktemp("easy") / "data")


def test_counts_and_content(out):
    records = list(read_records(out / "train.json"))
    assert (len(records), sum(len(r.turns) for r in records)) == (4000, 38575)
    assert all(r.images and (out / "images" / r.images[0]).is_file() for r in records)
    template = TEMPLATES.get("llama")
    assert all(template.problem(r.turns, True) is None for r in records)
    questions = easy_vqa.load_questions(out)
    assert (len(questions), len({q["image"] for q in questions}), len({q["id"] for q in questions})) == (
        9673,
        1000,
        9673,
    )
    assert Counter(q["type"] for q in questions).keys() == {"yes/no", "shape", "color"}
    assert all((out / "images" / q["image"]).is_file() for q in questions[::100])
    assert len((out / "test.json").read_text().splitlines()) == 9673 + 2
    assert load_image(out / "images" / questions[0]["image"]).size == (64, 64)


def test_test_questions_are_the_packages(out):
    import easy_vqa as package

    questions, answers, images = package.get_test_questions()
    rows = [(q["question"], q["answer"], q["image"]) for q in easy_vqa.load_questions(out)]
    expected = zip(questions, answers, (f"test/{i}.png" for i in images), strict=True)
    assert sorted(rows) == sorted(expected)


def test_captions_say_what_the_train_answers_entail(out):
    turns = {r.images: r.turns for r in read_records(out / "train.json")}
    captions = list(read_records(out / "captions.json"))
    assert 3900 < len(captions) < 4000
    for record in captions:
        [(question, text)] = record.turns
        assert question == easy_vqa.CAPTION_PROMPT
        article, *_, shape = text.split()
        assert article == "a" and (shape in easy_vqa.SHAPES or shape == "shape")
        for _, answer in turns[record.images]:  # no answer speaks against the caption
            if answer in easy_vqa.SHAPES:
                assert answer == shape
            if answer in easy_vqa.COLORS:
                assert answer in text.split()


@pytest.mark.parametrize(
    "questions,expected",
    [
        ([("what is the blue shape?", "circle")], "a blue circle"),
        ([("what color is the shape?", "red")], "a red shape"),
        ([("is there not a circle?", "no")], "a circle"),
        ([("is no circle present?", "yes"), ("is there a triangle?", "no")], "a rectangle"),
        ([("does the image contain a red shape?", "yes"), ("what shape is present?", "triangle")], "a red triangle"),
        ([("is there a red shape?", "no")], None),
        ([], None),
    ],
)
def test_caption(questions, expected):
    assert easy_vqa.caption(questions) == expected


def test_tokenizer(out):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(out / "tokenizer")
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert len(tokenizer) <= easy_vqa.VOCABULARY
    assert TEMPLATES.get("llama").stop_id(tokenizer) == 2
    text = "what color is the rectangle? Ünknown 🐱"
    assert tokenizer(text).input_ids[0] == 1
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert AutoTokenizer.from_pretrained(out / "tokenizer")(text).input_ids == tokenizer(text).input_ids
    words = sum(len(tokenizer.tokenize(f" {word}")) for word in (*easy_vqa.SHAPES, *easy_vqa.COLORS, "yes", "no"))
    assert words == 13


def test_a_second_call_changes_nothing_and_the_first_is_atomic(out, tmp_path, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert easy_vqa.prepare(out) == out
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before

    def broken(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(easy_vqa, "_tokenizer", broken)
    with pytest.raises(RuntimeError):
        easy_vqa.prepare(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def fake_package(tmp_path, questions=4):
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "questions.json").write_text(json.dumps([["what shape is it?", "circle", 0]] * questions))
        (tmp_path / split / "images" / "0.png").write_bytes(b"")
    return tmp_path


def test_an_old_format_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(easy_vqa, "COUNTS", {"train": (1, 4), "test": (1, 4)})
    monkeypatch.setattr(easy_vqa, "_source", lambda: fake_package(tmp_path / "package"))
    old = tmp_path / "out"
    old.mkdir()
    (old / "easy_vqa.json").write_text('{"data": "easy-vqa", "format": 0}')
    easy_vqa.prepare(old)
    assert len(easy_vqa.load_questions(old)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "package"]


def test_errors(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds files that are not easy-VQA data; choose another folder"):
        easy_vqa.prepare(tmp_path / "mine")
    with pytest.raises(DataError, match=r"test.json: cannot be read.*tinyllava_fast.data.easy_vqa writes"):
        easy_vqa.load_questions(tmp_path)
    monkeypatch.setattr(easy_vqa, "_source", lambda: fake_package(tmp_path / "package"))
    with pytest.raises(DataError, match=r"1 images and 4 questions in train instead of \(4000, 38575\); reinstall"):
        easy_vqa.prepare(tmp_path / "new")
    assert easy_vqa.main(["--help"]) == easy_vqa.main([]) == easy_vqa.main([str(tmp_path / "mine")]) == 2
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(UserError, match="pip install easy-vqa"):
        easy_vqa.prepare(tmp_path / "none")


def test_command(out):
    assert easy_vqa.main([str(out)]) == 0

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tinyllava_fast.data.bpe import texts_of, train_tokenizer
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import DataError
from tinyllava_fast.prepare.survey import lengths, pictures


def test_pictures(own: Path) -> None:
    seen = pictures(own / "records.json", own / "images")
    assert seen is not None and (seen.count, seen.side) == (8, 20)
    assert seen.mean == (0.471, 0.157, 0.471)  # 120, 40 and 120 of 255
    assert seen.std == (0.314, 0.05, 0.314)  # 80 of 255; green never changes


def test_text_alone_has_no_pictures(tmp_path: Path) -> None:
    turn = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]
    (tmp_path / "r.json").write_text(json.dumps([{"conversations": turn}]))
    assert pictures(tmp_path / "r.json", tmp_path) is None


def test_missing_pictures_are_counted(own: Path) -> None:
    (own / "images" / "3.png").unlink()
    (own / "images" / "5.png").unlink()
    with pytest.raises(DataError, match=r"2 of 8 images are not in .*, the first is '3.png'"):
        pictures(own / "records.json", own / "images")


@pytest.mark.parametrize(
    ("image", "folder", "advice"),
    [
        ("https://host/a.png", "images", "pictures are not downloaded"),
        ("sub\\a.png", "images", "write / in place of"),
        ("a.png", "nowhere", "there is no such folder"),
        ("a.png", "records.json", "that is no folder"),
        (" 0.png", "images", "the first is ' 0.png'; the records' image paths are relative"),
    ],
)
def test_what_to_do_about_a_missing_picture(own: Path, image: str, folder: str, advice: str) -> None:
    rows = json.loads((own / "records.json").read_text())
    rows[0]["image"] = image
    (own / "records.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=re.escape(advice)):
        pictures(own / "records.json", own / folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "a question contains <image> but the record names no image"),
        ({"image": ["5.png", "6.png"]}, "the record lists 2 images but its questions hold 1 <image>"),
        ({"question": "what?"}, "the record names an image but no question contains <image>"),
        ({"question": "<IMAGE> what?"}, "the record names an image but no question contains <image>"),
        ({"answer": "red</s>blue"}, "answer 0 contains the template's own '</s>'"),
        ({"answer": "<image> red"}, "answer 0 contains the template's own '<image>'"),
    ],
)
def test_what_training_would_refuse_is_refused(own: Path, change: dict[str, object], message: str) -> None:
    rows = json.loads((own / "records.json").read_text())
    for place, key in enumerate(("question", "answer")):
        rows[5]["conversations"][place]["value"] = change.get(key, rows[5]["conversations"][place]["value"])
    rows[5]["image"] = change.get("image", "5.png")
    path = own / "records.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError) as error:
        lengths(path, TEMPLATES.get("llama"), train_tokenizer(texts_of([path]), 300), rows=16)
    assert str(error.value).startswith(f"{path}: record 5 (id '5', line 1): conversations: {message}")


def test_lengths_count_what_training_counts(own: Path) -> None:
    tokenizer = train_tokenizer(texts_of([own / "records.json"]), 300)
    template = TEMPLATES.get("llama")
    found = lengths(own / "records.json", template, tokenizer, rows=16)
    text = template.render([("Which colour?", "It is blue.")], tokenizer).text
    assert (found.records, found.images) == (8, 1)
    # The marker and its line break stand in front of the question.
    assert abs(found.longest - (len(tokenizer(text).input_ids) + 16)) <= 3
    assert found.mean <= found.longest
    assert lengths(own / "records.json", template, tokenizer, rows=17).longest == found.longest + 1

from __future__ import annotations

import json
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

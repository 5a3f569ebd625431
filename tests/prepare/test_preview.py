"""The page shows what is learnt, token by token, and nothing of a record gets out of its place in it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from tests.tiny import make_tokenizer
from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data.bpe import train_tokenizer
from tinyllava_fast.prepare.cli import main
from tinyllava_fast.prepare.preview import preview, tokens
from tinyllava_fast.prepare.sources import LookedAt


def looked(own: Path, rows: list[dict[str, object]] | None = None) -> LookedAt:
    if rows is not None:
        (own / "records.json").write_text(json.dumps(rows))
    data = DataConfig(records=str(own / "records.json"), image_folder=str(own / "images"))
    return LookedAt("set", data, make_tokenizer())


def spans(page: str) -> list[tuple[str, str]]:
    found = re.findall(r'<span class="([^"]*)" title="-?\d+">(.*?)</span>', page, re.DOTALL)
    return [(kinds, html.unescape(text).replace("↵", "")) for kinds, text in found]


def test_learnt_tokens_are_the_answer_and_its_end(own: Path) -> None:
    page = preview([looked(own)], 1, seed=3)
    found = spans(page)
    assert "".join(text for kinds, text in found if "learnt" in kinds).strip() in ("It is red.</s>", "It is blue.</s>")
    assert "USER: <image>\nWhich colour? ASSISTANT:" in "".join(text for _, text in found)
    assert [text for kinds, text in found if kinds == "picture"] == ["<image>"]
    assert [text for kinds, text in found if "special" in kinds] == ["<s>", "</s>"]
    assert page.count("data:image/png;base64,") == 1


def test_text_of_records_is_escaped(own: Path) -> None:
    evil = "<script>alert(1)</script>&amp; é猫"
    said = [{"from": "human", "value": evil}, {"from": "gpt", "value": evil}]
    page = preview([looked(own, [{"id": evil, "conversations": said}])], 5)
    assert "<script" not in page
    assert re.search(r"USER: <script>alert\(1\)</script>&amp;", "".join(text for _, text in spans(page)))


def test_words_keep_the_spaces_between_them() -> None:
    tokenizer = train_tokenizer(["It is red. It is blue. It is so."] * 4, 300)
    from tinyllava_fast.data.templates.base import Segment

    ids = tokenizer("It is red. It is blue.").input_ids
    assert "".join(text for _, text in spans(tokens(Segment(ids), tokenizer))) == tokenizer.decode(ids)


def test_a_draw_is_seeded_and_in_order(own: Path) -> None:
    def drawn(seed: int, count: int = 4) -> list[str]:
        return re.findall(r"<h2>Record (\d)</h2>", preview([looked(own)], count, seed))

    assert drawn(0) == drawn(0) == sorted(drawn(0)) and len(drawn(0)) == 4
    assert len({tuple(drawn(seed)) for seed in range(6)}) > 1
    assert len(drawn(0, 99)) == 8


def test_a_picture_that_cannot_be_shown_is_named(own: Path) -> None:
    (own / "images" / "0.png").write_bytes(b"")
    assert "the file is empty" in preview([looked(own)], 8)


def test_the_command_writes_the_page(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, images, out = str(own / "records.json"), str(own / "images"), own / "page.html"
    assert main(["preview", records, str(out), "--image-folder", images]) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    make_tokenizer().save_pretrained(own / "tokenizer")
    command = ["preview", records, str(out), "--image-folder", images, "--tokenizer", str(own / "tokenizer")]
    assert main([*command, "--samples", "0"]) == 2
    assert main([*command, "--samples", "2"]) == 0
    assert out.read_text(encoding="utf-8").count("<h2>Record ") == 2

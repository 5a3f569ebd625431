"""A small data set: squares of two colours, 20 x 12 pixels, with a question about each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with records.json, images/ and questions.jsonl."""
    (tmp_path / "images").mkdir()
    records, questions = [], []
    for number in range(8):
        name = list(COLOURS)[number % 2]
        Image.new("RGB", (20, 12), COLOURS[name]).save(tmp_path / "images" / f"{number}.png")
        messages = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": f"It is {name}."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": messages})
        questions.append({"image": f"{number}.png", "question": "Which colour?", "answer": f"It is {name}."})
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return tmp_path

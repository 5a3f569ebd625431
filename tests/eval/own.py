"""Questions of one's own about two pictures, and what a run said to them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.eval.layouts import write_jsonl
from tinyllava_fast.eval.results import read_verdicts

ROWS = [
    {"id": "one", "image": "a.bmp", "question": "what is it?", "answer": "x"},
    {"id": "two", "image": "b.bmp", "question": "what is it?", "answer": "x"},
    {"id": "both", "image": ["a.bmp", "b.bmp"], "question": "which is larger?", "answer": "x"},
]


RED, BLUE = (220, 40, 40), (40, 60, 220)


def picture(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)


def write_data(data: Path) -> None:
    picture(data / "a.bmp", RED)
    picture(data / "b.bmp", BLUE)
    write_jsonl(data / "questions.jsonl", ROWS)


def finishes(out: Path) -> dict[str, str]:
    return {v["key"]: v["finish"] for v in read_verdicts(out / "custom")}


def answers(out: Path) -> dict[str, str]:
    return {v["key"]: v["answer"] for v in read_verdicts(out / "custom")}

"""A small MME in the official layout: both places of the truth files, and a file with two spaces in its questions."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tinyllava_fast.eval.benchmarks.mme import SUBTASKS
from tinyllava_fast.eval.prompts import SHORT

FOLDERS = ("posters", "celebrity", "scene", "landmark", "artwork")


def build(root: Path, images: int = 2, *, nested: bool = False) -> None:
    """``images`` images a subtask, two questions each. nested: the release folder in one of the same name."""
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    if nested:
        release = release / release.name
    (release / "eval_tool").mkdir(parents=True)
    (release / "eval_tool" / "readme.txt").write_text("not a subtask")
    lines = []
    for number, subtask in enumerate(SUBTASKS):
        inside = subtask in FOLDERS
        for i in range(images):
            name = f"{subtask}/images/{i}.jpg" if inside else f"{subtask}/{i:04d}.png"
            path = release / name
            truth = release / subtask / (f"questions_answers_YN/{i}.txt" if inside else f"{i:04d}.txt")
            for parent in (path.parent, truth.parent):
                parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 20 + i), (15 * number, 100, 60 * i)).save(path)
            asked = [(f"Is there a {thing} in image {i}?", yes) for thing, yes in (("cat", "Yes"), ("dog", "No"))]
            space = "  " if subtask == "color" and i == 0 else " "
            truth.write_text("".join(f"{q}{space}Please answer yes or no.\t{yes}\n" for q, yes in asked))
            lines += [{"question_id": name, "image": name, "text": q + SHORT, "category": subtask} for q, _ in asked]
    (folder / "llava_mme.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

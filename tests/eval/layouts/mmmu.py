"""A small MMMU as TinyLLaVA Factory's archive and the official repository lay it out."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tinyllava_fast.eval.prompts import OPTION, SHORT


def build(root: Path) -> None:
    """Two subjects: three multiple-choice questions (one with two images, one without any) and an open one each."""
    folder = root / "MMMU"
    (folder / "all_images").mkdir(parents=True)
    (folder / "eval").mkdir()
    records, truths = [], {}
    for number, subject in enumerate(("Art_Theory", "Physics")):
        for i in range(4):
            id = f"validation_{subject}_{i + 1}"
            names = [f"{id}_{j + 1}.png" for j in range((1, 2, 0, 1)[i])]
            for j, name in enumerate(names):
                Image.new("RGB", (24 + j, 22 + i), (90 * number, 50 * i, 100 * j)).save(folder / "all_images" / name)
            record = {"id": id, "question_type": "short-answer"}
            if names:
                record["image"] = names[0] if len(names) == 1 else names
            question = "Compare <image 1> with <image 2>." if len(names) == 2 else f"<image 1> What is it, {i}?"
            if i < 3:
                options = {letter: f"thing {letter.lower()}" for letter in "ABCD"[: 3 + number]}
                lines = [question, *(f"({letter}) {text}" for letter, text in options.items()), OPTION]
                record |= {"question_type": "multiple-choice", "all_choices": list(options), "index2ans": options}
                record["prompt"] = "\n".join(lines)
            else:
                record["prompt"] = question + SHORT
            records.append(record)
            truths[id] = {"question_type": record["question_type"], "ground_truth": "B" if i < 3 else ["24/7", "3.43"]}
    (folder / "anns_for_eval.json").write_text(json.dumps(records))
    (folder / "eval" / "answer_dict_val.json").write_text(json.dumps(truths))

"""A small ScienceQA in the official layout."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def build(root: Path, questions: int = 9) -> None:
    """Every third question is text only; images are RGB, palette and RGBA in turn; two to five options."""
    folder = root / "scienceqa"
    problems, records = {}, []
    for i in range(questions):
        id, choices = str(10 + 3 * i), [f"option {j}" for j in range(2 + i % 4)]
        pictured = i % 3 < 2
        problems[id] = {
            "question": f"Question {i}?",
            "choices": choices,
            "answer": i % len(choices),
            "hint": "",
            "image": "image.png" if pictured else None,
            "subject": ("natural science", "social science")[i % 2],
            "split": "test",
        }
        lines = [f"Question {i}?", *(f"{'ABCDE'[j]}. {c}" for j, c in enumerate(choices))]
        record = {
            "id": id,
            "conversations": [
                {"from": "human", "value": "<image>\n" * pictured + "\n".join(lines)},
                {"from": "gpt", "value": f"The answer is {'ABCDE'[i % len(choices)]}."},
            ],
        }
        if pictured:
            record["image"] = f"{id}/image.png"
            path = folder / "images" / "test" / record["image"]
            path.parent.mkdir(parents=True)
            Image.new("RGB", (30 + i, 20), (40 * i % 256, 90, 10)).convert(("RGB", "P", "RGBA")[i % 3]).save(path)
        records.append(record)
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(records))
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))

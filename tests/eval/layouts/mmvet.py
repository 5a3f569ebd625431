"""A small MM-Vet in the official layout, without the evaluator's file."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

CAPABILITIES = (["rec"], ["ocr", "math"], ["rec", "know", "gen"], ["ocr", "spat"])


def build(root: Path, questions: int = 6) -> None:
    """Two questions an image; annotations and images in a folder within the folder, as its archive unpacks."""
    folder = root / "mm-vet"
    (folder / "mm-vet" / "images").mkdir(parents=True)
    metadata, lines = {}, []
    for i in range(questions):
        image = f"v1_{i // 2}.png"
        Image.new("RGB", (20, 24 + i), (40 * (i // 2), 30, 200)).save(folder / "mm-vet" / "images" / image)
        metadata[f"v1_{i}"] = {
            "imagename": image,
            "question": f"What is thing {i}?",
            "answer": "red<AND>round" if i % 2 else "a<OR>b",
            "capability": CAPABILITIES[i % 4],
        }
        lines.append({"question_id": i, "image": image, "text": f"What is thing {i}?", "category": "conv"})
    (folder / "llava-mm-vet.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "mm-vet" / "mm-vet.json").write_text(json.dumps(metadata))
    (folder / "mm-vet" / "bard_set.json").write_text(json.dumps(["v1_0", "v1_3"]))

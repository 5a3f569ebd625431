"""Small folders in each benchmark's official layout: a few questions, tiny images. One builder a benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyllava_fast.eval.prompts import SHORT


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Random images, each name its own."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(list(name.encode()))
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def vqav2(root: Path) -> None:
    """Six test-dev questions about two images; three more ids in test2015."""
    ids = list(range(262144000, 262144009))
    rows = [
        {
            "question_id": id,
            "image": f"COCO_test2015_{i % 2:012d}.jpg",
            "text": f"What is number {i}?{SHORT}",
            "category": "default",
        }
        for i, id in enumerate(ids)
    ]
    folder = root / "vqav2"
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[1:7])
    write_images(folder / "test2015", [row["image"] for row in rows])


def gqa(root: Path) -> None:
    """Five questions about two images, below data/ as LLaVA's script has it."""
    kinds = [("verify", "yes"), ("query", "red"), ("choose", "left"), ("query", "dog"), ("logical", "no")]
    rows, annotations = [], {}
    for i, (kind, answer) in enumerate(kinds):
        id, image = f"2000{i}", f"n{i % 2}"
        rows.append(
            {"question_id": id, "image": f"{image}.jpg", "text": f"Question {i}?{SHORT}", "category": "default"}
        )
        annotations[id] = {
            "imageId": image,
            "question": f"Question {i}?",
            "answer": answer,
            "isBalanced": True,
            "groups": {"global": "color" if i % 2 else None, "local": "x"},
            "types": {"structural": kind, "semantic": "attr", "detailed": "x"},
            "semantic": [{"operation": "select", "argument": "dog (1)", "dependencies": []}],
        }
    folder = root / "gqa"
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    write_json(folder / "data" / "testdev_balanced_questions.json", annotations)
    write_images(folder / "data" / "images", ["n0.jpg", "n1.jpg"])


def textvqa(root: Path) -> None:
    """Four questions about three images, so that one id comes twice."""
    rows, annotations = [], []
    for i, image in enumerate(["aa", "aa", "bb", "cc"]):
        text = f"What is written {i}?\nReference OCR token: STOP, {i}{SHORT}"
        rows.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
        annotations.append(
            {"question": f"What is written {i}?", "image_id": image, "question_id": i, "answers": ["stop"] * 10}
        )
    folder = root / "textvqa"
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": annotations})
    write_images(folder / "train_images", ["aa.jpg", "bb.jpg", "cc.jpg"])


def pope(root: Path) -> None:
    """Four questions a split about two images; the first is the same in each split."""
    images = [f"COCO_val2014_{i:012d}.jpg" for i in range(2)]
    folder, rows = root / "pope", []
    for start, split in ((1, "adversarial"), (10000001, "random"), (20000001, "popular")):
        labels = []
        for i in range(4):
            thing = "a dog" if i == 0 else f"an {split} {i}"
            question = {"image": images[i % 2], "text": f"Is there {thing} in the image?"}
            rows.append(question | {"question_id": start + i, "category": split, "text": question["text"] + SHORT})
            labels.append({"question_id": i + 1, **question, "label": "no" if i % 2 else "yes"})
        write_jsonl(folder / "coco" / f"coco_pope_{split}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", rows)
    write_images(folder / "val2014", images)


BUILDERS: dict[str, Callable[[Path], None]] = {"gqa": gqa, "pope": pope, "textvqa": textvqa, "vqav2": vqav2}


def build_all(root: Path) -> Path:
    """Every benchmark below one root."""
    for builder in BUILDERS.values():
        builder(root)
    return root

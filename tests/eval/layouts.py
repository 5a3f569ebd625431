"""Small folders in each benchmark's official layout: a few questions, tiny images. One builder a benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyllava_fast.eval.benchmarks.mme import SUBTASKS
from tinyllava_fast.eval.prompts import OPTION, SHORT


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


def sqa(root: Path, questions: int = 9) -> None:
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
    write_json(folder / "llava_test_CQM-A.json", records)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems)})


MME_FOLDERS = ("posters", "celebrity", "scene", "landmark", "artwork")


def mme(root: Path, images: int = 2, *, nested: bool = False) -> None:
    """``images`` images a subtask, two questions each. nested: the release folder in one of the same name."""
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    if nested:
        release = release / release.name
    (release / "eval_tool").mkdir(parents=True)
    (release / "eval_tool" / "readme.txt").write_text("not a subtask")
    lines = []
    for number, subtask in enumerate(SUBTASKS):
        inside = subtask in MME_FOLDERS
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
    write_jsonl(folder / "llava_mme.jsonl", lines)


MMVET_CAPABILITIES = (["rec"], ["ocr", "math"], ["rec", "know", "gen"], ["ocr", "spat"])


def mmvet(root: Path, questions: int = 6) -> None:
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
            "capability": MMVET_CAPABILITIES[i % 4],
        }
        lines.append({"question_id": i, "image": image, "text": f"What is thing {i}?", "category": "conv"})
    write_jsonl(folder / "llava-mm-vet.jsonl", lines)
    write_json(folder / "mm-vet" / "mm-vet.json", metadata)
    write_json(folder / "mm-vet" / "bard_set.json", ["v1_0", "v1_3"])


def mmmu(root: Path) -> None:
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
    write_json(folder / "anns_for_eval.json", records)
    write_json(folder / "eval" / "answer_dict_val.json", truths)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "gqa": gqa,
    "mme": mme,
    "mmmu": mmmu,
    "mmvet": mmvet,
    "pope": pope,
    "sqa": sqa,
    "textvqa": textvqa,
    "vqav2": vqav2,
}


def build_all(root: Path) -> Path:
    """Every benchmark below one root."""
    for builder in BUILDERS.values():
        builder(root)
    return root

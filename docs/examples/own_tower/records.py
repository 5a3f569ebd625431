"""Turn two Debian packages of pictures into records and questions for the example "bring your own tower and data".

    apt-get download dataset-fashion-mnist tuxpaint-stamps-default   # 190 MB; needs no root
    for package in *.deb; do dpkg -x "$package" packages; done
    python records.py packages data/own_tower

dataset-fashion-mnist (MIT) has 70,000 photographs of clothes, 28 x 28 grey. tuxpaint-stamps-default (GPL-2) has
photographs and drawings of things with captions, many with transparency. The captions of the second are its authors';
every question here is a template, and so is every answer about clothes. No picture is copied into this repository.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CLOTHES = [
    "T-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
KINDS = {
    "animals": "an animal",
    "food": "food",
    "household": "a household object",
    "plants": "a plant",
    "symbols": "a symbol",
    "town": "a part of a town",
    "vehicles": "a vehicle",
}
WHICH = ["What is in the picture?", "Name the piece of clothing.", "Which article is this?"]
KIND = "What kind of thing is this?"
HELD_OUT = 5  # one picture in so many


def numbers(path: Path) -> np.ndarray:
    """Return the bytes of an IDX file (LeCun's format) in its shape: [images, 28, 28] or [labels]."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def record(image: str, *turns: tuple[str, str]) -> dict[str, object]:
    """Return questions and answers about one picture in LLaVA's form."""
    said = [{"from": name, "value": text} for turn in turns for name, text in zip(("human", "gpt"), turn, strict=True)]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    return {"id": image, "image": image, "conversations": said}


def clothes(folder: Path, part: str, count: int, images: Path) -> Iterator[tuple[str, str]]:
    """Write the first photographs of a part ("train", "t10k"); yield file name and class."""
    pixels, labels = numbers(folder / f"{part}-images-idx3-ubyte.gz"), numbers(folder / f"{part}-labels-idx1-ubyte.gz")
    for number in range(count):
        name = f"clothes-{part}-{number:05d}.png"
        Image.fromarray(pixels[number]).convert("RGB").save(images / name)
        yield name, CLOTHES[labels[number]]


def stamps(folder: Path, images: Path) -> Iterator[tuple[str, str, str, bool]]:
    """Copy each picture that has an English caption; yield file name, folder of its kind, caption, held out or not.

    Pictures of one name (lion.png, cartoon/lion.png, lion2.png) are all held out or none is.
    """
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.is_file():
            continue
        caption = text.read_text("utf-8", errors="replace").splitlines()[0].strip()
        kind = path.relative_to(folder).parts[0]
        stem = re.sub(r"[^a-z]|cartoon|silo", "", path.stem.lower()) or path.stem
        if not caption or "\N{REPLACEMENT CHARACTER}" in caption:
            continue
        name = "stamp-" + "-".join(path.relative_to(folder).parts)
        shutil.copyfile(path, images / name)
        yield name, kind, caption, hashlib.sha256(stem.encode()).digest()[0] % HELD_OUT == 0


def main() -> None:
    """Write images/, captions and conversations of both sources, and questions.jsonl into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, help="folder into which the two packages were unpacked")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=4_000, help="photographs of clothes to learn from (4,000)")
    parser.add_argument("--test", type=int, default=1_000, help="photographs of clothes to ask about (1,000)")
    arguments = parser.parse_args()
    fashion, drawn = (arguments.packages / "usr/share" / name for name in ("datasets/fashion-mnist", "tuxpaint/stamps"))
    for folder in (fashion, drawn):
        if not folder.is_dir():
            parser.error(f"{folder} is missing; unpack both packages there (see the head of this file)")
    images = arguments.out / "images"
    images.mkdir(parents=True, exist_ok=True)

    questions = []
    captions: dict[str, list[object]] = {"clothes": [], "stamps": []}
    train: dict[str, list[object]] = {"clothes": [], "stamps": []}
    for number, (name, answer) in enumerate(clothes(fashion, "train", arguments.train, images)):
        captions["clothes"].append(record(name, ("", f"A {answer}.")))
        train["clothes"].append(record(name, (WHICH[number % len(WHICH)], f"A {answer}.")))
    for name, answer in clothes(fashion, "t10k", arguments.test, images):
        questions.append({"image": name, "question": WHICH[0], "answer": f"A {answer}.", "category": "clothes"})
    for name, kind, caption, held_out in stamps(drawn, images):
        if held_out and kind in KINDS:
            questions.append({"image": name, "question": KIND, "answer": KINDS[kind], "category": "stamps"})
        elif not held_out:
            captions["stamps"].append(record(name, ("", caption)))
            known = [(KIND, KINDS[kind])] if kind in KINDS else []
            train["stamps"].append(record(name, ("Describe the picture.", caption), *known))

    for source in captions:
        (arguments.out / f"captions-{source}.json").write_text(json.dumps(captions[source]))
        (arguments.out / f"train-{source}.json").write_text(json.dumps(train[source]))
        print(f"{source}: {len(captions[source])} pictures to learn from")  # noqa: T201
    (arguments.out / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    print(f"questions: {dict(Counter(line['category'] for line in questions))}")  # noqa: T201


if __name__ == "__main__":
    main()

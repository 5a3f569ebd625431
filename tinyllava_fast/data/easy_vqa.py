"""easy-VQA (PyPI package ``easy-vqa``) as a LLaVA data set: ``python -m tinyllava_fast.data.easy_vqa OUT``.

OUT/images/{train,test}/*.png   64x64 images; the image folder is OUT/images
OUT/train.json                  one record an image, all its questions as turns: 4,000 records, 38,575 questions
OUT/test.json                   one question a line, {id, image, question, answer, type}: 9,673 about 1,000 images
OUT/captions.json               one generated caption a train image, for the pretrain stage
OUT/tokenizer                   byte-level BPE over the train text

A caption ("a red circle") says what the answers of the *train* questions about that image entail, no more: where they
leave the colour or the shape open, the caption leaves it out, and an image with neither has no caption.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.data.bpe import pieces, train_tokenizer
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import read_objects
from tinyllava_fast.files import atomic_folder
from tinyllava_fast.log import log, setup_logging

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
COUNTS = {"train": (4_000, 38_575), "test": (1_000, 9_673)}  # images, questions
CAPTION_PROMPT = f"{IMAGE_TOKEN}\nDescribe the image."
VOCABULARY = 512  # upper limit; every word of the train text is one token
_FORMAT = {"data": "easy-vqa", "format": 1}  # raise format when what prepare() writes changes
_MARK = "easy_vqa.json"
_WORD = re.compile(r"[a-z]+")

Question = tuple[str, str]  # (question, answer)


def prepare(out_dir: str | Path) -> Path:
    """Write the data set unless it is there already; returns its folder.

    It appears at once, when complete. UserError if the folder holds something else or the package is not installed,
    DataError if the package does not hold the known numbers of images and questions, CheckpointError if the folder
    cannot be written.
    """
    out = Path(out_dir)
    if _is_current(out):
        return out
    with atomic_folder(out, durable=False) as folder:
        _write(folder, _source())
    return out


def load_questions(folder: str | Path) -> list[dict[str, str]]:
    """Return the test questions, {id, image, question, answer, type}; type is yes/no, shape or color.

    DataError naming the file, the record and the field.
    """
    path = Path(folder) / "test.json"
    try:
        rows = read_objects(path)
        return [
            {"image": row.path("image"), "type": row.text("type", "", empty=True)}
            | {field: row.text(field) for field in ("id", "question", "answer")}
            for row in rows
        ]
    except DataError as error:
        raise DataError(f"{error}; python -m tinyllava_fast.data.easy_vqa writes the file anew") from None


def facts(questions: Iterable[Question]) -> tuple[str | None, str | None]:
    """Return (color, shape) of the one shape in an image as far as its questions and answers entail them."""
    open_ = {"color": set(COLORS), "shape": set(SHAPES)}
    for question, answer in questions:
        words = set(_WORD.findall(question))
        truth = True
        if answer in ("yes", "no"):
            truth = (answer == "yes") != bool(words & {"not", "no"})
        else:
            words.add(answer)
        for kind in open_:
            named = words & open_[kind]
            open_[kind] = (named or open_[kind]) if truth else open_[kind] - named
    return (_only(open_["color"]), _only(open_["shape"]))


def caption(questions: Iterable[Question]) -> str | None:
    """Put what is known of an image in words: "a red circle", "a red shape", "a circle"; None if nothing is."""
    color, shape = facts(questions)
    if color is None and shape is None:
        return None
    return " ".join(["a", *filter(None, (color, shape or "shape"))])


def question_type(answer: str) -> str:
    """Return yes/no, shape or color."""
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def _only(values: set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def _is_current(out: Path) -> bool:
    if not out.exists():
        return False
    mark = out / _MARK
    if mark.is_file():
        return bool(json.loads(mark.read_text(encoding="utf-8")) == _FORMAT)
    if any(out.iterdir()):
        raise UserError(f"{out}: holds files that are not easy-VQA data; choose another folder")
    return False


def _source() -> Path:
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("easy-VQA is not installed; run: pip install easy-vqa") from error
    return Path(easy_vqa.__file__).parent / "data"


def _write(out: Path, source: Path) -> None:
    by_image = {split: _questions(source, split) for split in COUNTS}
    for split, groups in by_image.items():
        (out / "images" / split).mkdir(parents=True)
        for image in groups:
            shutil.copyfile(source / split / "images" / f"{image}.png", out / "images" / split / f"{image}.png")
    train = list(by_image["train"].items())
    captions = [(image, text) for image, asked in train if (text := caption(asked)) is not None]
    _dump(out / "train.json", (_record(image, asked) for image, asked in train))
    _dump(out / "captions.json", (_record(image, [(CAPTION_PROMPT, text)]) for image, text in captions))
    _dump(out / "test.json", _test_lines(by_image["test"]))
    _tokenizer([asked for _, asked in train], [text for _, text in captions]).save_pretrained(out / "tokenizer")
    (out / _MARK).write_text(json.dumps(_FORMAT), encoding="utf-8")


def _questions(source: Path, split: str) -> dict[int, list[Question]]:
    """Return questions and answers of each image, in the package's order."""
    rows = json.loads((source / split / "questions.json").read_text(encoding="utf-8"))
    groups: dict[int, list[Question]] = {}
    for question, answer, image in rows:
        groups.setdefault(image, []).append((question, answer))
    if (len(groups), len(rows)) != COUNTS[split]:
        raise DataError(
            f"{source}: {len(groups)} images and {len(rows)} questions in {split} instead of {COUNTS[split]}; "
            "reinstall easy-vqa"
        )
    return groups


def _record(image: int, asked: Sequence[Question]) -> dict[str, object]:
    messages = []
    for number, (question, answer) in enumerate(asked):
        marker = "" if number or IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n"
        messages += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {"id": f"train-{image}", "image": f"train/{image}.png", "conversations": messages}


def _test_lines(groups: dict[int, list[Question]]) -> Iterator[dict[str, object]]:
    rows = [(image, question, answer) for image, asked in groups.items() for question, answer in asked]
    for number, (image, question, answer) in enumerate(rows):
        yield {
            "id": f"test-{number}",
            "image": f"test/{image}.png",
            "question": question,
            "answer": answer,
            "type": question_type(answer),
        }


def _dump(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write a JSON list with one element a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _tokenizer(conversations: Sequence[Sequence[Question]], captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of the train prompts and the captions."""
    return train_tokenizer([*(p for asked in conversations for p in pieces(asked)), *captions], VOCABULARY)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    setup_logging()
    if len(arguments) != 1 or arguments[0].startswith("-"):
        log.error("usage: python -m tinyllava_fast.data.easy_vqa OUT")
        return 2
    try:
        log.info("easy-VQA is in %s", prepare(arguments[0]))
    except UserError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

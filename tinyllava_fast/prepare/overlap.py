"""What a set and an evaluation set have in common: images, images that look alike, and questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from tinyllava_fast.data.formats._base import Place, Row, find_files
from tinyllava_fast.data.formats._embedded import picture_of
from tinyllava_fast.data.formats._rows import record_of
from tinyllava_fast.data.pictures import naming
from tinyllava_fast.data.record import FaultError, Record
from tinyllava_fast.data.records import read_refusing
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import DataError
from tinyllava_fast.prepare.pictures import look, near_groups, rows_of

SHOWN = 10
"""Records that are named where a set shares something with an evaluation set."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""What numbers are multiplied by where digests of several are added."""


@dataclass
class Shared:
    """What a set and an evaluation set have in common; records, each counted once. first: some of them, named."""

    file: str
    questions: int = 0
    """Of the evaluation set."""
    left_out: int = 0
    """Entries of the evaluation set that cannot be read."""
    images: int = 0
    unreadable: int = 0
    """Of the images of the evaluation set."""
    same_question: int = 0
    same_image: int | None = None
    near_image: int | None = None
    both: int | None = None
    """The same question about the same or nearly the same image. None: images were not looked at."""
    first: list[str] = field(default_factory=list)


def plain(question: str) -> str:
    """Return a question as it is compared: without markers, case and the kind of white space.

    >>> plain("<image>\\nWhat  IS it?")
    'what is it?'
    """
    return " ".join(question.replace(IMAGE_TOKEN, " ").casefold().split())


def text_digest(text: str) -> int:
    """Return 64 bits that tell texts apart."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Against:
    """An evaluation set. questions: how many it has. left_out: entries that cannot be read.

    asked: of each question and each of its images the digest of the plain question, and the number of the image's row;
    -1 for a question without an image. rows: [n] of ROW; None: its images were not looked at.
    """

    file: str
    questions: int
    left_out: int
    asked: np.ndarray
    rows: np.ndarray | None

    @property
    def images(self) -> int:
        """How many images of it were looked at."""
        return 0 if self.rows is None else len(self.rows)

    @property
    def unreadable(self) -> int:
        """How many of them cannot be read."""
        return 0 if self.rows is None else int((self.rows["width"] == 0).sum())


def read_against(path: str, folder: str | None = None, *, pixels: bool = True) -> Against:
    """Read an evaluation set: records in any form, or lines of {question or text, image}.

    folder: of its image paths; None: that of the file. pixels: look at its images, too. DataError if it has no
    questions, or if it names images and none of them can be read: no overlap would be found, whatever there is.
    """
    files = find_files(Path(path))
    names: dict[str, int] = {}
    asked: list[tuple[int, int]] = []
    questions = left_out = 0
    for file in files.paths:
        for row in files.format.rows(file, files.base, lambda _: None):
            if not isinstance(row, Row) or (record := _question_of(row)) is None:
                left_out += 1
                continue
            questions += len(record.turns)
            images = [names.setdefault(image, len(names)) for image in record.images] or [-1]
            asked += [(text_digest(plain(question)), image) for question, _ in record.turns for image in images]
    if not asked:
        raise DataError(f"{path}: holds no questions; expected records, or objects with 'question' and 'image'")
    rows = None
    if pixels:
        rows = rows_of([np.array([look(name, folder or str(files.base), files.base)]) for name in names])
        if names and not rows["width"].any():
            first = naming(picture_of(next(iter(names)), folder or str(files.base), files.base))
            raise DataError(
                f"{path}: none of its {len(names):,} images can be read, the first is {first}; name their folder with "
                "--against-images, or compare questions alone with --no-images"
            )
    return Against(path, questions, left_out, np.array(asked, [("text", "<u8"), ("image", "<i8")]), rows)


def _refer(refer: Callable[[Place], str], name: str, place: Place) -> str:
    """Return the reference to an image of a field that is read under another name."""
    return refer((name, *place[1:]))


def _question_of(row: Row) -> Record | None:
    """Return an entry of an evaluation set as a record; the answer, which may have many forms, does not matter."""
    values = row.values
    if isinstance(values, dict) and not any(name in values for name in ("conversations", "messages")):
        question = values.get("question", values.get("text", values.get("prompt")))
        name = "images" if values.get("image") is None else "image"
        row = replace(
            row,
            values={"image": values.get(name), "question": question, "answer": "-"},
            refer=partial(_refer, row.refer, name),
            binary=frozenset({"image"} if name in row.binary else ()),
        )
    try:
        return record_of(0, row)
    except FaultError:
        return None


@dataclass(frozen=True)
class Asked:
    """What the records of a set ask of which images. turns, images: [n] of each record, how many.

    questions: [sum of turns] digests. number: [sum of images] of each the number of its row.
    rows: of pictures.ROW; None: images were not looked at.
    """

    turns: np.ndarray
    images: np.ndarray
    questions: np.ndarray
    number: np.ndarray
    rows: np.ndarray | None


def compare(records: str, other: Against, own: Asked) -> Shared:
    """Return what a set has in common with an evaluation set. records: its file."""
    images, number, rows = own.images, own.number, own.rows
    owners = np.repeat(np.arange(len(images)), images)
    asks = np.repeat(np.arange(len(images)), own.turns)
    same_question, same_image, near_image, both = (np.zeros(len(images), bool) for _ in range(4))
    same_question[asks[np.isin(own.questions, other.asked["text"])]] = True
    told = Shared(other.file, other.questions, other.left_out, other.images, other.unreadable, int(same_question.sum()))
    if other.rows is not None and rows is not None:
        theirs, ours = other.rows["width"] > 0, rows["width"] > 0
        groups = np.full(len(theirs) + len(ours), -1)  # that of those that cannot be read
        every = np.concatenate([theirs, ours])
        groups[every] = near_groups(np.concatenate([other.rows, rows])[every])
        their_groups, our_groups = np.split(groups, [len(theirs)])
        same = np.isin(rows["content"], other.rows["content"][theirs]) & ours
        near = np.isin(our_groups, their_groups[theirs]) & ours | same
        same_image[owners[same[number]]] = True
        near_image[owners[near[number]]] = True
        asked = other.asked[other.asked["image"] >= 0]
        asked = asked[theirs[asked["image"]]]
        pairs = asked["text"] ^ (their_groups[asked["image"]].astype(np.uint64) * MIX)
        both = near_image & _asked_of_alike(pairs, own, our_groups, ours, near)
        told.same_image, told.near_image, told.both = (int(hit.sum()) for hit in (same_image, near_image, both))
    named = next((hit for hit in (both, near_image, same_question) if hit.any()), same_question)
    wanted = set(np.flatnonzero(named)[:SHOWN].tolist())
    if wanted:
        last = max(wanted)
        usable = (record for record in read_refusing(records) if isinstance(record, Record))
        told.first = [r.where for at, r in zip(range(last + 1), usable, strict=False) if at in wanted]
    return told


def _asked_of_alike(
    pairs: np.ndarray, own: Asked, groups: np.ndarray, readable: np.ndarray, near: np.ndarray
) -> np.ndarray:
    """Return which records ask a question about an image that the other set asks about one like it.

    pairs: of the other set, each question mixed with the group of its image. groups, readable, near: of our images.
    """
    images, number = own.images, own.number
    starts = np.concatenate([[0], np.cumsum(images)])
    turns = np.concatenate([[0], np.cumsum(own.turns)])
    found = np.zeros(len(images), bool)
    for index in np.unique(np.repeat(np.arange(len(images)), images)[near[number]]):
        shows = number[starts[index] : starts[index + 1]]
        shown = groups[shows[readable[shows]]].astype(np.uint64) * MIX
        texts = own.questions[turns[index] : turns[index + 1]]
        found[index] = bool(np.isin(texts[:, None] ^ shown[None], pairs).any())
    return found

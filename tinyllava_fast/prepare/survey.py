"""Survey a data set: the number and length of its records, the size and colours of its images."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.formats._embedded import is_reference, picture_of
from tinyllava_fast.data.images import load_image
from tinyllava_fast.data.pictures import is_url
from tinyllava_fast.data.records import Record, check_turns, encode_each, read_records, usable
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.data.workers import chunks
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 500  # images that are opened, spread evenly over the data set
ANSWER = 128  # tokens of room for an answer that is longer than those in the data
_AT_ONCE = 1000  # records tokenized in one call


@dataclass(frozen=True)
class Pictures:
    """The images of a data set. side: median of the longer sides in pixels. mean, std: of each channel, 0 to 1."""

    count: int
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Lengths:
    """Tokens of the samples, those of their images included; the most images and the most turns that one has."""

    records: int
    longest: int
    mean: float
    images: int
    turns: int


def pictures(records: str | Path, folder: str | Path) -> Pictures | None:
    """Look at the images; None if no record has one.

    Raises DataError for a record file that cannot be used, and for an image that is missing or cannot be read, naming
    the first one.
    """
    paths = list(dict.fromkeys(image for record in read_records(records) for image in record.images))
    if not paths:
        return None
    missing = [path for path in paths if not (is_reference(path) or (Path(folder) / path).is_file())]
    if missing:
        raise DataError(
            f"{records}: {len(missing):,} of {len(paths):,} images are not in {folder}, the first is "
            f"{shown(missing[0])}; {advice(missing[0], Path(folder))}"
        )
    chosen = paths[:: math.ceil(len(paths) / LOOKED_AT)]
    sides, sums, squares = [], np.zeros(3), np.zeros(3)
    for path in chosen:
        image = load_image(picture_of(path, str(folder), base_of(records)))
        sides.append(max(image.size))
        pixels = np.asarray(image, np.float64).reshape(-1, 3) / 255
        sums += pixels.mean(0)  # every image counts once, whatever its size
        squares += (pixels**2).mean(0)
    mean = sums / len(chosen)
    # An image set of one colour has no deviation to divide by.
    std = np.sqrt(np.maximum(squares / len(chosen) - mean**2, 0.05**2))
    return Pictures(len(paths), round(median(sides)), _three(mean), _three(std))


def lengths(records: str | Path, template: Template, tokenizer: PreTrainedTokenizerBase, rows: int) -> Lengths:
    """Measure every sample in tokens. rows: tokens that an image takes.

    Raises DataError as ``read_records`` does, and for a conversation that the template cannot show.
    """
    found: list[tuple[int, int]] = []
    turns = 0
    for part in chunks(read_records(records), _AT_ONCE):
        turns = max(turns, *(len(record.turns) for record in part))
        found += _measured(records, part, template, tokenizer)
    counts = [tokens + images * (rows - 1) for tokens, images in found]
    return Lengths(len(counts), max(counts), sum(counts) / len(counts), max(images for _, images in found), turns)


def _measured(
    file: str | Path, part: Sequence[Record], template: Template, tokenizer: PreTrainedTokenizerBase
) -> Iterable[tuple[int, int]]:
    """Yield (ids, image markers among them) of each record. DataError for one that training would refuse."""
    for record in part:
        check_turns(file, record, template)
    for segments in usable(encode_each(file, part, template, tokenizer)):
        ids = segments[0].ids
        yield len(ids), ids.count(IMAGE_INDEX)


def advice(path: str, folder: Path) -> str:
    """Return the remedy for an image that is not in the folder."""
    if not folder.is_dir():
        return "there is no such folder" if not folder.exists() else "that is no folder"
    if is_url(path):
        return "it is a URL, and pictures are not downloaded: save them to files"
    if "\\" in path and os.sep == "/":
        return "write / in place of \\ between folders"
    return "the records' image paths are relative to the image folder"


def _three(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (round(float(v), 3) for v in values)
    return red, green, blue

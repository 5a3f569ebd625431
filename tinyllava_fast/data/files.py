"""The image files of a data set: looked for before anything trains, measured if that decides their tokens, decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
from PIL import Image

from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data import shelf
from tinyllava_fast.data.anyres import count_inputs, resolve_grid, tile_size, tiles
from tinyllava_fast.data.augment import augment
from tinyllava_fast.data.columns import ColumnWriter
from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.data.images import check_shape, image_size, load_image
from tinyllava_fast.data.pictures import REFERENCE, UPRIGHT, PictureReading, is_url, naming
from tinyllava_fast.data.store import SampleStore
from tinyllava_fast.data.workers import in_order
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.hardware import cores
from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

_LOOKERS = 8  # threads that read headers: on a disk far away each waits for an answer
_PART = 1024  # files looked at together
_MANY = 4096  # files for which processes repay, and for which what was found is kept


_ROW = np.dtype([("bytes", "<i8"), ("changed", "<i8"), ("width", "<i8"), ("height", "<i8")])
"""The facts kept of a file: size, time of change (ns), size of the picture by its header; width 0: nothing."""
MISSING, REFUSED = 0, -1


class ImageFiles:
    """Images of one DataConfig, as inputs of the tower: one each, or with image_mode anyres the whole and its tiles.

    grid: the resolutions of anyres, (width, height); empty in the other modes. UserError for a grid that is not used.
    """

    def __init__(self, data: DataConfig, processor: BaseImageProcessor, seed: int) -> None:
        self.data = data
        self.processor = processor
        self.seed = seed
        if data.image_grid and data.image_mode != "anyres":
            raise UserError(
                f"data.image_grid is for data.image_mode=anyres only; got image_mode={data.image_mode!r}, "
                f"image_grid={[list(size) for size in data.image_grid]}"
            )
        self.reading = PictureReading(data.orientation or UPRIGHT.orientation, data.background or UPRIGHT.background)
        self.grid = resolve_grid(data.image_grid, processor) if data.image_mode == "anyres" else []
        self._base = base_of(data.records)
        self.refused: dict[str, str] = {}
        """Why a file is no picture that can be shown, by its name in the records."""

    def look(self, store: SampleStore) -> np.ndarray:
        """Return the number of tower inputs of every image of the store, by its file's header: [n] int64.

        MISSING for a file that does not exist, REFUSED for one that is no picture. A header that an earlier start has
        read is not read again while the file keeps its size and its time of change.
        """
        _, first, inverse = np.unique(store.column("images", "digest"), return_index=True, return_inverse=True)
        if len(first) < _MANY:
            rows = self._rows(store, first, np.zeros(len(first), _ROW))
        else:
            rows = self._kept_rows(store, first)
        return self._counts(rows)[inverse]

    def _kept_rows(self, store: SampleStore, numbers: np.ndarray) -> np.ndarray:
        """``_rows``, most of them perhaps from the cache."""
        folders = (os.path.abspath(self.data.image_folder), os.path.abspath(self._base))
        facts = (folders, store.sources(), self._reading_of_size(), PIL.__version__)
        key = f"pictures-{hashlib.sha256(repr(facts).encode()).hexdigest()[:40]}"
        with shelf.turn(key, self.data.image_folder) as alive:
            kept = shelf.find(key, {"rows": _ROW})
            before = np.zeros(len(numbers), _ROW) if kept is None else kept["rows"].copy()
            rows = self._rows(store, numbers, before, alive)
            keep = np.where(rows["width"] > 0, rows, np.zeros(1, _ROW))
            if not np.array_equal(keep, before):
                shelf.put(key, {"rows": _ROW}, partial(_write_rows, keep), self.data.image_folder)
        return rows

    def _rows(
        self, store: SampleStore, numbers: np.ndarray, before: np.ndarray, alive: Callable[[], None] | None = None
    ) -> np.ndarray:
        """Look at the files of some images, several at a time; a width below 1 says what is wrong.

        alive: called after each part of them.
        """
        parts = [(numbers[at : at + _PART], before[at : at + _PART]) for at in range(0, len(numbers), _PART)]
        processes = cores() if len(numbers) >= _MANY and cores() > 1 else 0
        pace, rows, done = Pace(wait_s=5.0), [np.zeros(0, _ROW)], 0
        for found, refused in in_order(partial(self._look, store), parts, processes):
            rows.append(found)
            self.refused |= refused
            done += len(found)
            if alive:
                alive()
            if pace.due():
                log.info("%s: %d of %d images looked at", self.data.image_folder, done, len(numbers))
        store.let_go()
        return np.concatenate(rows)

    def _look(self, store: SampleStore, part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict[str, str]]:
        """Return the rows of some images, and why files are refused."""
        numbers, before = part
        names = [store.image(number) for number in numbers.tolist()]
        refused: dict[str, str] = {}

        def measure(at: int) -> list[tuple[int, ...]]:
            slices = zip(names[at::_LOOKERS], before[at::_LOOKERS].tolist(), strict=True)
            return [self._measure(name, row, refused) for name, row in slices]

        rows = np.zeros(len(names), _ROW)
        with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="tlf-look") as pool:
            for at, found in enumerate(pool.map(measure, range(_LOOKERS))):
                rows[at::_LOOKERS] = np.array(found, _ROW)
        return rows, refused

    def _measure(self, name: str, before: tuple[int, ...], refused: dict[str, str]) -> tuple[int, ...]:
        """Return the row of a file; ``before`` if that is still true."""
        picture = self._picture(name)
        facts = _facts(picture)
        if facts is None:
            return 0, 0, MISSING, 0
        if before[2] > 0 and before[:2] == (facts.st_size, facts.st_mtime_ns):
            return before
        try:
            size = image_size(picture, self._reading_of_size())
        except DataError as error:
            refused[name] = str(error)
            return 0, 0, REFUSED, 0
        return facts.st_size, facts.st_mtime_ns, *size

    def _reading_of_size(self) -> PictureReading:
        return self.reading if self.grid else REFERENCE  # turned or not matters to tiles alone

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Return the tower inputs by row."""
        if not self.grid:
            return np.minimum(rows["width"], 1)
        sizes, inverse = np.unique(np.stack([rows["width"], rows["height"]], 1), axis=0, return_inverse=True)
        tile = tile_size(self.processor)
        counts = [count_inputs((w, h), self.grid, tile) if w > 0 else w for w, h in sizes.tolist()]
        return np.array(counts, np.int64)[inverse.reshape(-1)]

    def fault(self, name: str) -> str:
        """Return what is wrong with a file that was missing or refused."""
        return self.refused.get(name) or _absent(name, self._picture(name))

    def load(
        self, images: Sequence[str], shown: Iterable[tuple[int, int]], epoch: int, index: int
    ) -> list[Image.Image]:
        """Return the tower inputs that a sample shows, in order; each image is decoded and augmented once.

        shown: (number of the image, its inputs) of each place. DataError for an image that cannot be decoded, or whose
        size is no longer what it was.
        """
        pictures: list[Image.Image] = []
        made: dict[int, list[Image.Image]] = {}
        for number, count in shown:
            if number not in made:
                made[number] = self._inputs(images[number], (self.seed, epoch, index, *[number] * (number > 0)))
            if len(made[number]) != count:
                name = naming(self._picture(images[number]))
                raise DataError(f"{name}: the size of the image has changed since the run began; start it anew")
            pictures += made[number]
        return pictures

    def _inputs(self, name: str, seed: Sequence[int]) -> list[Image.Image]:
        if name in self.refused:
            raise DataError(self.refused[name])
        picture = self._picture(name)
        image = load_image(picture, self.reading)
        try:
            check_shape(image, self.processor, self.data.image_mode)
        except DataError as error:
            raise DataError(f"{naming(picture)}: {error}") from error
        image = augment(image, self.data.augment, seed)
        return tiles(image, self.grid, self.processor) if self.grid else [image]

    def _picture(self, name: str) -> str | Embedded:
        return picture_of(name, self.data.image_folder, self._base)


def image_fault(name: str, folder: str, base: Path, reading: PictureReading, *, deep: bool = False) -> tuple[str, bool]:
    """Return what is wrong with an image of a record, "" for nothing, and whether it is missing.

    name, folder, base: see picture_of. deep: decode it, which finds all that training would; else only its header is
    read, which finds what stops a run before its first step.
    """
    picture = picture_of(name, folder, base)
    if _facts(picture) is None:
        return _absent(name, picture), True
    try:
        if deep:
            load_image(picture, reading)
        else:
            image_size(picture, reading)
    except DataError as error:
        return str(error), False
    return "", False


def _facts(picture: str | Embedded) -> os.stat_result | None:
    try:
        return os.stat(picture if isinstance(picture, str) else picture.file)
    except (OSError, ValueError):
        return None


def _absent(name: str, picture: str | Embedded) -> str:
    if is_url(name):
        return f"{naming(name)} is a URL; pictures are not downloaded"
    return f"{naming(picture)} does not exist"


def _write_rows(rows: np.ndarray, columns: ColumnWriter) -> None:
    columns.append("rows", rows)

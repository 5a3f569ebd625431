"""The image files of a data set: looked for before anything trains, measured if that decides their tokens, decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from PIL import Image

from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data.anyres import count_inputs, resolve_grid, tile_size, tiles
from tinyllava_fast.data.augment import augment
from tinyllava_fast.data.images import check_shape, image_size, load_image
from tinyllava_fast.data.pictures import REFERENCE, UPRIGHT, PictureReading, is_url, naming
from tinyllava_fast.data.records import Record
from tinyllava_fast.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

_SHOWN = 5  # missing images named in an error
_SHOWN_BAD = 10  # and files that are no pictures
_LOOKERS = 8  # threads that read headers: on a disk far away each waits for an answer


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
        self._counts: dict[str, int] = {}  # inputs of each file looked at; 0: it does not exist
        self._refused: dict[str, str] = {}  # why a file is no picture that can be shown
        self._missing: list[str] = []
        self._bad: list[str] = []

    def look(self, records: Iterable[Record]) -> None:
        """Read the headers of the records' image files, several at a time; ``inputs`` then knows them."""
        names = dict.fromkeys(name for record in records for name in record.images if name not in self._counts)
        if names:
            with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="tlf-look") as pool:
                self._counts.update(zip(names, pool.map(self._measure, names), strict=True))

    def inputs(self, record: Record) -> list[int]:
        """Return the number of tower inputs of each image of the record.

        A missing file is noted for ``raise_if_missing``. DataError if the header of a file says that it is no picture.
        """
        self.look([record])
        for name in record.images:
            if name in self._refused:
                raise DataError(self._refused[name])
            if not self._counts[name]:
                self._missing.append(f"{record.where}: image: {self._absent(name)}")
        return [self._counts[name] for name in record.images]

    def note(self, record: Record, error: DataError) -> None:
        """Keep the fault of an image of the record for ``raise_if_missing``."""
        self._bad.append(f"{record.where}: image: {error}")

    def raise_if_missing(self) -> None:
        """Raise one DataError that names every file which is missing or is no picture. Forget the sizes read so far."""
        found = []
        if self._missing:
            found.append(f"{len(self._missing)} records name a missing image file; check data.image_folder")
            found += [f"  {line}" for line in self._missing[:_SHOWN]]
        if self._bad:
            found.append(
                f"{len(self._bad)} records name an image that cannot be read; replace it, remove its record, or set "
                "data.on_bad_image=skip"
            )
            found += [f"  {line}" for line in self._bad[:_SHOWN_BAD]]
        if found:
            raise DataError(f"{self.data.records}: " + "\n".join(found))
        self._counts.clear()

    def _measure(self, name: str) -> int:
        """Return the tower inputs that a file makes, by its header; 0 if it does not exist, 1 if it is refused."""
        path = self._path(name)
        if not os.path.exists(path):
            return 0
        try:
            size = image_size(path, self.reading if self.grid else REFERENCE)  # turned or not matters to tiles alone
        except DataError as error:
            self._refused[name] = str(error)
            return 1
        return count_inputs(size, self.grid, tile_size(self.processor)) if self.grid else 1

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
                path = self._path(images[number])
                raise DataError(f"{path}: the size of the image has changed since the run began; start it anew")
            pictures += made[number]
        return pictures

    def _inputs(self, name: str, seed: Sequence[int]) -> list[Image.Image]:
        if name in self._refused:
            raise DataError(self._refused[name])
        image = load_image(self._path(name), self.reading)
        try:
            check_shape(image, self.processor, self.data.image_mode)
        except DataError as error:
            raise DataError(f"{naming(self._path(name))}: {error}") from error
        image = augment(image, self.data.augment, seed)
        return tiles(image, self.grid, self.processor) if self.grid else [image]

    def _absent(self, name: str) -> str:
        if is_url(name):
            return f"{naming(name)} is a URL; pictures are not downloaded"
        return f"{naming(self._path(name))} does not exist"

    def _path(self, name: str) -> str:
        return os.path.join(self.data.image_folder, name)

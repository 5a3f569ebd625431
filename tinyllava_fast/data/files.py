"""The image files of a data set: looked for before anything trains, measured if that decides their tokens, decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data.anyres import count_inputs, resolve_grid, tile_size, tiles
from tinyllava_fast.data.augment import augment
from tinyllava_fast.data.images import image_size, load_image
from tinyllava_fast.data.records import Record
from tinyllava_fast.errors import DataError, UserError

_SHOWN = 5  # missing images named in an error


class ImageFiles:
    """Images of one DataConfig, as inputs of the tower: one each, or with image_mode anyres the whole and its tiles.

    grid: the resolutions of anyres, (width, height); empty in the other modes. UserError for a grid that is not used.
    """

    def __init__(self, data: DataConfig, processor: Any, seed: int) -> None:
        self.data = data
        self.processor = processor
        self.seed = seed
        if data.image_grid and data.image_mode != "anyres":
            raise UserError(
                f"data.image_grid is for data.image_mode=anyres only; got image_mode={data.image_mode!r}, "
                f"image_grid={[list(size) for size in data.image_grid]}"
            )
        self.grid = resolve_grid(data.image_grid, processor) if data.image_mode == "anyres" else []
        self._counts: dict[str, int] = {}  # inputs of each file looked at; 0: it does not exist
        self._missing: list[str] = []

    def inputs(self, record: Record) -> list[int]:
        """How many inputs of the tower each image of the record is.

        A missing file is noted for ``stop``. DataError if anyres cannot read the size of an image from its header.
        """
        return [self._count(record, name) for name in record.images]

    def _count(self, record: Record, name: str) -> int:
        path = self._path(name)
        if name not in self._counts:
            self._counts[name] = int(os.path.isfile(path))
            if self._counts[name] and self.grid:
                self._counts[name] = count_inputs(image_size(path), self.grid, tile_size(self.processor))
        if not self._counts[name]:
            self._missing.append(f"{record.where}: image: {path} does not exist")
        return self._counts[name]

    def stop(self) -> None:
        """DataError if any file is missing, naming them together; what was measured is forgotten."""
        if self._missing:
            lines = "\n  ".join(self._missing[:_SHOWN])
            raise DataError(
                f"{self.data.records}: {len(self._missing)} records name a missing image file; check data.image_folder"
                f"\n  {lines}"
            )
        self._counts.clear()

    def load(
        self, images: Sequence[str], shown: Iterable[tuple[int, int]], epoch: int, index: int
    ) -> list[Image.Image]:
        """The inputs of the tower that a sample shows, in order; each image decoded and augmented once.

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
        image = augment(load_image(self._path(name)), self.data.augment, seed)
        return tiles(image, self.grid, self.processor) if self.grid else [image]

    def _path(self, name: str) -> str:
        return os.path.join(self.data.image_folder, name)

"""A sample on its way into a pack, and the images that it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data.files import ImageFiles
from tinyllava_fast.data.pictures import MissingImageError
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample as a pack takes it: all that building the pack needs of it.

    source: number of its source. segments: cut if it is too long, with one marker for each input of the tower. images:
    its images as the record names them. shown: (number of the image, its inputs) of every place that shows one.
    """

    source: int
    ticket: int
    name: str
    segments: list[Segment]
    images: list[str]
    shown: list[tuple[int, int]]


class SourceImages:
    """The images of a source when a pack is built: decoded, or the reason why a record is left out.

    processor: a transformers ``*ImageProcessorPil``. seed: of the augmentation.
    """

    def __init__(self, data: DataConfig, processor: BaseImageProcessor, seed: int) -> None:
        self.data = data
        self.files = ImageFiles(data, processor, seed)
        self.skips_all = data.on_error != "fail"
        self.skips_bad = self.skips_all or data.on_bad_image == "skip"

    def load(self, drawn: Drawn, epoch: int) -> list[Image.Image]:
        """Return the inputs of the tower that a sample shows, augmented by (seed, epoch, ticket, image).

        DataError, which names the record, for an image that cannot be decoded.
        """
        try:
            return self.files.load(drawn.images, drawn.shown, epoch, drawn.ticket)
        except DataError as error:
            raise type(error)(f"{self.data.records}: {named(drawn.name)}: image: {error}") from error

    def fault(self, error: DataError) -> str:
        """Return the reason why a record is skipped; raise DataError where records may not be skipped."""
        if isinstance(error, MissingImageError) and not self.skips_all:
            remedy = "put it back (data.on_bad_image=skip is for damaged files alone), or set data.on_error=skip"
            raise DataError(f"{error}; {remedy}") from error
        if not self.skips_bad:
            remedy = "replace it, remove its record, or set data.on_bad_image=skip"
            raise DataError(f"{error}; {remedy}") from error
        return str(error)


def named(name: str) -> str:
    """Return the place of a record in a message, by its id."""
    return f"record id {name!r}"

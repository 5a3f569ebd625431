"""Images of requests: decoded in threads, encoded by the tower in batches, each once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinyllava_fast.data.anyres import count_inputs, resolve_grid, tile_size, tiles
from tinyllava_fast.data.images import ImageMode, check_shape, image_size, load_image, to_pixels
from tinyllava_fast.data.pictures import naming, object_size, of_object
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.infer.types import ImageLike, Images, Request
from tinyllava_fast.models.lmm import LMM

IMAGES_PER_PASS = 32


def image_key(image: Images | None) -> object:
    """Return what makes two images the same: the text of a path, the identity of an object, the keys of a list."""
    if isinstance(image, (list, tuple)):
        return tuple(image_key(one) for one in image)
    return id(image) if isinstance(image, Image.Image) else str(image)


class ImageEncoder:
    """Features of images, kept for the images of the last call.

    lmm: has encode_images, and config.reading: how it reads pictures. processor: image processor of the tower. mode:
    "square", "pad" or "anyres". grid: the resolutions (width, height) of anyres, empty for the default ones. threads:
    decoders. UserError for a grid that the mode does not use or that is not made of whole tiles.
    """

    def __init__(
        self, lmm: LMM, processor: Any, *, mode: ImageMode, threads: int, grid: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.lmm = lmm
        self.processor = processor
        self.mode = mode
        self.reading = lmm.config.reading
        if grid and mode != "anyres":
            raise UserError(
                f"image_grid is for image_mode anyres only; got image_mode={mode!r}, image_grid={list(grid)}"
            )
        self.grid = resolve_grid(grid, processor) if mode == "anyres" else []
        self.encoded = 0
        self._decoders = ThreadPoolExecutor(max(1, threads), thread_name_prefix="tlf-image")
        # The image is kept beside its features: an id() is only unique while its object lives.
        self._kept: dict[object, tuple[ImageLike, Tensor]] = {}
        self._rows: dict[str, int] = {}  # of files

    def rows(self, image: ImageLike) -> int:
        """Positions that an image takes. DataError for a file that anyres cannot read the size of."""
        count = int(self.lmm.tokens_per_image)
        if not self.grid:
            return count
        if isinstance(image, Image.Image):
            return count * count_inputs(object_size(image, self.reading), self.grid, tile_size(self.processor))
        name = str(image)
        if name not in self._rows:
            size = image_size(image, self.reading)
            self._rows[name] = count * count_inputs(size, self.grid, tile_size(self.processor))
        return self._rows[name]

    def encode(
        self, requests: Iterable[Request], failed: dict[object, DataError] | None = None
    ) -> dict[object, Tensor]:
        """Features [rows, D] by image key. Raises DataError, naming the request, for an image that cannot be read.

        failed: takes the errors of such images by their keys instead.
        """
        wanted = {image_key(image): (image, request.named) for request in requests for image in request.images}
        self._kept = {k: v for k, v in self._kept.items() if k in wanted}
        missing = [(k, *v) for k, v in wanted.items() if k not in self._kept]
        parts = [missing[i : i + IMAGES_PER_PASS] for i in range(0, len(missing), IMAGES_PER_PASS)]
        for part, (pixels, counts, errors) in zip(parts, self._decoders.map(self._pixels, parts), strict=True):
            if errors and failed is None:
                raise next(iter(errors.values()))
            if failed is not None:
                failed.update(errors)
            if not counts:
                continue
            passes = pixels.to(self.lmm.device, self.lmm.dtype).split(IMAGES_PER_PASS)
            encoded = torch.cat([self.lmm.encode_images(some) for some in passes])  # [N, K, D]
            each = (features.flatten(0, 1) for features in encoded.split(counts))
            read = ((key, image) for key, image, _ in part if key not in errors)
            self._kept.update({key: (image, one) for (key, image), one in zip(read, each, strict=True)})
            self.encoded += len(counts)
        return {key: features for key, (_, features) in self._kept.items()}

    def forget(self) -> None:
        """Drop the kept features and sizes."""
        self._kept.clear()
        self._rows.clear()

    def _pixels(self, part: list[tuple[object, ImageLike, str]]) -> tuple[Tensor, list[int], dict[object, DataError]]:
        """[N, 3, H, W], how many of the N inputs of the tower each image is, and the errors of those that cannot be
        read; runs in a decoder thread."""
        inputs: list[list[Image.Image]] = []
        errors: dict[object, DataError] = {}
        for key, image, request in part:
            try:
                inputs.append(self._inputs(image, request))
            except DataError as error:
                errors[key] = error
        pixels = to_pixels([one for some in inputs for one in some], self.processor, self.mode)
        return pixels, [len(i) for i in inputs], errors

    def _inputs(self, image: ImageLike, request: str) -> list[Image.Image]:
        try:
            loaded = self._load(image)
            inputs = tiles(loaded, self.grid, self.processor) if self.grid else [loaded]
            if self.grid and len(inputs) * self.lmm.tokens_per_image != self.rows(image):
                raise DataError(
                    f"{_name(image)}: the size of the image has changed since it was first looked at; ask again"
                )
        except DataError as error:
            raise DataError(f"{request}: {error}") from error
        return inputs

    def _load(self, image: ImageLike) -> Image.Image:
        loaded = of_object(image, self.reading) if isinstance(image, Image.Image) else load_image(image, self.reading)
        try:
            check_shape(loaded, self.processor, self.mode)
        except DataError as error:
            raise DataError(f"{_name(image)}: {error}") from error
        return loaded


def _name(image: ImageLike) -> str:
    """How an error names an image."""
    return "the image object" if isinstance(image, Image.Image) else naming(image)

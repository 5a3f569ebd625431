"""Images of requests: decoded in threads, encoded by the tower in batches, each once.

An image that has been decoded is known by its content, so its features serve every request that shows the same pixels,
until others need the room. A path or an object may show something else tomorrow: its features live as long as the run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinyllava_fast.data.anyres import count_inputs, resolve_grid, tile_size, tiles
from tinyllava_fast.data.images import ImageMode, check_shape, image_size, load_image, to_pixels
from tinyllava_fast.data.objects import DecodedImage
from tinyllava_fast.data.pictures import naming, object_size, of_object
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.infer.scheduling.pool import Spans, touch
from tinyllava_fast.infer.types import ImageLike, Images
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.ops import _cpp

IMAGES_PER_PASS = 32
CACHED_IMAGES = 256
CACHE_BYTES = 256 * 2**20


def image_key(image: Images | None) -> object:
    """Return what makes two images the same: pixels once decoded, the text of a path, the identity of an object."""
    if isinstance(image, (list, tuple)):
        return tuple(image_key(one) for one in image)
    if isinstance(image, DecodedImage):
        return image.digest
    return id(image) if isinstance(image, Image.Image) else str(image)


class ImageEncoder:
    """Features of images: of decoded ones in a cache of ``cache_bytes``, of others kept for the images of a call.

    cache_bytes: None: those of CACHED_IMAGES of one tile, at most CACHE_BYTES.

    lmm: has encode_images, and config.reading: how it reads pictures. processor: image processor of the tower. mode:
    "square", "pad" or "anyres". grid: the resolutions (width, height) of anyres, empty for the default ones. threads:
    decoders. UserError for a grid that the mode does not use or that is not made of whole tiles.
    """

    def __init__(
        self,
        lmm: LMM,
        processor: Any,
        *,
        mode: ImageMode,
        threads: int,
        grid: Sequence[tuple[int, int]] = (),
        cache_bytes: int | None = None,
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
        self.encoded = self.hits = 0
        self._decoders = ThreadPoolExecutor(max(1, threads), thread_name_prefix="tlf-image")
        # The image is kept beside its features: an id() is only unique while its object lives.
        self._kept: dict[object, tuple[ImageLike, Tensor]] = {}
        if cache_bytes is None:
            one = lmm.tokens_per_image * lmm.hidden_size * lmm.dtype.itemsize
            cache_bytes = min(CACHE_BYTES, CACHED_IMAGES * one)
        self._cache = RecentFeatures(cache_bytes)
        self._rows: dict[str, int] = {}  # of files

    def rows(self, image: ImageLike) -> int:
        """Positions that an image takes. DataError for a file that anyres cannot read the size of."""
        count = int(self.lmm.tokens_per_image)
        if not self.grid:
            return count
        if isinstance(image, DecodedImage):
            return count * count_inputs(image.pixels.size, self.grid, tile_size(self.processor))
        if isinstance(image, Image.Image):
            return count * count_inputs(object_size(image, self.reading), self.grid, tile_size(self.processor))
        name = str(image)
        if name not in self._rows:
            size = image_size(image, self.reading)
            self._rows[name] = count * count_inputs(size, self.grid, tile_size(self.processor))
        return self._rows[name]

    def decode(self, image: ImageLike) -> DecodedImage:
        """Return the image as the model reads it. DataError for one that cannot be read."""
        return image if isinstance(image, DecodedImage) else DecodedImage.of(self._load(image))

    def encode(
        self, images: Iterable[tuple[ImageLike, str]], failed: dict[object, DataError] | None = None
    ) -> dict[object, Tensor]:
        """Return features [rows, D] by image key. images: each with what a message calls its request.

        Raises DataError, naming the request, for an image that cannot be read. failed: takes the errors of such images
        by their keys instead.
        """
        wanted = {image_key(image): (image, named) for image, named in images}
        self._kept = {k: v for k, v in self._kept.items() if k in wanted}
        for key, (image, _) in wanted.items():
            if key in self._kept or not isinstance(image, DecodedImage):
                continue
            if (features := self._cache.get(image.digest)) is not None:
                self._kept[key] = (image, features)
                self.hits += 1
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
            for (key, image), one in zip(read, each, strict=True):
                self._kept[key] = (image, one)
                if isinstance(image, DecodedImage):
                    self._cache.put(image.digest, one)
            self.encoded += len(counts)
        return {key: features for key, (_, features) in self._kept.items()}

    def take_memory(self) -> None:
        """Take the memory of the cache now, and not as images come."""
        self._cache.take_memory(torch.empty(0, self.lmm.hidden_size, dtype=self.lmm.dtype, device=self.lmm.device))

    def forget(self) -> None:
        """Drop the features and sizes of images that are not decoded, whose files may change."""
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
        if isinstance(image, DecodedImage):
            loaded = image.pixels
        elif isinstance(image, Image.Image):
            loaded = of_object(image, self.reading)
        else:
            loaded = load_image(image, self.reading)
        try:
            check_shape(loaded, self.processor, self.mode)
        except DataError as error:
            raise DataError(f"{_name(image)}: {error}") from error
        return loaded


class RecentFeatures:
    """Features of decoded images by their digests, as many as ``limit`` bytes hold; those used last stay.

    They lie in one tensor, whose memory is taken once: a server that has seen many images holds no more than before.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = torch.empty(0)  # [rows, D]
        self._rows = Spans(0)
        self._places: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # first row and number of rows

    def __len__(self) -> int:
        """Return how many images it has the features of."""
        return len(self._places)

    def take_memory(self, like: Tensor) -> None:
        """Take the memory now. like: [any, D], features of the model's dtype on its device."""
        self._reserve(like)
        touch([self._held], "the cache of image features", "give image_cache_bytes")

    def get(self, digest: bytes) -> Tensor | None:
        """Return a copy of the features [rows, D] of an image, or None."""
        place = self._places.get(digest)
        if place is None:
            return None
        self._places.move_to_end(digest)
        return self._held.narrow(0, *place).clone()  # others may take its rows while it is in use

    def put(self, digest: bytes, features: Tensor) -> None:
        """Keep a copy of features [rows, D] in place of the oldest ones; none of an image that is larger than all."""
        self._reserve(features)
        rows = len(features)
        if digest in self._places or not 0 < rows <= self._rows.size:
            return
        while (start := self._rows.take(rows)) is None:
            self._rows.give(*self._places.popitem(last=False)[1])
        self._places[digest] = start, rows
        self._held[start : start + rows] = features.detach()

    def _reserve(self, like: Tensor) -> None:
        """Make room for rows of this width, dtype and device, unless there is."""
        held, width = self._held, like.shape[1]
        if held.shape[1:] == (width,) and held.dtype == like.dtype and held.device == like.device:
            return
        rows = self.limit // (width * like.dtype.itemsize)
        with torch.inference_mode(False):  # written to in and outside of it
            empty = _cpp.zeros if like.is_cpu else partial(torch.empty, device=like.device)
            self._held = empty(rows, width, dtype=like.dtype)
        self._rows, self._places = Spans(rows), OrderedDict()


def _name(image: ImageLike) -> str:
    """Return the name of an image in an error."""
    if isinstance(image, (str, Path)):
        return naming(image)
    return "the image" if isinstance(image, DecodedImage) else "the image object"

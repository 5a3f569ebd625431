"""Images of requests: decoded in threads, encoded by the tower in batches, each once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from torch import Tensor

from tinyllava_fast.data.images import ImageMode, load_image, to_pixels
from tinyllava_fast.infer.schedule import image_key
from tinyllava_fast.infer.types import ImageLike

IMAGES_PER_PASS = 32


class ImageEncoder:
    """Features of images, kept for the images of the last call.

    lmm: has encode_images. processor: image processor of the tower. mode: "square" or "pad". threads: decoders.
    """

    def __init__(self, lmm: Any, processor: Any, *, mode: ImageMode, threads: int) -> None:
        self.lmm = lmm
        self.processor = processor
        self.mode = mode
        self.encoded = 0
        self._decoders = ThreadPoolExecutor(max(1, threads), thread_name_prefix="tlf-image")
        # The image is kept beside its features: an id() is only unique while its object lives.
        self._kept: dict[object, tuple[ImageLike, Tensor]] = {}

    def encode(self, images: Iterable[ImageLike]) -> dict[object, Tensor]:
        """Features [K, D] by image key. Raises DataError for an image that cannot be read."""
        wanted = {image_key(image): image for image in images}
        self._kept = {k: v for k, v in self._kept.items() if k in wanted}
        missing = [(k, image) for k, image in wanted.items() if k not in self._kept]
        parts = [missing[i : i + IMAGES_PER_PASS] for i in range(0, len(missing), IMAGES_PER_PASS)]
        for part, pixels in zip(parts, self._decoders.map(self._pixels, parts), strict=True):
            encoded = self.lmm.encode_images(pixels.to(self.lmm.device, self.lmm.dtype))  # [N, K, D]
            self._kept.update({key: (image, one) for (key, image), one in zip(part, encoded, strict=True)})
        self.encoded += len(missing)
        return {key: features for key, (_, features) in self._kept.items()}

    def forget(self) -> None:
        """Drop the kept features."""
        self._kept.clear()

    def _pixels(self, part: list[tuple[object, ImageLike]]) -> Tensor:
        """[N, 3, H, W] of N images; runs in a decoder thread."""
        images = [image if isinstance(image, Image.Image) else load_image(image) for _, image in part]
        return to_pixels([image.convert("RGB") for image in images], self.processor, self.mode)

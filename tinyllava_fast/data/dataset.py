"""A data set tokenized once: the plan of each epoch's packs, and the packs themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch
from PIL import Image

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.collate import collate
from tinyllava_fast.data.images import levels_table, pixel_shape, to_levels
from tinyllava_fast.data.source import Source
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import DataError
from tinyllava_fast.ops import pack_plan

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

ORDER = 2
"""Of the packs in an epoch; in 1 the longest samples came first and the shortest last."""
_SHUFFLE = 1  # of an epoch's seeds: that of the order of its packs


class PackedDataset:
    """Samples of one DataConfig, tokenized at or before construction and served as packs.

    tokenizer: see load_tokenizer. processor: a transformers ``*ImageProcessorPil``. tokens_per_image: K. seed: of the
    order and the augmentation. Construction checks every record and the presence of every image; DataError.
    """

    def __init__(
        self,
        data: DataConfig,
        batch: BatchConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        processor: BaseImageProcessor,
        tokens_per_image: int,
        seed: int,
    ) -> None:
        self.data = data
        self.batch = batch
        self.processor = processor
        self.tokens_per_image = tokens_per_image
        self.seed = seed
        self.source = Source(
            data,
            batch,
            tokenizer=tokenizer,
            processor=processor,
            tokens_per_image=tokens_per_image,
            seed=seed,
        )
        self.report = self.source.report
        self.skipped = self.source.skipped
        self.lengths, self.images, self.segments = self.source.lengths, self.source.images, self.source.segments
        self._table = levels_table(processor)
        self._plans: dict[int, list[np.ndarray]] = {}
        limits = (batch.tokens, batch.max_images, batch.max_segments, batch.lookahead)
        self.fingerprint: int = crc32(repr((self.source.fingerprint, seed, tokens_per_image, limits)).encode())
        """A checksum of everything that the plans depend on."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the largest pack's pixels in 8 bits; 0 where they are not sent as such, or no sample has any."""
        if self._table is None or not self.images.any():
            return 0
        multiple = self.batch.image_multiple
        most = -(-self.batch.max_images // multiple) * multiple
        return most * math.prod(pixel_shape(self.processor))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The packs of an epoch as arrays of sample numbers; a pure function of the data, the seed and the epoch.

        Packing begins with the longest samples it sees and ends with what is left, so the packs are shuffled.
        """
        if epoch not in self._plans:
            limits = self.batch
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            lengths, images, segments = (
                torch.from_numpy(column[order]) for column in (self.lengths, self.images, self.segments)
            )
            most = (limits.tokens, limits.max_images, limits.max_segments, limits.lookahead)
            packs = pack_plan(lengths, images, segments, *most)
            by_pack = torch.argsort(packs, stable=True).numpy()
            bounds = np.cumsum(torch.bincount(packs).numpy())[:-1]
            filled = np.split(order[by_pack], bounds)
            while len(self._plans) > 1:
                self._plans.pop(next(iter(self._plans)))
            shuffled = np.random.default_rng([self.seed, epoch, _SHUFFLE]).permutation(len(filled))
            self._plans[epoch] = [filled[number] for number in shuffled]
        return self._plans[epoch]

    def pack(self, epoch: int, indices: Iterable[int]) -> PackedBatch:
        """Return ``levels`` of a pack with its pixels normalized."""
        return self.levels(epoch, indices).to("cpu")

    def levels(self, epoch: int, indices: Iterable[int]) -> PackedBatch:
        """One pack: images decoded and augmented by (seed, epoch, record, image), tokens laid out; pixels in 8 bits.

        DataError for an image that cannot be decoded, unless data.on_bad_image is skip: then its record is left out
        and named in ``skipped``.
        """
        source = self.source
        samples: list[list[Segment]] = []
        names: list[str] = []
        pictures: list[Image.Image] = []
        skipped: list[str] = []
        for index in map(int, indices):
            sample, shown = source.sample(index)
            if shown:
                try:
                    pictures += source.pictures(index, shown, epoch)
                except DataError as error:
                    skipped.append(source.bad_image(error))
                    continue
            samples.append(sample)
            names.append(source.name(index))
        batch = self._collate(samples, pictures, names)
        batch.skipped = skipped
        return batch

    def empty(self) -> PackedBatch:
        """A pack without samples, for a process that has none in the last step; as ``levels`` gives them."""
        return self._collate([], [], [])

    def _collate(self, samples: list[list[Segment]], pictures: list[Image.Image], names: list[str]) -> PackedBatch:
        return collate(
            samples,
            to_levels(pictures, self.processor, self.data.image_mode),
            tokens=self.batch.tokens,
            max_segments=self.batch.max_segments,
            tokens_per_image=self.tokens_per_image,
            image_multiple=self.batch.image_multiple,
            shared_prefixes=self.data.turns == "independent",
            sample_ids=names,
            levels=self._table,
        )

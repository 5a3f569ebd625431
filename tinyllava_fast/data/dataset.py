"""A data set tokenized once: the plan of each epoch's packs, and the packs themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch
from PIL import Image

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.collate import collate
from tinyllava_fast.data.images import levels_table, pixel_shape, to_levels
from tinyllava_fast.data.mixing import epoch_order, samples_per_epoch
from tinyllava_fast.data.source import DataReport, Source
from tinyllava_fast.data.split import Split
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IGNORE_INDEX, PackedBatch
from tinyllava_fast.errors import DataError
from tinyllava_fast.ops import pack_plan

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

ORDER = 2
"""Of the packs in an epoch; in 1 the longest samples came first and the shortest last."""
_SHUFFLE = 1  # of an epoch's seeds: that of the order of its packs


@dataclass
class EpochSizes:
    """Sums over an epoch; of a source of which it shows a part, the part of the source's sum."""

    samples: int = 0
    tokens: float = 0.0
    supervised_tokens: float = 0.0
    images: float = 0.0


class PackedDataset:
    """Samples of one DataConfig, of all its sources, tokenized at or before construction and served as packs.

    tokenizer: see load_tokenizer. processor: a transformers ``*ImageProcessorPil``. tokens_per_image: K. seed: of the
    order and the augmentation. split: the side of the records that is taken; None: all. Construction checks every
    record and the presence of every image; DataError.
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
        split: Split | None = None,
    ) -> None:
        self.data = data
        self.batch = batch
        self.processor = processor
        self.tokens_per_image = tokens_per_image
        self.seed = seed
        each = data.each()
        self.names = [source.title for source, _ in each]
        """Names of the sources."""
        self.sources = [
            Source(
                alone,
                batch,
                tokenizer=tokenizer,
                processor=processor,
                tokens_per_image=tokens_per_image,
                seed=seed,
                split=split,
            )
            for _, alone in each
        ]
        sizes = [len(source) for source in self.sources]
        self._sizes, self._ends = sizes, np.cumsum(sizes)
        self.per_epoch = samples_per_epoch(sizes, [source for source, _ in each])
        """Samples of each source in an epoch."""
        self.lengths, self.images, self.segments = (
            np.concatenate([getattr(source, name) for source in self.sources])
            for name in ("lengths", "images", "segments")
        )
        self.skipped = [reason for source in self.sources for reason in source.skipped]
        """Records left out from the start (data.on_bad_image: skip), with reasons."""
        self.report = sum((source.report for source in self.sources), DataReport())
        self._table = levels_table(processor)
        self._plans: dict[int, list[np.ndarray]] = {}
        self._shares_prefixes = any(source.data.turns == "independent" for source in self.sources)
        limits = (batch.tokens, batch.max_images, batch.max_segments, batch.lookahead)
        stores = tuple(source.fingerprint for source in self.sources)
        facts = (*stores, seed, tokens_per_image, limits) + ((self.per_epoch,) if data.sources else ())
        self.fingerprint: int = crc32(repr(facts).encode())
        """A checksum of everything that the plans depend on."""

    def __len__(self) -> int:
        """Return the number of samples that are there, each counted once."""
        return len(self.lengths)

    @property
    def where(self) -> str:
        """The record files, for messages."""
        return ", ".join(source.data.records for source in self.sources)

    @property
    def grid(self) -> list[tuple[int, int]]:
        """The resolutions of image_mode anyres, (width, height); empty in the other modes."""
        return self.sources[0].files.grid

    def epoch_sizes(self) -> EpochSizes:
        """Return what an epoch holds: each source's own sums, as often as the epoch shows it."""
        sizes = EpochSizes()
        for source, count in zip(self.sources, self.per_epoch, strict=True):
            often = count / len(source)
            sizes.samples += count
            sizes.tokens += often * source.report.tokens
            sizes.supervised_tokens += often * source.report.supervised_tokens
            sizes.images += often * float(source.images.sum())
        return sizes

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the largest pack's pixels in 8 bits; 0 where they are not sent as such, or no sample has any."""
        if self._table is None or not self.images.any():
            return 0
        multiple = self.batch.image_multiple
        most = -(-self.batch.max_images // multiple) * multiple
        return most * math.prod(pixel_shape(self.processor))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The packs of an epoch as arrays of tickets; a pure function of the data, the seed and the epoch.

        A ticket is the number of a sample, or of its second showing in the epoch and so on: see ``epoch_order``.
        Packing begins with the longest samples it sees and ends with what is left, so the packs are shuffled.
        """
        if epoch not in self._plans:
            limits = self.batch
            tickets = epoch_order(self._sizes, self.per_epoch, self.seed, epoch)
            order = tickets % len(self)
            lengths, images, segments = (
                torch.from_numpy(column[order]) for column in (self.lengths, self.images, self.segments)
            )
            most = (limits.tokens, limits.max_images, limits.max_segments, limits.lookahead)
            packs = pack_plan(lengths, images, segments, *most)
            by_pack = torch.argsort(packs, stable=True).numpy()
            bounds = np.cumsum(torch.bincount(packs).numpy())[:-1]
            filled = np.split(tickets[by_pack], bounds)
            while len(self._plans) > 1:
                self._plans.pop(next(iter(self._plans)))
            shuffled = np.random.default_rng([self.seed, epoch, _SHUFFLE]).permutation(len(filled))
            self._plans[epoch] = [filled[number] for number in shuffled]
        return self._plans[epoch]

    def pack(self, epoch: int, tickets: Iterable[int]) -> PackedBatch:
        """Return ``levels`` of a pack with its pixels normalized."""
        return self.levels(epoch, tickets).to("cpu")

    def levels(self, epoch: int, tickets: Iterable[int]) -> PackedBatch:
        """One pack: images decoded and augmented by (seed, epoch, ticket, image), tokens laid out; pixels in 8 bits.

        DataError for an image that cannot be decoded, unless data.on_bad_image is skip: then its record is left out
        and named in ``skipped``.
        """
        samples: list[list[Segment]] = []
        names: list[str] = []
        owners: list[int] = []
        pictures: list[Image.Image] = []
        skipped: list[str] = []
        for ticket in map(int, tickets):
            owner, index = self._owner(ticket % len(self))
            source = self.sources[owner]
            sample, shown = source.sample(index)
            if shown:
                try:
                    pictures += source.pictures(index, shown, epoch, ticket)
                except DataError as error:
                    skipped.append(source.bad_image(error))
                    continue
            samples.append(sample)
            names.append(source.name(index))
            owners.append(owner)
        batch = self._collate(samples, pictures, names)
        batch.skipped = skipped
        if len(self.sources) > 1:
            batch.sample_sources = owners
            batch.segment_sources = [owner for owner, sample in zip(owners, samples, strict=True) for _ in sample]
            batch.source_counts = _counts(batch, owners, len(self.sources))
        return batch

    def empty(self) -> PackedBatch:
        """A pack without samples, for a process that has none in the last step; as ``levels`` gives them."""
        return self._collate([], [], [])

    def names_checksum(self) -> int:
        """Return a checksum of all record ids and image paths, which no position depends on."""
        each = [source.store.sources() for source in self.sources]
        return each[0] if len(each) == 1 else crc32(repr(each).encode())

    def _owner(self, sample: int) -> tuple[int, int]:
        """Return the number of the source that a sample is of, and its number there."""
        owner = int(np.searchsorted(self._ends, sample, side="right"))
        return owner, sample - int(self._ends[owner]) + self._sizes[owner]

    def _collate(self, samples: list[list[Segment]], pictures: list[Image.Image], names: list[str]) -> PackedBatch:
        return collate(
            samples,
            to_levels(pictures, self.processor, self.data.image_mode),
            tokens=self.batch.tokens,
            max_segments=self.batch.max_segments,
            tokens_per_image=self.tokens_per_image,
            image_multiple=self.batch.image_multiple,
            shared_prefixes=self._shares_prefixes,
            sample_ids=names,
            levels=self._table,
        )


def _counts(batch: PackedBatch, owners: list[int], sources: int) -> list[tuple[int, int, int]]:
    """Return (samples, tokens, supervised tokens) of each source in a pack. owners: source of each sample."""
    bounds = batch.cu_seqlens.numpy()[: len(batch.segment_sources) + 1]
    learnt = np.concatenate([[0], np.cumsum((batch.labels != IGNORE_INDEX).numpy())])
    samples = np.bincount(np.array(owners, np.int64), minlength=sources)
    tokens, supervised = (
        np.bincount(np.array(batch.segment_sources, np.int64), np.diff(column), minlength=sources).astype(np.int64)
        for column in (bounds, learnt[bounds])
    )
    return list(zip(samples.tolist(), tokens.tolist(), supervised.tolist(), strict=True))

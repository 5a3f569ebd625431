"""A data set tokenized once: the plan of each epoch's packs, and the packs themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.drawn import Drawn
from tinyllava_fast.data.mixing import samples_per_epoch
from tinyllava_fast.data.packs import EpochSizes, PackSource, Pool
from tinyllava_fast.data.source import open_source
from tinyllava_fast.data.split import Split
from tinyllava_fast.data.types import PackedBatch

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


class PackedDataset(PackSource):
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
        super().__init__(data, batch, processor=processor, tokens_per_image=tokens_per_image, seed=seed)
        self.sources = [
            open_source(images, batch, tokenizer=tokenizer, tokens_per_image=tokens_per_image, split=split)
            for images in self._shown_by
        ]
        self._pool = pool = Pool(self.sources)
        self.lengths, self.images, self.segments = pool.lengths, pool.images, pool.segments
        self.per_epoch = samples_per_epoch(pool.sizes, [source for source, _ in self._each])
        """Samples of each source in an epoch."""
        self.skipped = [reason for source in self.sources for reason in source.skipped]
        self.faults = {
            str(fault): (name, fault)
            for name, source in zip(self.names, self.sources, strict=True)
            for fault in source.faults
        }
        self.report = pool.report
        self._plans: dict[int, list[np.ndarray]] = {}
        stores = tuple(source.fingerprint for source in self.sources)
        facts = (*stores, seed, tokens_per_image, batch.room) + ((self.per_epoch,) if data.sources else ())
        self.fingerprint = crc32(repr(facts).encode())

    def __len__(self) -> int:
        """Return the number of samples that are there, each counted once."""
        return len(self._pool)

    def epoch_sizes(self) -> EpochSizes:
        """See PackSource."""
        return self._pool.sums(self.per_epoch)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """See PackSource."""
        if epoch not in self._plans:
            found = self._pool.packs(self.per_epoch, self.batch, self.seed, epoch)
            while len(self._plans) > 1:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = found
        return self._plans[epoch]

    def job(self, epoch: int, tickets: np.ndarray) -> np.ndarray:
        """See PackSource. Processes that build packs have the samples, too."""
        return tickets

    def pack(self, epoch: int, tickets: Iterable[int]) -> PackedBatch:
        """Return ``levels`` of a pack with its pixels normalized."""
        return self.levels(epoch, tickets).to("cpu")

    def needs(self, epoch: int, tickets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See PackSource."""
        return self._pool.needs(tickets)

    def levels(self, epoch: int, job: Iterable[int | Drawn]) -> PackedBatch:
        """See PackSource."""
        return self._build(epoch, (self._pool.draw(int(ticket)) for ticket in job if not isinstance(ticket, Drawn)))

    def names_checksum(self) -> int:
        """See PackSource."""
        each = [source.store.sources() for source in self.sources]
        return each[0] if len(each) == 1 else crc32(repr(each).encode())

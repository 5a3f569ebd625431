"""What data sets of every kind share: the choice of samples for each pack, and the packs themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.collate import collate
from tinyllava_fast.data.drawn import Drawn, SourceImages
from tinyllava_fast.data.images import levels_table, pixel_shape, to_levels
from tinyllava_fast.data.mixing import epoch_order
from tinyllava_fast.data.records import Refused
from tinyllava_fast.data.source import DataReport, Source
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IGNORE_INDEX, PackedBatch
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import Fields
from tinyllava_fast.ops import pack_plan

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

_SHUFFLE = 1  # of an epoch's seeds: that of the order of its packs


@dataclass
class EpochSizes:
    """Sums over an epoch; of a source of which it shows a part, the part of the source's sum."""

    samples: int = 0
    tokens: float = 0.0
    supervised_tokens: float = 0.0
    images: float = 0.0


class Pool:
    """The samples of several sources, numbered through.

    numbers: of the sources among all of the data set; None: they are all. lengths, images, segments: as for Source.
    """

    def __init__(self, sources: Sequence[Source], numbers: Sequence[int] | None = None) -> None:
        self.sources = sources
        self._numbers = range(len(sources)) if numbers is None else numbers
        self.sizes = [len(source) for source in sources]
        self._ends = np.cumsum(self.sizes)
        self.lengths, self.images, self.segments = (
            np.concatenate([getattr(source, name) for source in sources]) for name in ("lengths", "images", "segments")
        )
        self.report = sum((source.report for source in sources), DataReport())

    def __len__(self) -> int:
        return len(self.lengths)

    def draw(self, ticket: int) -> Drawn:
        """Return a sample by its ticket (see ``epoch_order``)."""
        sample = ticket % len(self)
        owner = int(np.searchsorted(self._ends, sample, side="right"))
        index = sample - int(self._ends[owner]) + self.sizes[owner]
        return self.sources[owner].draw(index, self._numbers[owner], ticket)

    def needs(self, tickets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions and the inputs of the tower that samples need, [tickets] each."""
        samples = tickets % len(self)
        return self.lengths[samples], self.images[samples]

    def packs(self, counts: Sequence[int], batch: BatchConfig, seed: int, epoch: int) -> list[np.ndarray]:
        """Return the packs of an epoch as arrays of tickets. counts: samples of each source in it.

        Packing begins with the longest samples it sees and ends with what is left, so the packs are shuffled.
        """
        tickets = epoch_order(self.sizes, counts, seed, epoch)
        order = tickets % len(self)
        lengths, images, segments = (
            torch.from_numpy(column[order]) for column in (self.lengths, self.images, self.segments)
        )
        packs = pack_plan(lengths, images, segments, *batch.room)
        by_pack = torch.argsort(packs, stable=True).numpy()
        bounds = np.cumsum(torch.bincount(packs).numpy())[:-1]
        filled = np.split(tickets[by_pack], bounds)
        shuffled = np.random.default_rng([seed, epoch, _SHUFFLE]).permutation(len(filled))
        return [filled[number] for number in shuffled]

    def sums(self, counts: Sequence[int]) -> EpochSizes:
        """Return what an epoch holds: each source's own sums, as often as the epoch shows it."""
        sizes = EpochSizes()
        for source, count in zip(self.sources, counts, strict=True):
            often = count / len(source)
            sizes.samples += count
            sizes.tokens += often * source.report.tokens
            sizes.supervised_tokens += often * source.report.supervised_tokens
            sizes.images += often * float(source.images.sum())
        return sizes


class PackSource:
    """A data set as the loader sees it: epochs of packs, or an endless row of them, of which each is a *block*.

    Job: what the process that builds a pack is sent of it.
    """

    endless: ClassVar[bool] = False
    """Whether its blocks come one after the other, to be seen once."""
    fingerprint: int
    """A checksum of everything that the plans depend on."""
    report: DataReport
    skipped: list[str]
    """Records left out from the start (data.on_error, data.on_bad_image), with reasons."""
    faults: dict[str, tuple[str, Refused]]
    """Records left out, as far as known, by their reasons: the name of the source, and the fault."""
    lengths: np.ndarray
    images: np.ndarray
    """Positions and inputs of the tower of each sample; of a stream, of those of its first block."""

    def __init__(
        self, data: DataConfig, batch: BatchConfig, *, processor: BaseImageProcessor, tokens_per_image: int, seed: int
    ) -> None:
        self.data = data
        self.batch = batch
        self.processor = processor
        self.tokens_per_image = tokens_per_image
        self.seed = seed
        self._each = data.each()
        self.names = [source.title for source, _ in self._each]
        """Names of the sources."""
        self._shown_by = [SourceImages(alone, processor, seed) for _, alone in self._each]
        self._table = levels_table(processor)
        self._shares_prefixes = any(alone.turns == "independent" for _, alone in self._each)

    @property
    def where(self) -> str:
        """The record files, for messages."""
        return ", ".join(alone.records for _, alone in self._each)

    @property
    def grid(self) -> list[tuple[int, int]]:
        """The resolutions of image_mode anyres, (width, height); empty in the other modes."""
        return self._shown_by[0].files.grid

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the largest pack's pixels in 8 bits; 0 where they are not sent as such, or no sample has any."""
        if self._table is None or not (self.endless or self.images.any()):
            return 0
        multiple = self.batch.image_multiple
        most = -(-self.batch.max_images // multiple) * multiple
        return most * math.prod(pixel_shape(self.processor))

    def epoch_sizes(self) -> EpochSizes:
        """Return what an epoch holds; of a stream, its first block."""
        raise NotImplementedError

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the packs of an epoch as arrays of tickets; a pure function of the data, the seed and the epoch.

        A ticket is the number of a sample, or of its second showing in the epoch and so on: see ``epoch_order``.
        """
        raise NotImplementedError

    def needs(self, epoch: int, tickets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions and the inputs of the tower of each sample of a pack of the plan."""
        raise NotImplementedError

    def job(self, epoch: int, tickets: np.ndarray) -> np.ndarray | list[Drawn]:
        """Return a pack of the plan as ``levels`` takes it, perhaps in another process."""
        raise NotImplementedError

    def levels(self, epoch: int, job: Iterable[int | Drawn]) -> PackedBatch:
        """One pack: images decoded and augmented by (seed, epoch, ticket, image), tokens laid out; pixels in 8 bits.

        DataError for an image that cannot be decoded, unless its record may be skipped: then it is left out and named
        in ``skipped``.
        """
        raise NotImplementedError

    def names_checksum(self) -> int:
        """Return a checksum of all record ids and image paths, which no position depends on."""
        raise NotImplementedError

    def passes(self, epoch: int, share: float) -> float:
        """Return the passes over the data before a share of an epoch."""
        return epoch + share

    def open(self, workers: int) -> None:
        """Let that many processes help, until ``close``."""

    def close(self) -> None:
        """End what ``open`` began."""

    def state(self, epoch: int) -> dict[str, object]:
        """Return what is needed to begin with this epoch; its plan has been asked for."""
        return {}

    def go_to(self, epoch: int, state: Fields) -> None:
        """Begin with the epoch of a state. CheckpointError if its records are others."""

    def left_out(self, epoch: int) -> list[str]:
        """Return the reasons for records that this epoch leaves out, beside ``skipped``."""
        return []

    def hold(self, epoch: int) -> None:
        """Note that packs of this epoch and of those that follow are asked for again, until this is called anew."""

    def forget(self, before: int) -> None:
        """Note that nobody asks for earlier epochs any more."""

    def empty(self) -> PackedBatch:
        """A pack without samples, for a process that has none in the last step; as ``levels`` gives them."""
        return self._collate([], [], [])

    def _build(self, epoch: int, drawn: Iterable[Drawn]) -> PackedBatch:
        """Return the pack of some samples; see ``levels``."""
        samples: list[list[Segment]] = []
        names: list[str] = []
        owners: list[int] = []
        pictures: list[Image.Image] = []
        skipped: list[str] = []
        for sample in drawn:
            shown_by = self._shown_by[sample.source]
            if sample.shown:
                try:
                    pictures += shown_by.load(sample, epoch)
                except DataError as error:
                    skipped.append(shown_by.fault(error))
                    continue
            samples.append(sample.segments)
            names.append(sample.name)
            owners.append(sample.source)
        batch = self._collate(samples, pictures, names)
        batch.skipped = skipped
        if len(self.names) > 1:
            batch.sample_sources = owners
            batch.segment_sources = [owner for owner, sample in zip(owners, samples, strict=True) for _ in sample]
            batch.source_counts = _counts(batch, owners, len(self.names))
        return batch

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

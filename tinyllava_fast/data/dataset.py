"""A data set tokenised once: the plan of each epoch's packs, and the packs themselves."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
import torch

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.augment import augment
from tinyllava_fast.data.collate import collate, targets, truncate, width
from tinyllava_fast.data.images import load_image, pixel_shape, to_pixels
from tinyllava_fast.data.records import Record, read_records
from tinyllava_fast.data.store import SampleStore
from tinyllava_fast.data.templates.base import TEMPLATES, Segment
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN, PackedBatch
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.ops import pack_plan

_CHUNK = 512  # records tokenised in one call
_SHOWN = 5  # missing images named in an error
T = TypeVar("T")


@dataclass
class DataReport:
    """What a data set holds; said once at the start and in the run's summary."""

    records: int = 0
    text_only: int = 0
    tokens: int = 0
    """Positions of all samples, image tokens included."""
    supervised_tokens: int = 0
    unsupervised: int = 0
    """Samples without a supervised token: kept, but nothing is learnt from them."""
    truncated: int = 0
    """Samples cut to the longest length (data.overlong: truncate)."""

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


class PackedDataset:
    """Samples of one DataConfig, tokenised at construction and served as packs.

    tokenizer: see load_tokenizer. processor: a transformers ``*ImageProcessorPil``. tokens_per_image: K. seed: of the
    order and the augmentation. Construction checks every record and the presence of every image; DataError.
    """

    def __init__(
        self, data: DataConfig, batch: BatchConfig, *, tokenizer: Any, processor: Any, tokens_per_image: int, seed: int
    ) -> None:
        self.data = data
        self.batch = batch
        self.processor = processor
        self.tokens_per_image = tokens_per_image
        self.seed = seed
        if data.turns_per_sample and data.turns != "independent":
            raise UserError(
                "data.turns_per_sample splits records between turns, which only data.turns=independent allows; "
                f"got turns={data.turns!r}, turns_per_sample={data.turns_per_sample}"
            )
        self.store = SampleStore()
        self.report = DataReport()
        sizes: list[tuple[int, int, int]] = []
        template = TEMPLATES.get(data.template, "data.template")
        if template.eos:
            template.stop_id(tokenizer)
        missing = _Missing(data.image_folder)
        with _no_garbage_collection():
            for records in _chunks(read_records(data.records), _CHUNK):
                for record in records:
                    if problem := template.problem(record.turns, record.image is not None):
                        raise self._error(record, "conversations", problem)
                    missing.look(record)
                pieces = [piece for record in records for piece in self._pieces(record)]
                encoded = template.encode([p.turns for p in pieces], tokenizer, data.turns, data.masks)
                sizes += [self._add(piece, sample) for piece, sample in zip(pieces, encoded, strict=True)]
        missing.stop(data.records)
        table = np.array(sizes, np.int64)
        self.lengths, self.images, self.segments = (table[:, column].copy() for column in range(3))
        self._plans: dict[int, list[np.ndarray]] = {}
        limits = (batch.tokens, batch.max_images, batch.max_segments, batch.lookahead)
        self.fingerprint: int = crc32(repr((self.store.fingerprint(), seed, tokens_per_image, limits)).encode())
        """A checksum of everything that the plans depend on."""

    def __len__(self) -> int:
        return len(self.store)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The packs of an epoch as arrays of record indices; a pure function of the data, the seed and the epoch."""
        if epoch not in self._plans:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            lengths, images, segments = (
                torch.from_numpy(column[order]) for column in (self.lengths, self.images, self.segments)
            )
            limits = (self.batch.tokens, self.batch.max_images, self.batch.max_segments, self.batch.lookahead)
            packs = pack_plan(lengths, images, segments, *limits)
            by_pack = torch.argsort(packs, stable=True).numpy()
            bounds = np.cumsum(torch.bincount(packs).numpy())[:-1]
            while len(self._plans) > 1:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = np.split(order[by_pack], bounds)
        return self._plans[epoch]

    def pack(self, epoch: int, indices: Iterable[int]) -> PackedBatch:
        """One pack: images decoded, augmented by (seed, epoch, record) and normalised, tokens laid out.

        DataError for an image that cannot be decoded, unless data.on_bad_image is skip: then its record is left out
        and named in ``skipped``.
        """
        samples, names, pictures, skipped = [], [], [], []
        for index in map(int, indices):
            sample = self.store.sample(index)
            markers = sum(segment.ids.count(IMAGE_INDEX) for segment in sample)
            if markers:
                try:
                    image = load_image(os.path.join(self.data.image_folder, self.store.image(index)))
                except DataError as error:
                    reason = f"{self.data.records}: record id {self.store.name(index)!r}: image: {error}"
                    if self.data.on_bad_image == "fail":
                        raise DataError(reason) from error
                    skipped.append(reason)
                    continue
                pictures += [augment(image, self.data.augment, (self.seed, epoch, index))] * markers
            samples.append(sample)
            names.append(self.store.name(index))
        batch = self._collate(samples, pictures, names)
        batch.skipped = skipped
        return batch

    def empty(self) -> PackedBatch:
        """A pack without samples, for a process that has none in the last step."""
        return self._collate([], [], [])

    def _collate(self, samples: list[list[Segment]], pictures: list[Any], names: list[str]) -> PackedBatch:
        if pictures:
            pixels = to_pixels(pictures, self.processor, self.data.image_mode)
        else:
            pixels = torch.zeros(0, *pixel_shape(self.processor))
        return collate(
            samples,
            pixels,
            tokens=self.batch.tokens,
            max_segments=self.batch.max_segments,
            tokens_per_image=self.tokens_per_image,
            image_multiple=self.batch.image_multiple,
            sample_ids=names,
        )

    def _add(self, record: Record, sample: list[Segment]) -> tuple[int, int, int]:
        """Store a sample and count it; (positions, images, segments) that it needs in a pack."""
        count = self.tokens_per_image
        budget = min(self.data.max_tokens or self.batch.tokens, self.batch.tokens)
        key = "batch.tokens" if budget == self.batch.tokens else "data.max_tokens"
        length = sum(width(segment, count) for segment in sample)
        if length > budget:
            if count >= budget and record.image is not None:
                raise self._error(record, "image", f"{count} image tokens do not fit {key}={budget}; raise {key}")
            if self.data.overlong == "fail":
                remedy = f"raise {key}, or set data.overlong=truncate"
                raise self._error(record, "conversations", f"{length} tokens exceed {key}={budget}; {remedy}")
            sample = truncate(sample, budget, count)
            length = sum(width(segment, count) for segment in sample)
            self.report.truncated += 1
        images = sum(segment.ids.count(IMAGE_INDEX) for segment in sample)
        for need, limit, name in (
            (images, self.batch.max_images, "max_images"),
            (len(sample), self.batch.max_segments, "max_segments"),
        ):
            if need > limit:
                what = name.removeprefix("max_")
                raise self._error(record, "conversations", f"{need} {what} exceed batch.{name}={limit}; raise it")
        learnt = sum(map(targets, sample))
        self.report.records += 1
        self.report.text_only += record.image is None
        self.report.tokens += length
        self.report.supervised_tokens += learnt
        self.report.unsupervised += learnt == 0
        self.store.append(sample, record.id, record.image)
        return length, images, len(sample)

    def _pieces(self, record: Record) -> list[Record]:
        """The record, or one record per ``data.turns_per_sample`` of its turns, each beginning with the image."""
        most = self.data.turns_per_sample
        if not most or len(record.turns) <= most:
            return [record]
        (first, _), *_ = record.turns
        marker = IMAGE_TOKEN + "\n" if IMAGE_TOKEN in first else ""
        starts = range(0, len(record.turns), most)
        chunks = [list(record.turns[start : start + most]) for start in starts]
        for chunk in chunks[1:]:
            question, answer = chunk[0]
            chunk[0] = (question if IMAGE_TOKEN in question else marker + question, answer)
        return [replace(record, turns=tuple(chunk)) for chunk in chunks]

    def _error(self, record: Record, field: str, what: str) -> DataError:
        return DataError(f"{self.data.records}: {record.where}: {field}: {what}")


def build_dataset(
    data: DataConfig, batch: BatchConfig, *, tokenizer: Any, processor: Any, tokens_per_image: int, seed: int
) -> PackedDataset:
    """The data set of a stage; see PackedDataset."""
    return PackedDataset(
        data, batch, tokenizer=tokenizer, processor=processor, tokens_per_image=tokens_per_image, seed=seed
    )


class _Missing:
    """Looks for every image before anything trains, and names the missing ones together."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seen: dict[str, bool] = {}
        self.found: list[str] = []

    def look(self, record: Record) -> None:
        """Note the record if its image file does not exist."""
        if record.image is None:
            return
        path = os.path.join(self.folder, record.image)
        if record.image not in self.seen:
            self.seen[record.image] = os.path.isfile(path)
        if not self.seen[record.image]:
            self.found.append(f"{record.where}: image: {path} does not exist")

    def stop(self, records: str) -> None:
        """DataError if any file is missing."""
        if self.found:
            lines = "\n  ".join(self.found[:_SHOWN])
            raise DataError(
                f"{records}: {len(self.found)} records name a missing image file; check data.image_folder\n  {lines}"
            )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tokenising makes many lists and no cycles; collections triggered by them doubled its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk

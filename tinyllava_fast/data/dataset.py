"""A data set tokenized once: the plan of each epoch's packs, and the packs themselves."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar
from zlib import crc32

import numpy as np
import torch
from PIL import Image

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.collate import collate, targets, truncate, widen, width
from tinyllava_fast.data.files import ImageFiles
from tinyllava_fast.data.images import to_pixels
from tinyllava_fast.data.pictures import MissingImageError
from tinyllava_fast.data.records import Record, check_turns, encode_records
from tinyllava_fast.data.split import Split, taken
from tinyllava_fast.data.store import SampleStore
from tinyllava_fast.data.templates.base import TEMPLATES, Segment, Template
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN, PackedBatch
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.log import log
from tinyllava_fast.ops import pack_plan
from tinyllava_fast.pace import Pace

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

_CHUNK = 512  # records tokenized in one call
_TOKENIZED = "%s: %d records tokenized so far, %.0f a second"
T = TypeVar("T")


@dataclass
class DataReport:
    """The counts of a data set, logged at the start and written into the run's summary."""

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
    """Samples of one DataConfig, tokenized at construction and served as packs.

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
        if data.turns_per_sample and data.turns != "independent":
            raise UserError(
                "data.turns_per_sample splits records between turns, which only data.turns=independent allows; "
                f"got turns={data.turns!r}, turns_per_sample={data.turns_per_sample}"
            )
        self.store = SampleStore()
        self.report = DataReport()
        self.files = ImageFiles(data, processor, seed)
        self.skipped: list[str] = []
        """Records left out from the start (data.on_bad_image: skip), with reasons."""
        sizes: list[tuple[int, int, int, int]] = []
        template = TEMPLATES.get(data.template, "data.template")
        template.check(tokenizer, data.masks)
        pace = Pace(wait_s=5.0)
        with _no_garbage_collection():
            for records in chunks(taken(data.records, split), _CHUNK):
                self.files.look(records)
                looked_at = [(record, self._look(record, template)) for record in records]
                usable = [(record, inputs) for record, inputs in looked_at if inputs is not None]
                pieces = [(piece, inputs) for record, inputs in usable for piece in self._pieces(record)]
                encoded = self._encode([piece for piece, _ in pieces], template, tokenizer)
                for (piece, inputs), sample in zip(pieces, encoded, strict=True):
                    sizes.append(self._add(piece, sample, inputs))
                if pace.due():
                    log.info(_TOKENIZED, data.records, records[-1].index + 1, (records[-1].index + 1) / pace.elapsed_s)
        self.files.raise_if_missing()
        if not sizes:
            raise self._nothing_left(split)
        table = np.array(sizes, np.int64)
        self.lengths, self.images, self.segments = (table[:, column].copy() for column in range(3))
        self._check_learnable(table[:, 3])
        if self.skipped:
            count = len(self.skipped)
            log.warning(
                "%s: %d records are skipped from the start; the first: %s", data.records, count, self.skipped[0]
            )
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
        """One pack: images decoded, augmented by (seed, epoch, record, image) and normalized, tokens laid out.

        DataError for an image that cannot be decoded, unless data.on_bad_image is skip: then its record is left out
        and named in ``skipped``.
        """
        samples, names, pictures, skipped = [], [], [], []
        for index in map(int, indices):
            if shown := self.store.shown(index):
                try:
                    pictures += self.files.load(self.store.images(index), shown, epoch, index)
                except DataError as error:
                    reason = self._bad_image(self.store.name(index), error)
                    skipped.append(reason)
                    continue
            samples.append(self.store.sample(index))
            names.append(self.store.name(index))
        batch = self._collate(samples, pictures, names)
        batch.skipped = skipped
        return batch

    def empty(self) -> PackedBatch:
        """A pack without samples, for a process that has none in the last step."""
        return self._collate([], [], [])

    def _collate(self, samples: list[list[Segment]], pictures: list[Image.Image], names: list[str]) -> PackedBatch:
        return collate(
            samples,
            to_pixels(pictures, self.processor, self.data.image_mode),
            tokens=self.batch.tokens,
            max_segments=self.batch.max_segments,
            tokens_per_image=self.tokens_per_image,
            image_multiple=self.batch.image_multiple,
            shared_prefixes=self.data.turns == "independent",
            sample_ids=names,
        )

    def _look(self, record: Record, template: Template) -> list[int] | None:
        """Check a record; return the number of tower inputs of each of its images, or None to leave the record out."""
        check_turns(self.data.records, record, template)
        try:
            return self.files.inputs(record)
        except DataError as error:
            if self.data.on_bad_image == "fail":
                self.files.note(record, error)
                return None
            self.skipped.append(self._bad_image(record.id, error))
            # It keeps its place in the plan, so that a run goes on where it stood; anyres cannot tell how large it is.
            return None if self.files.grid else [1] * len(record.images)

    def _bad_image(self, name: str, error: DataError) -> str:
        """Return the reason why a record is skipped; raise DataError where records may not be skipped."""
        reason = f"{self.data.records}: record id {name!r}: image: {error}"
        if isinstance(error, MissingImageError):
            raise DataError(f"{reason}; put it back (data.on_bad_image=skip is for damaged files alone)") from error
        if self.data.on_bad_image == "fail":
            remedy = "replace it, remove its record, or set data.on_bad_image=skip"
            raise DataError(f"{reason}; {remedy}") from error
        return reason

    def _check_learnable(self, supervised: np.ndarray) -> None:
        """Raise DataError if every sample with a supervised token (their numbers by sample) would be skipped."""
        if self.data.on_bad_image == "fail":
            return
        for index in np.flatnonzero(supervised).tolist():
            try:
                self.files.load(self.store.images(index), self.store.shown(index), 0, index)
            except DataError as error:
                self.skipped.append(self._bad_image(self.store.name(index), error))
                continue
            self.skipped = list(dict.fromkeys(self.skipped))
            return
        if self.skipped:
            raise self._nothing_left(None)  # but perhaps some without an answer to learn

    def _nothing_left(self, split: Split | None) -> DataError:
        if split is not None and not self.skipped:
            what, how = ("none", "raise") if split.held_out else ("every one", "lower")
            remedy = f"{how} it, or name other records in validation.records"
            held = f"validation.share: {split.share:g} holds out {what} of its records"
            return DataError(f"{self.data.records}: {held}; {remedy}")
        return DataError(f"{self.data.records}: every record was skipped; the first: {self.skipped[0]}")

    def _encode(
        self, records: list[Record], template: Template, tokenizer: PreTrainedTokenizerBase
    ) -> list[list[Segment]]:
        """See ``encode_records``."""
        return encode_records(self.data.records, records, template, tokenizer, self.data.turns, self.data.masks)

    def _add(self, record: Record, encoded: list[Segment], inputs: list[int]) -> tuple[int, int, int, int]:
        """Store a sample and count it. Return the positions, images and segments it needs, and its supervised tokens.

        inputs: the number of tower inputs of each image of the record.
        """
        count = self.tokens_per_image
        budget = min(self.data.max_tokens or self.batch.tokens, self.batch.tokens)
        key = "batch.tokens" if budget == self.batch.tokens else "data.max_tokens"
        shown = _shown(encoded, inputs)
        sample = widen(encoded, [n for _, n in shown])
        length = width(sample, count)
        if length > budget:
            largest = count * max((n for _, n in shown), default=0)
            if largest >= budget:
                raise self._error(record, "image", f"{largest} image tokens do not fit {key}={budget}; raise {key}")
            if self.data.overlong == "fail":
                remedy = f"raise {key}, or set data.overlong=truncate"
                raise self._error(record, "conversations", f"{length} tokens exceed {key}={budget}; {remedy}")
            encoded = truncate(encoded, budget, count, [n for _, n in shown])
            shown = _shown(encoded, inputs)
            sample = widen(encoded, [n for _, n in shown])
            length = width(sample, count)
            self.report.truncated += 1
        images = sum(n for _, n in shown)
        for need, limit, name in (
            (images, self.batch.max_images, "max_images"),
            (len(sample), self.batch.max_segments, "max_segments"),
        ):
            if need > limit:
                what = name.removeprefix("max_")
                raise self._error(record, "conversations", f"{need} {what} exceed batch.{name}={limit}; raise it")
        learnt = targets(sample)
        self.report.records += 1
        self.report.text_only += not record.images
        self.report.tokens += length
        self.report.supervised_tokens += learnt
        self.report.unsupervised += learnt == 0
        self.store.append(sample, record.id, record.images, shown)
        return length, images, len(sample), learnt

    def _pieces(self, record: Record) -> list[Record]:
        """Return the record, or parts of ``data.turns_per_sample`` turns that begin with the images so far."""
        most = self.data.turns_per_sample
        if not most or len(record.turns) <= most:
            return [record]
        pieces = []
        before = 0  # markers in earlier turns
        for start in range(0, len(record.turns), most):
            turns = list(record.turns[start : start + most])
            question, answer = turns[0]
            if record.interleaved:
                turns[0] = (f"{IMAGE_TOKEN}\n" * before + question, answer)
                before += sum(q.count(IMAGE_TOKEN) for q, _ in record.turns[start : start + most])
            elif start and IMAGE_TOKEN not in question and IMAGE_TOKEN in record.turns[0][0]:
                turns[0] = (f"{IMAGE_TOKEN}\n{question}", answer)
            pieces.append(replace(record, turns=tuple(turns)))
        return pieces

    def _error(self, record: Record, field: str, what: str) -> DataError:
        return DataError(f"{self.data.records}: {record.where}: {field}: {what}")


def _shown(sample: Iterable[Segment], inputs: list[int]) -> list[tuple[int, int]]:
    """Return (number of the image, its tower inputs) at each marker of a sample as the template encodes it."""
    numbers: list[int] = []
    for segment in sample:
        numbers += segment.images or [0] * segment.ids.count(IMAGE_INDEX)
    return [(number, inputs[number]) for number in numbers]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Hold back garbage collection: tokenizing makes many lists and no cycles, and collections doubled its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``, the last one perhaps shorter; read lazily."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk

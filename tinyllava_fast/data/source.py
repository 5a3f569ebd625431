"""One source of samples: its tokens, its images, and what each sample needs of a pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from tinyllava_fast.config.schema import BatchConfig
from tinyllava_fast.data.collate import targets, truncate, widen, width
from tinyllava_fast.data.drawn import Drawn, SourceImages, named
from tinyllava_fast.data.files import MISSING, REFUSED
from tinyllava_fast.data.limits import PackLimits
from tinyllava_fast.data.records import Refused
from tinyllava_fast.data.split import Split, keys_of
from tinyllava_fast.data.store import SampleStore
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.tokens import tokenized
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.errors import DataError
from tinyllava_fast.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5  # missing images named in an error
_SHOWN_BAD = 10  # and files that are no pictures
_GONE = "a missing image file; check data.image_folder"
_BAD = "an image that cannot be read; replace it, remove its record, or set data.on_bad_image=skip"


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
    across: int = 0
    """Samples left out because their images are on both sides of validation.share."""

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)

    def __add__(self, other: DataReport) -> DataReport:
        """Return the counts of both."""
        return DataReport(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def open_source(
    images: SourceImages,
    batch: BatchConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tokens_per_image: int,
    split: Split | None = None,
) -> Source:
    """Return all samples of one source, tokenized now or earlier, every record and image header checked; DataError.

    images: of the source. tokenizer: see load_tokenizer. tokens_per_image: K. split: the side of the records that is
    taken; None: all.
    """
    data, store = images.data, tokenized(images.data, tokenizer)
    source = Source(images, batch, store, tokens_per_image=tokens_per_image, split=split)
    if not len(source):
        raise source.nothing_left()
    source.check_learnable()
    if source.skipped:
        count, first = len(source.skipped), source.skipped[0]
        log.warning("%s: %d records are skipped from the start; the first: %s", data.records, count, first)
    store.let_go()
    return source


class Source:
    """The samples of a store that a pack can hold, in the order of their records: of a whole source, or a part of it.

    inputs: of its images; see ImageFiles.look, which finds them where None is given. tokens_per_image: K. DataError for
    what cannot be used.
    lengths, images, segments, learnt: [n] int64, of each sample: positions, inputs of the tower, segments, supervised
    tokens.
    """

    def __init__(
        self,
        images: SourceImages,
        batch: BatchConfig,
        store: SampleStore,
        *,
        tokens_per_image: int,
        inputs: np.ndarray | None = None,
        split: Split | None = None,
    ) -> None:
        self.data = data = images.data
        self.tokens_per_image = tokens_per_image
        self.shown_by, self.files, self.store = images, images.files, store
        self._skips_all, self._skips_bad = images.skips_all, images.skips_bad
        self.faults = [Refused(f.what, data.records, f.where, f.kind) for f in self.store.faults()]
        """Records left out from the start (data.on_error, data.on_bad_image), with reasons."""
        self.across = 0
        """Samples on neither side of the split."""
        self._inputs, kept = self._look(self.files.look(store) if inputs is None else inputs)
        if split is not None:
            kept &= self._side(split)
            if not kept.any():
                raise self._one_sided(split)
        self._kept = None if kept.all() else np.flatnonzero(kept)
        """Numbers in the store of the samples that are left; None: all."""
        self._limits = PackLimits.of(data, batch, tokens_per_image)
        self.lengths, self.images, self.segments, learnt = (column[kept] for column in self._needs())
        self._cut = np.flatnonzero(self.lengths > self._limits.tokens)
        """Samples that are cut."""
        with_images = np.diff(self.store.column("samples", "images"))[kept] > 0
        fits = self._fit(learnt)
        if not fits.all():
            numbers = np.arange(len(self.store))[kept][fits]
            is_cut = np.isin(np.arange(len(fits)), self._cut)[fits]
            self._kept, self._cut = numbers, np.flatnonzero(is_cut)
            self.lengths, self.images, self.segments = (c[fits] for c in (self.lengths, self.images, self.segments))
            learnt, with_images = learnt[fits], with_images[fits]
        self.report = DataReport(
            records=len(self),
            text_only=len(self) - int(with_images.sum()),
            tokens=int(self.lengths.sum()),
            supervised_tokens=int(learnt.sum()),
            unsupervised=int((learnt == 0).sum()),
            truncated=len(self._cut),
            across=self.across,
        )
        self.learnt = learnt
        arrays = (self.lengths, self.images, self.segments)
        self.fingerprint: int = crc32(repr((self.store.fingerprint(), *map(_checksum, arrays))).encode())
        """A checksum of all tokens, labels and needs."""

    @property
    def skipped(self) -> list[str]:
        """The reasons of ``faults``, each once."""
        return list(dict.fromkeys(map(str, self.faults)))

    def __len__(self) -> int:
        return len(self.lengths)

    def name(self, index: int) -> str:
        """Return the record id of a sample."""
        return self.store.name(self._number(index))

    def sample(self, index: int) -> tuple[list[Segment], list[tuple[int, int]]]:
        """Return the segments of a sample, cut if it is too long, with one marker for each input of the tower.

        And (number of the image, inputs of the tower) of every place that shows an image, in order.
        """
        sample, shown = self._narrow(index)
        return widen(sample, [count for _, count in shown]), shown

    def draw(self, index: int, number: int, ticket: int) -> Drawn:
        """Return a sample for a pack. number: of this source. ticket: see ``epoch_order``."""
        segments, shown = self.sample(index)
        images = self.store.images(self._number(index)) if shown else []
        return Drawn(number, ticket, self.name(index), segments, images, shown)

    def _side(self, split: Split) -> np.ndarray:
        """Return which samples of the store are on that side, [samples] bool; count those that are on neither."""
        _, first, inverse = np.unique(self.store.column("images", "digest"), return_index=True, return_inverse=True)
        order = np.argsort(first)  # in the order of the source: what is inside one is read fastest so
        held, keys = np.zeros(len(first), bool), keys_of(self.store, first[order], self.data.records)
        held[order] = np.fromiter(map(split.holds, keys), bool, len(first))
        ends = self.store.column("samples", "images")
        counts = np.diff(ends)
        sums = np.diff(np.concatenate([[0], np.cumsum(held[inverse])])[ends])
        for number in np.flatnonzero(counts == 0).tolist():
            sums[number], counts[number] = split.holds(self._tokens(number)), 1
        across = (sums > 0) & (sums < counts)
        self.across = int(across.sum())
        if self.across and not split.held_out:
            log.warning(
                "%s: %d records show images of both sides of validation.share=%g: they are neither trained on nor held "
                "out",
                *(self.data.records, self.across, split.share),
            )
        return sums == counts if split.held_out else sums == 0

    def _tokens(self, number: int) -> str:
        """Return the tokens of a sample of the store as text."""
        return ",".join(str(token) for segment in self.store.sample(number) for token in segment.ids)

    def _one_sided(self, split: Split) -> DataError:
        what, how = ("none", "raise") if split.held_out else ("every one", "lower")
        remedy = f"{how} it, or name other records in validation.records"
        held = f"validation.share: {split.share:g} holds out {what} of its records"
        return DataError(f"{self.data.records}: {held}; {remedy}")

    def _number(self, index: int) -> int:
        """Return the number of a sample in the store."""
        return index if self._kept is None else int(self._kept[index])

    def _narrow(self, index: int) -> tuple[list[Segment], list[tuple[int, int]]]:
        """Return a sample, cut but not widened, and (number of the image, its inputs) at each of its markers."""
        number = self._number(index)
        sample, shown = self.store.sample(number), self._views(number)
        at = np.searchsorted(self._cut, index)
        if at < len(self._cut) and self._cut[at] == index:
            sample = truncate(sample, self._limits.tokens, self.tokens_per_image, [count for _, count in shown])
            shown = shown[: sum(segment.ids.count(IMAGE_INDEX) for segment in sample)]
        return sample, shown

    def _views(self, number: int) -> list[tuple[int, int]]:
        """Return (number of the image, its inputs) at each marker of a sample of the store."""
        views = self.store.views(number)
        if not views or not self.files.grid:
            return [(view, 1) for view in views]
        first = int(self.store.column("samples")["images"][number])
        return [(view, int(self._inputs[first + view])) for view in views]

    def _needs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return positions, inputs of the tower, segments and learnt tokens of every sample of the store."""
        segments = self.store.column("samples", "segments")
        tokens = np.diff(self.store.column("segments", "ids")[segments])
        views = np.diff(self.store.column("samples", "views"))
        images = views
        if self.files.grid:
            first = self.store.column("samples", "images")[:-1]
            inputs = self._inputs[np.repeat(first, views) + self.store.column("views")]
            images = np.diff(np.concatenate([[0], np.cumsum(inputs)])[self.store.column("samples", "views")])
        lengths = tokens - views + images * self.tokens_per_image
        return lengths, images, np.diff(segments), self.store.column("samples", "learnt")[1:]

    def _fit(self, learnt: np.ndarray) -> np.ndarray:
        """Cut what is too long, and return which samples a pack can hold. Changes ``learnt``.

        DataError for the first one that none can, unless such records are left out.
        """
        fits = np.ones(len(self), bool)
        for index in self._cut.tolist():
            largest = max((count for _, count in self._views(self._number(index))), default=0)
            if reason := self._limits.too_long(int(self.lengths[index]), largest):
                fits[index] = False
                self._leave_out(index, reason)
                continue
            sample, shown = self.sample(index)
            self.lengths[index] = width(sample, self.tokens_per_image)
            self.images[index] = sum(count for _, count in shown)
            self.segments[index] = len(sample)
            learnt[index] = targets(sample)
        over = (self.images > self._limits.images) | (self.segments > self._limits.segments)
        for index in np.flatnonzero(fits & over).tolist():
            fits[index] = False
            self._leave_out(index, self._limits.too_many(int(self.images[index]), int(self.segments[index])))
        return fits

    def _leave_out(self, index: int, what: str) -> None:
        """Note that a sample is left out because of its size; raise where it may not be."""
        where = self.store.where(self._number(index))
        fault = Refused(what, self.data.records, where, "size")
        if not self._skips_all:
            raise fault
        self.faults.append(fault)

    def _look(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs of the tower by image, and which samples are kept: [images] int64 and [samples] bool.

        DataError that names the images which are missing or, unless they may be skipped, no pictures.
        """
        kept = np.ones(len(self.store), bool)
        if not (inputs < 1).any():
            return inputs, kept
        ends, records = self.store.column("samples", "images"), self.store.column("samples", "record")[1:]
        faulty = np.flatnonzero(inputs < 1)
        owners = np.searchsorted(ends, faulty, "right") - 1
        whole = np.concatenate([[True], records[1:] != records[:-1]])[owners]  # of several samples of a record, one
        gone, bad = (np.stack([owners, faulty], 1)[whole & (inputs[faulty] == state)] for state in (MISSING, REFUSED))
        bad = bad[np.unique(bad[:, 0], return_index=True)[1]]  # the first of a record
        refused = ([] if self._skips_all else gone.tolist(), [] if self._skips_bad else bad.tolist())
        if any(refused):
            raise self._unusable(*refused)
        for owner, number in sorted([*gone.tolist(), *bad.tolist()]):
            name = self.store.image(number)
            what = f"image: {self.files.fault(name)}"
            self.files.refused[name] = self.files.fault(name)  # and not looked for again
            self.faults.append(Refused(what, self.data.records, named(self.store.name(owner)), "image"))
        if self.files.grid:
            kept[owners] = False  # nothing tells how large it is
        # Else it keeps its place in the plan, so that a run goes on where it stood when the file is mended.
        inputs[faulty] = 1
        return inputs, kept

    def _unusable(self, gone: Sequence[tuple[int, int]], bad: Sequence[tuple[int, int]]) -> DataError:
        """Return the error for images that are missing or no pictures; each is (sample, number of the image)."""
        found = []
        for faults, most, what in ((gone, _SHOWN, _GONE), (bad, _SHOWN_BAD, _BAD)):
            if faults:
                found.append(f"{len(faults)} records name {what}")
            for owner, number in faults[:most]:
                reason = self.files.fault(self.store.image(number))
                found.append(f"  {self.store.where(owner)}: image: {reason}")
        return DataError(f"{self.data.records}: " + "\n".join(found))

    def check_learnable(self) -> None:
        """Raise DataError if every sample with a supervised token would be skipped when its images are decoded."""
        if not self._skips_bad:
            return
        known = set(map(str, self.faults))
        for index in np.flatnonzero(self.learnt).tolist():
            try:
                self.shown_by.load(self.draw(index, 0, index), 0)
            except DataError as error:
                if (reason := self.shown_by.fault(error)) not in known:
                    where = named(self.name(index))
                    what = reason.partition(f"{where}: ")[2]
                    self.faults.append(Refused(what, self.data.records, where, "image"))
                continue
            return
        if self.faults:
            raise self.nothing_left()  # but perhaps some without an answer to learn

    def nothing_left(self) -> DataError:
        """Return the error for a source of which no sample is left."""
        return DataError(f"{self.data.records}: every record was skipped; the first: {self.faults[0]}")


def _checksum(values: np.ndarray) -> int:
    return crc32(np.ascontiguousarray(values).data)

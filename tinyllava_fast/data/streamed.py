"""A data set with streams among its sources: packs of one block of records after the other, in flat memory.

A block is the next ``data.shuffle_buffer`` records: shuffled, packed together, then forgotten. So a position is that at
which the block begins, and a number of packs; going on from there costs one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.blocks import Part, Streamed, blocks
from tinyllava_fast.data.drawn import Drawn
from tinyllava_fast.data.mixing import by_weight
from tinyllava_fast.data.packs import EpochSizes, PackSource, Pool
from tinyllava_fast.data.records import Refused
from tinyllava_fast.data.source import Source, open_source
from tinyllava_fast.data.store import SampleStore
from tinyllava_fast.data.stream import Position, RecordStream
from tinyllava_fast.data.tokens import encoder_of
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.data.workers import Ahead
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.fields import Fields
from tinyllava_fast.hardware import cores
from tinyllava_fast.log import log

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

_ORDER = 1  # of the records of a stream; changes with what a seed means
_MANY = 1024  # records in the first block for which processes repay
_HOPELESS = 8192  # records in a row that cannot be used
_HELD = 2  # blocks in memory, at least: that whose packs are taken, and that which packs are prepared of


@dataclass
class _Block:
    """A block whose packs are known."""

    pool: Pool | None
    """None: no record of it can be used."""
    packs: list[np.ndarray]
    counts: list[int]


@dataclass
class _Note:
    """What stays of a block until it is forgotten: where it begins, and once it has been read what it holds."""

    begin: list[Position]
    checksum: int = 0
    left_out: list[str] = field(default_factory=list)


class StreamedDataset(PackSource):
    """Samples of one DataConfig some of whose sources are streams, served as packs; ``epoch`` is the number of a block.

    Arguments as for PackedDataset. Construction reads the first block; what it holds stands for the rest where
    numbers are needed before they can be known. Sources that are no streams are tokenized as in PackedDataset, and
    shown by weight. DataError for what cannot be used, also later on.
    """

    endless = True

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
        super().__init__(data, batch, processor=processor, tokens_per_image=tokens_per_image, seed=seed)
        self._counts = by_weight(data.shuffle_buffer, [source.weight or 1.0 for source, _ in self._each])
        self._streams: dict[int, Streamed] = {}
        self._whole: dict[int, Source] = {}
        for number, (images, count) in enumerate(zip(self._shown_by, self._counts, strict=True)):
            if images.data.stream:
                stream = RecordStream(images.data.records, seed, number)
                encoder = encoder_of(images.data, tokenizer)
                self._streams[number] = Streamed(stream, encoder, images.files, count)
            else:
                opened = open_source(images, batch, tokenizer=tokenizer, tokens_per_image=tokens_per_image)
                self._whole[number] = opened
        self.faults = {str(f): (self.names[n], f) for n, source in self._whole.items() for f in source.faults}
        self.skipped = [reason for source in self._whole.values() for reason in source.skipped]
        shards = [source.stream.facts() for source in self._streams.values()]
        stores = [source.fingerprint for source in self._whole.values()]
        facts = (_ORDER, shards, stores, seed, tokens_per_image, batch.room, self._counts)
        self.fingerprint = crc32(repr(facts).encode())
        self._blocks: dict[int, _Block] = {}
        self._notes = {0: _Note([Position()] * len(self._streams))}
        self._barren: dict[int, int] = {}
        self._next = 0
        """The block that is read next."""
        self._from: int | None = None
        """The first block of the step that is planned, see ``hold``."""
        self._source: Iterator[list[Part]] | None = None
        self._workers: int | None = None
        """Between ``open`` and ``close``."""
        number, first = 0, self._block(0)
        while first.pool is None:
            first = self._block(number := number + 1)
        self.report, self.lengths, self.images = first.pool.report, first.pool.lengths, first.pool.images
        self._sizes = first.pool.sums(first.counts)
        for source in self._streams.values():
            log.info(
                "%s: a stream of %d files, %d records at a time", source.stream.path, len(source.stream), source.count
            )

    def epoch_sizes(self) -> EpochSizes:
        """See PackSource."""
        return self._sizes

    def plan(self, epoch: int) -> list[np.ndarray]:
        """See PackSource."""
        return self._block(epoch).packs

    def job(self, epoch: int, tickets: np.ndarray) -> list[Drawn]:
        """See PackSource. Processes that build packs are sent the samples, too."""
        pool = self._block(epoch).pool
        assert pool is not None  # noqa: S101 else it has no packs
        return [pool.draw(ticket) for ticket in tickets.tolist()]

    def needs(self, epoch: int, tickets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See PackSource."""
        pool = self._block(epoch).pool
        assert pool is not None  # noqa: S101 else it has no packs
        return pool.needs(tickets)

    def levels(self, epoch: int, job: Iterable[int | Drawn]) -> PackedBatch:
        """See PackSource."""
        return self._build(epoch, (sample for sample in job if isinstance(sample, Drawn)))

    def names_checksum(self) -> int:
        """Return 0: ids and paths of a stream are not known before they are read."""
        return 0

    def passes(self, epoch: int, share: float) -> float:
        """See PackSource: those over the first stream."""
        stream = next(iter(self._streams.values())).stream
        if epoch + 1 not in self._notes:
            self._block(epoch)
        begin, end = (stream.passes(self._notes[number].begin[0]) for number in (epoch, epoch + 1))
        return begin + share * (end - begin)

    def open(self, workers: int) -> None:
        """See PackSource. A process reads ahead, and half as many as the workers tokenize for it."""
        self.close()
        self._workers = workers
        if workers:
            self._open_source()  # begins with the next block now

    def close(self) -> None:
        """See PackSource."""
        if isinstance(self._source, Ahead):
            self._source.close()
        self._source = self._workers = self._from = None

    def hold(self, epoch: int) -> None:
        """See PackSource. A step of more packs than a block has needs several blocks in memory at a time."""
        self._from = epoch

    def state(self, epoch: int) -> dict[str, object]:
        """See PackSource."""
        note = self._notes[epoch]
        return {"begin": [at.as_list() for at in note.begin], "block": note.checksum}

    def go_to(self, epoch: int, state: Fields) -> None:
        """See PackSource."""
        begin = [Position.of(value, state.where) for value in state.items("begin")]
        if len(begin) != len(self._streams):
            raise CheckpointError(f"{state.where}: begin: {len(begin)} places for {len(self._streams)} streams")
        if epoch not in self._blocks or self._notes[epoch].begin != begin:
            self._source = None
            self._blocks, self._notes, self._next = {}, {epoch: _Note(begin)}, epoch
        self._block(epoch)
        if self._notes[epoch].checksum != state.integer("block"):
            raise CheckpointError(
                f"{self.where}: the records at this place differ from those of the checkpoint, so its position in the "
                "data means nothing; put them back as they were, or start over with another output_dir or "
                "--resume never"
            )

    def left_out(self, epoch: int) -> list[str]:
        """See PackSource."""
        return self._notes[epoch].left_out

    def forget(self, before: int) -> None:
        """See PackSource."""
        for number in [number for number in self._notes if number < before]:
            del self._notes[number]

    def _block(self, number: int) -> _Block:
        """Return a block, whatever has been read: of those that are not forgotten, and those that follow."""
        if number not in self._blocks and number < self._next:
            workers, first = self._workers, self._from
            self.close()
            self._workers, self._from, self._next, self._blocks = workers, first, number, {}
        while number not in self._blocks:
            self._read()
        return self._blocks[number]

    def _read(self) -> None:
        """Read the next block."""
        number, note = self._next, self._notes[self._next]
        parts = dict(zip(self._streams, next(self._open_source()), strict=True))
        if self._workers is None:
            self._source = None  # and the processes that helped
        sources: dict[int, Source] = {}
        left_out: dict[str, tuple[str, Refused]] = {}
        for place, images in enumerate(self._shown_by):
            if place not in parts:
                sources[place] = self._whole[place]
                continue
            part = parts[place]
            images.files.refused = part.refused
            store = SampleStore(part.columns)
            source = Source(images, self.batch, store, tokens_per_image=self.tokens_per_image, inputs=part.inputs)
            self._hope(place, source)
            if len(source):
                sources[place] = source
            left_out |= {str(fault): (self.names[place], fault) for fault in source.faults}
        if left_out and not self.faults:
            log.warning("%s: records are left out, and counted; the first: %s", self.where, next(iter(left_out)))
        self.faults |= left_out
        # Of a stream, all samples of the block, each once.
        counts = [len(source) if place in parts else self._counts[place] for place, source in sources.items()]
        if sources:
            pool = Pool(list(sources.values()), list(sources))
            self._blocks[number] = _Block(pool, pool.packs(counts, self.batch, self.seed, number), counts)
        else:
            self._blocks[number] = _Block(None, [], [])
        note.left_out = list(left_out)
        note.checksum = crc32(repr([SampleStore(part.columns).fingerprint() for part in parts.values()]).encode())
        self._next = number + 1
        self._notes.setdefault(self._next, _Note([part.end for part in parts.values()]))
        while len(self._blocks) > _HELD and (self._from is None or min(self._blocks) < self._from):
            del self._blocks[min(self._blocks)]

    def _hope(self, place: int, source: Source) -> None:
        """Raise DataError if no record of a stream could be used for a long time. source: its part of a block."""
        self._barren[place] = 0 if len(source) else self._barren.get(place, 0) + self._counts[place]
        if self._barren[place] >= _HOPELESS:
            raise source.nothing_left()

    def _open_source(self) -> Iterator[list[Part]]:
        """Return the blocks from the next one on."""
        if self._source is None:
            begin, sources = self._notes[self._next].begin, list(self._streams.values())
            if self._workers:
                self._source = Ahead(partial(blocks, sources, begin, self._workers // 2))
            else:
                many = self._workers is None and self.data.shuffle_buffer >= _MANY and cores() > 1
                self._source = blocks(sources, begin, cores() if many else 0)
        return self._source

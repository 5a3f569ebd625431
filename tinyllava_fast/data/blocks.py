"""Blocks of a stream: the next so many records of each source, tokenized. Where one begins decides all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from tinyllava_fast.data.columns import MemoryColumns
from tinyllava_fast.data.files import ImageFiles
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import Refused
from tinyllava_fast.data.store import DTYPES, SampleStore, SampleWriter
from tinyllava_fast.data.stream import Position, RecordStream
from tinyllava_fast.data.tokens import Encoder, no_garbage_collection
from tinyllava_fast.data.workers import chunks, in_order

_CHUNK = 128  # records tokenized in one call


@dataclass
class Part:
    """The records of one stream in a block.

    end: the position behind them. inputs: of the tower, of each of their images, if its header has been looked at.
    refused: see ImageFiles.
    """

    end: Position
    columns: MemoryColumns
    inputs: np.ndarray
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Streamed:
    """A source that is a stream. count: its records in a block."""

    stream: RecordStream
    encoder: Encoder
    files: ImageFiles
    count: int


class _Chunk(NamedTuple):
    number: int
    records: list[Record | Refused]
    end: Position


class _Tokenized(NamedTuple):
    number: int
    records: int
    end: Position
    columns: dict[str, np.ndarray]
    inputs: np.ndarray
    refused: dict[str, str]


def blocks(sources: Sequence[Streamed], begin: Sequence[Position], processes: int) -> Iterator[list[Part]]:
    """Yield block after block, without end: of each source its part. begin: of each source, where it goes on.

    processes: that tokenize; 0: this one does. DataError where reading cannot go on and, unless faults are left out,
    for a record that cannot be used.
    """

    def read() -> Iterator[_Chunk]:
        readers = [source.stream.records(at) for source, at in zip(sources, begin, strict=True)]
        while True:
            for number, (source, reader) in enumerate(zip(sources, readers, strict=True)):
                for part in chunks(islice(reader, source.count), _CHUNK):
                    yield _Chunk(number, [record for _, record in part], part[-1][0])

    def tokenize(chunk: _Chunk) -> _Tokenized:
        source = sources[chunk.number]
        with no_garbage_collection():
            columns = source.encoder(chunk.records)
        inputs, refused = _look(source.files, columns)
        return _Tokenized(chunk.number, len(chunk.records), chunk.end, columns, inputs, refused)

    found = in_order(tokenize, read(), processes)
    while True:
        yield [_gather(found, source.count) for source in sources]


def _gather(found: Iterator[_Tokenized], records: int) -> Part:
    """Return the next so many records."""
    columns, inputs = MemoryColumns(DTYPES), []
    refused: dict[str, str] = {}
    writer = SampleWriter(columns)
    while records:
        chunk = next(found)
        writer.append(chunk.columns)
        inputs.append(chunk.inputs)
        refused |= chunk.refused
        records -= chunk.records
    return Part(chunk.end, columns, np.concatenate(inputs), refused)


def _look(files: ImageFiles, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, str]]:
    """Return the inputs of the tower of each image, and why images are refused.

    Only tiles depend on the size of an image; else its file is not looked at before it is decoded.
    """
    if not files.grid or not len(columns["images"]):
        return np.ones(len(columns["images"]), np.int64), {}
    some = MemoryColumns(DTYPES)
    for name, values in columns.items():
        some.append(name, values)
    files.refused = {}
    return files.look(SampleStore(some)), files.refused

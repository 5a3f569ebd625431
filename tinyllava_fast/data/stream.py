"""The records of a source one after the other, for ever, from any place on: nothing is kept of what has been read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from tinyllava_fast.data.formats._base import Files, Mark, find_files
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import Refused, no_records, read_file, unreadable
from tinyllava_fast.errors import CheckpointError

_SHARDS = 3  # of an epoch's seeds: that of the order of the shards


@dataclass(frozen=True)
class Position:
    """A place between two records. epoch: passes that are over. shard: number in this pass's order of the shards.

    row: records of the shard that have been read. mark: of the last of them (see formats/_base.py).
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0
    mark: Mark = ()

    def as_list(self) -> list[int]:
        """For JSON."""
        return [self.epoch, self.shard, self.row, *self.mark]

    @classmethod
    def of(cls, values: object, where: str) -> Position:
        """Return what ``as_list`` has returned. CheckpointError for anything else."""
        if not isinstance(values, list) or len(values) < 3 or not all(type(value) is int for value in values):
            raise CheckpointError(f"{where}: expected a place in a stream, a list of numbers, got {values!r}")
        return cls(values[0], values[1], values[2], tuple(values[3:]))


class RecordStream:
    """The shards of a source, all of them in each pass, in an order of its own that (seed, pass, number) decides.

    path: as ``data.records``; a file alone is one shard. number: of the source among others. DataError for shards that
    cannot be read.
    """

    def __init__(self, path: str, seed: int, number: int) -> None:
        self.path, self._seeds = path, (seed, number)
        found = find_files(Path(path))
        shards = [file for path in found.paths for file in found.format.files(path)]
        kind = found.format if shards == found.paths else find_files(shards[0]).format
        self._files = Files(kind, shards, found.base)
        try:
            self._sizes = np.array([file.stat().st_size for file in shards], np.int64)
        except OSError as error:
            raise unreadable(path, error) from error

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self._files.paths)

    def facts(self) -> list[tuple[str, int]]:
        """Return names and sizes of all shards: a saved position is valid only for the same ones."""
        return [(file.name, size) for file, size in zip(self._files.paths, self._sizes.tolist(), strict=True)]

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the shards in a pass."""
        seed, number = self._seeds
        return np.random.default_rng([seed, epoch, _SHARDS, number]).permutation(len(self))

    def records(self, begin: Position) -> Iterator[tuple[Position, Record | Refused]]:
        """Yield the records from a position on, without end, each with the position behind it; see ``read_refusing``.

        DataError where reading cannot go on, and for shards without a record.
        """
        at = begin
        while True:
            shards, epoch = self.order(at.epoch), at.epoch
            for shard in range(at.shard, len(shards)):
                before = at if shard == at.shard else Position(epoch, shard)
                for row, (mark, record) in enumerate(self._rest(shards[shard], before), before.row + 1):
                    at = Position(epoch, shard, row, mark)
                    yield at, record
                    begin = at
            if begin == Position(epoch):
                raise no_records(self.path)
            at = begin = Position(epoch + 1)

    def passes(self, at: Position) -> float:
        """Return the passes over all bytes before a position, about: of tables whole shards are counted."""
        order = self.order(at.epoch)
        done = int(self._sizes[order[: at.shard]].sum())
        if self._files.format.marks_are_bytes and at.mark:
            done += at.mark[0]
        return at.epoch + done / max(int(self._sizes.sum()), 1)

    def _rest(self, shard: int, at: Position) -> Iterator[tuple[Mark, Record | Refused]]:
        """Yield the records of a shard behind a position in it."""
        known = len(at.mark) > 0  # then reading begins at the last record that was read, else at the shard's first
        file = self._files.paths[shard]
        rows = read_file(self.path, self._files, file, at.row - 1 if known else 0, at.mark)
        return islice(rows, 1 if known else at.row, None)

"""Packs to the training loop: worker processes, an exact position, the same plan on every rank."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data.balance import PackCosts, share_out
from tinyllava_fast.data.drawn import Drawn
from tinyllava_fast.data.packs import PackSource
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.data.workers import prepare_worker, signals_held
from tinyllava_fast.errors import CheckpointError, DataError, UserError
from tinyllava_fast.fields import Fields
from tinyllava_fast.log import log

T = TypeVar("T")
Wire = dict[str, Any]  # the fields of a PackedBatch, its tensors as numpy arrays or (slot, shape)
Job = tuple[int, "np.ndarray | list[Drawn] | None"]  # (epoch, PackSource.job of a pack; None: an empty pack)
ORDER = 2
"""Of the packs in an epoch; in 1 the longest samples came first and the shortest last."""


def check_length(data: DataConfig, max_steps: int | None) -> None:
    """Raise UserError if nothing says how long a stage is."""
    if max_steps is None and data.streams:
        raise UserError(
            "max_steps: not given, and a stage with a stream (stream: true) needs it: nobody knows how many packs its "
            "records make before they are read"
        )


def check_packs(packs_per_step: int, world_size: int) -> None:
    """Raise UserError if the packs of a step are not equally many for each process."""
    if packs_per_step < 1 or packs_per_step % world_size:
        raise UserError(
            f"batch.packs_per_step: {packs_per_step} is not a multiple of the {world_size} processes; "
            f"try {max(math.ceil(packs_per_step / world_size), 1) * world_size}"
        )


class Loader:
    """Yields this rank's PackedBatches, epoch after epoch, from a position that can be saved and restored.

    The packs of all epochs form one stream: step i takes the i-th packs_per_step of them, so a step may reach into the
    next epoch and no pack is dropped. At the very end the stream is filled up with empty packs. Each rank computes as
    many packs of a step, which ones ``share_out`` says; an iteration begins and a position is saved between two steps.
    costs: of packs; None: all are taken to be equal. workers: processes that build packs; 0: none. prefetch: packs each
    worker prepares ahead. Worker errors surface here as the DataError they are. UserError for counts that do not
    divide.
    """

    def __init__(
        self,
        dataset: PackSource,
        *,
        packs_per_step: int = 1,
        epochs: float = 1.0,
        max_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
        costs: PackCosts | None = None,
    ) -> None:
        check_packs(packs_per_step, world_size)
        check_length(dataset.data, max_steps)
        self.dataset = dataset
        self.packs_per_step = packs_per_step
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.costs = costs
        self.skipped: dict[str, None] = dict.fromkeys(dataset.skipped)
        """Reasons for records left out (data.on_bad_image: skip), in order of appearance."""
        self._first = (0, 0)  # epoch that counting begins with, and the position of its first pack
        self._packs: list[int] = []  # packs in each epoch from there on, as far as known
        self._position = 0  # packs of the stream consumed by all ranks together
        self._stream: Iterator[Wire | str] | None = None
        if max_steps is None:
            whole = int(epochs)
            self._end = self._start(whole) + math.ceil((epochs - whole) * self._count(whole))
            self.steps = math.ceil(self._end / packs_per_step)
        else:
            self._end = max_steps * packs_per_step
            self.steps = max_steps

    @property
    def steps_per_epoch(self) -> float:
        """Steps in the first epoch; later ones may differ by a few packs. Of a stream: all steps."""
        return float(self.steps) if self.dataset.endless else self._count(0) / self.packs_per_step

    @property
    def epoch(self) -> float:
        """Passes over the data consumed so far."""
        epoch, pack = self._locate(self._position)
        return self.dataset.passes(epoch, pack / self._count(epoch))

    def state_dict(self) -> dict[str, object]:
        """Return the position after the packs consumed so far; packs that workers prepared ahead do not count."""
        epoch, pack = self._locate(self._position)
        checks = {"fingerprint": self.dataset.fingerprint, "sources": self.dataset.names_checksum()}
        found = {"epoch": epoch, "pack": pack, "order": ORDER, **checks, "skipped": list(self.skipped)}
        return {**found, "at": self._position - pack, **self.dataset.state(epoch)} if self.dataset.endless else found

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go to a saved position. CheckpointError if the data or the packing is not what it was."""
        saved = Fields(state, "the position in the data", CheckpointError)
        if saved.integer("order", 1) != ORDER:
            raise CheckpointError(
                f"{self.dataset.where}: the checkpoint is of a version that put the packs of an epoch in "
                "another order, so its position in the data means nothing here; finish the run with the version that "
                "began it, or start over with another output_dir or --resume never"
            )
        if saved.integer("fingerprint") != self.dataset.fingerprint:
            raise CheckpointError(
                f"{self.dataset.where}: the records or the tokenizer's files differ from those of the "
                "checkpoint, so its position in the data means nothing; put them back as they were"
                f"{self._left_out()}, or start over with another output_dir or --resume never"
            )
        if saved.integer("sources", sources := self.dataset.names_checksum()) != sources:
            log.warning(
                "%s: record ids or image paths differ from those of the checkpoint, the tokens do not: going on; are "
                "these the same images?",
                self.dataset.where,
            )
        self.close()
        if self.dataset.endless:
            self._first, self._packs = (saved.integer("epoch"), saved.integer("at")), []
            self.dataset.go_to(self._first[0], saved)
        self._position = self._start(saved.integer("epoch")) + saved.integer("pack")
        self.skipped = dict.fromkeys([*saved.texts("skipped", empty=True), *self.dataset.skipped])

    def _left_out(self) -> str:
        """Return another possible reason for a changed plan: pictures whose size, and so token count, is unknown."""
        skipped = self.dataset.skipped
        if not skipped or not self.dataset.grid:
            return ""
        return (
            f", and so the pictures of {len(skipped)} records that are left out: image_mode=anyres takes the number of "
            f"tokens from their headers, which cannot be read any more; the first: {skipped[0]}"
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        self.close()
        self.dataset.open(self.workers)
        slots = self._slots()
        source: DataLoader[Wire | str] = DataLoader(
            _Packs(self.dataset, slots),  # type: ignore[arg-type]
            sampler=_Jobs(self, self._position),
            batch_size=None,
            num_workers=self.workers,
            # Workers share the samples' arrays and end with the process that made them, also where Python's own
            # default is another, as in a child of a forkserver.
            multiprocessing_context="fork" if self.workers else None,
            prefetch_factor=self.prefetch if self.workers else None,
            collate_fn=_same,
            worker_init_fn=_prepare,
            generator=torch.Generator().manual_seed(0),  # else it draws from torch's global generator
        )
        with signals_held():
            self._stream = iter(source)
        workers = getattr(self._stream, "_workers", [])
        self._end_workers = Finalize(self._stream, _kill, (workers,), exitpriority=0)
        for wire in self._stream:
            if isinstance(wire, str):
                self.close()
                raise DataError(wire)
            batch = _from_wire(wire, slots)
            self._position += self.world_size
            self.skipped.update(dict.fromkeys(batch.skipped))
            self._go_past()
            yield batch.pin_memory() if self.pin_memory else batch

    def close(self) -> None:
        """Stop the workers of an unfinished iteration."""
        if shutdown := getattr(self._stream, "_shutdown_workers", None):
            shutdown()
            self._end_workers()
        self._stream = None
        self.dataset.close()

    def _go_past(self) -> None:
        """Of a stream, note what the block of the packs taken last leaves out, and forget the blocks before it."""
        if not self.dataset.endless:
            return
        epoch, _ = self._locate(self._position - self.world_size)  # no process has gone back behind it
        for number in range(self._first[0], epoch + 1):  # blocks without a pack, too
            self.skipped.update(dict.fromkeys(self.dataset.left_out(number)))
        if before := epoch - self._first[0]:
            self._first = (epoch, self._start(epoch))
            del self._packs[:before]
            self.dataset.forget(epoch)

    def jobs(self, position: int) -> Iterator[Job]:
        """Yield the packs that this rank builds, from a position of the stream on at which a step begins."""
        stream = self._planned(position)
        while step := list(itertools.islice(stream, self.packs_per_step)):
            # after a resumption with another packs_per_step the last step has fewer
            step += [(step[-1][0], None)] * (self.packs_per_step - len(step))
            work = [self._work(*planned) for planned in step]
            yield from (self._job(*step[number]) for number in share_out(work, self.world_size)[self.rank])

    def _planned(self, position: int) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yield the packs of the stream from a position on, filled up with empty ones to a whole step."""
        epoch, pack = self._locate(position)
        for at in range(position, self.steps * self.packs_per_step):
            while pack >= self._count(epoch):
                pack -= self._count(epoch)
                epoch += 1
            if (at - position) % self.packs_per_step == 0:
                self.dataset.hold(epoch)  # the packs of a step are looked at again when it is shared out
            yield epoch, self.dataset.plan(epoch)[pack] if at < self._end else None
            pack += 1

    def _job(self, epoch: int, tickets: np.ndarray | None) -> Job:
        return epoch, None if tickets is None else self.dataset.job(epoch, tickets)

    def _work(self, epoch: int, tickets: np.ndarray | None) -> float:
        """Return what a pack costs; None: an empty one."""
        if self.costs is None or self.world_size == 1:
            return 0.0
        nothing = np.zeros(0, np.int64)
        lengths, images = (nothing, nothing) if tickets is None else self.dataset.needs(epoch, tickets)
        return self.costs.of(lengths, images, self.dataset.tokens_per_image)

    def _slots(self) -> _Slots | None:
        """Return the memory that pixels travel in; None without workers, or where the system has none to give."""
        if not self.workers or not (size := self.dataset.pixel_bytes):
            return None
        try:
            return _Slots(self.workers, self.prefetch + 1, size)
        except OSError as error:
            log.warning("no memory to share with %d workers (%s): pixels are sent to this process", self.workers, error)
            return None

    def _count(self, epoch: int) -> int:
        """Packs in an epoch."""
        first = self._first[0]
        assert epoch >= first  # noqa: S101 nobody asks for what has been forgotten
        while len(self._packs) <= epoch - first:
            self._packs.append(len(self.dataset.plan(first + len(self._packs))))
        return self._packs[epoch - first]

    def _start(self, epoch: int) -> int:
        """Position of an epoch's first pack in the stream."""
        first, position = self._first
        return position + sum(self._count(e) for e in range(first, epoch))

    def _locate(self, position: int) -> tuple[int, int]:
        """(epoch, pack) at a position of the stream."""
        epoch, start = self._first
        position -= start
        while position >= self._count(epoch):
            position -= self._count(epoch)
            epoch += 1
        return epoch, position


class _Jobs:
    """The DataLoader's sampler: this rank's packs in order. It runs in the main process."""

    def __init__(self, loader: Loader, position: int) -> None:
        self.loader = loader
        self.position = position

    def __iter__(self) -> Iterator[Job]:
        return self.loader.jobs(self.position)


class _Slots:
    """Memory that workers write pixels to and this process reads them from; of no file, so /dev/shm may be small.

    A worker is never more than ``prefetch`` packs ahead of what this process has asked for, and this process copies a
    pack before it asks for the next one. So a worker that goes round prefetch + 1 slots overwrites nothing that is
    still wanted.
    """

    def __init__(self, workers: int, each: int, size: int) -> None:
        """each: slots of a worker. size: bytes of a slot."""
        self._memory = mmap.mmap(-1, workers * each * size)
        self._each, self._size = each, size
        self._turn = 0  # packs written by this worker

    def put(self, pixels: Tensor) -> int:
        """Write pixels; return the slot. In a worker."""
        info = get_worker_info()
        assert info is not None  # noqa: S101 there are slots for workers alone
        slot = info.id * self._each + self._turn % self._each
        self._turn += 1
        self._bytes(slot, pixels.numel())[:] = pixels.numpy().reshape(-1)
        return slot

    def take(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Return a copy of the pixels in a slot."""
        return torch.from_numpy(self._bytes(slot, math.prod(shape)).reshape(shape).copy())

    def _bytes(self, slot: int, count: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, count, slot * self._size)


class _Packs:
    """The DataLoader's data set: builds one pack, in a worker."""

    def __init__(self, dataset: PackSource, slots: _Slots | None) -> None:
        self.dataset = dataset
        self.slots = slots

    def __getitem__(self, job: Job) -> Wire | str:
        epoch, pack = job
        try:
            batch = self.dataset.empty() if pack is None else self.dataset.levels(epoch, pack)
        except DataError as error:
            return str(error)  # an exception would arrive wrapped in the worker's traceback
        return _to_wire(batch, self.slots)


def _to_wire(batch: PackedBatch, slots: _Slots | None) -> Wire:
    """Turn tensors into numpy arrays, which pass through a pipe; each tensor would need a file in a small /dev/shm.

    Pixels in 8 bits, which are most of it, stay behind in a slot.
    """
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    wire = {name: v.numpy() if isinstance(v, Tensor) else v for name, v in values.items()}
    pixels = batch.pixel_values
    if slots is not None and pixels.dtype == torch.uint8:
        wire["pixel_values"] = (slots.put(pixels), tuple(pixels.shape))
    return wire


def _from_wire(wire: Wire, slots: _Slots | None) -> PackedBatch:
    values: Wire = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in wire.items()}
    if isinstance(sent := values["pixel_values"], tuple):
        assert slots is not None  # noqa: S101 it was sent through one
        values["pixel_values"] = slots.take(*sent)
    return PackedBatch(**values)


def _same(item: T) -> T:
    return item


def _kill(workers: Sequence[BaseProcess]) -> None:
    """Kill the remaining workers. They ignore SIGTERM, for which Python would wait for ever when it exits."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _prepare(worker: int) -> None:
    prepare_worker()

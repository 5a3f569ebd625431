"""What one process writes of a checkpoint: at once, or copied first and written by a thread while training goes on.

The thread takes part in nothing that processes do together: it writes this process's files and sums them. What becomes
of them is agreed on between two steps (train/checkpoint.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast import group
from tinyllava_fast.errors import CheckpointError, UserError, writing
from tinyllava_fast.tensors import FILES
from tinyllava_fast.train import seed
from tinyllava_fast.train.checksums import Checksum, Checksums
from tinyllava_fast.train.engine.base import LazyTensor, TrainingEngine
from tinyllava_fast.train.tensor_writer import write_tensors

_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class File:
    """A file of a checkpoint, of which this process writes the tensors that are ``mine``. metadata: texts by name."""

    name: str
    items: Sequence[LazyTensor]
    metadata: dict[str, str]


def own_files(engine: TrainingEngine) -> list[File]:
    """Return what this process writes: its random state, and its share of model and optimizer."""
    plain, tensors = seed.rng_state()
    random = [LazyTensor.of(name, tensor) for name, tensor in tensors.items()]
    files = [File(f"rng-{engine.rank}.safetensors", random, {"state": json.dumps(plain)})]
    several = engine.world_size > 1
    ending, metadata = (f"-{engine.rank}", {FILES: str(engine.world_size)}) if several else ("", {})
    return files + [
        File(f"{name}{ending}.safetensors", items, metadata) for name, items in engine.saved_state().items()
    ]


def own_bytes(files: Sequence[File]) -> int:
    """Return the bytes of the tensors that this process writes."""
    mine = [item for file in files for item in file.items if item.mine]
    return sum(item.dtype.itemsize * int(torch.Size(item.shape).numel()) for item in mine)


def make_folder(folder: Path) -> None:
    """Make the folder that a checkpoint is written to. UserError if it cannot be made."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_files(folder: Path, files: Sequence[File]) -> dict[str, Checksum]:
    """Write files and return their checksums. UserError, of the first that fails, once all tensors are fetched."""
    written: dict[str, Checksum] = {}
    failure: UserError | None = None
    for file in files:
        try:
            written[file.name] = write_tensors(folder / file.name, file.items, metadata=file.metadata)
        except UserError as error:  # the others are in the next file's gathers already
            failure = failure or error
    if failure is not None:
        raise failure
    return written


def agreed(work: Callable[[], dict[str, Checksum] | None]) -> dict[str, Checksum]:
    """Return the files that all processes wrote. Raise CheckpointError in each of them if one could not."""
    files: dict[str, Checksum] = {}
    failure = ""
    try:
        files = work() or {}
    except UserError as error:
        failure = str(error)
    parts = group.gather((failure, files))
    failures = [(f"rank {rank}: " if len(parts) > 1 else "") + why for rank, (why, _) in enumerate(parts) if why]
    if failures:
        raise CheckpointError("; ".join(failures))
    return {name: checksum for _, part in parts for name, checksum in part.items()}


class HostCopy:
    """A copy of a process's share of a checkpoint in the host's memory.

    The memory is kept from one save to the next, so that it need not be found, cleared and pinned anew.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}

    @property
    def empty(self) -> bool:
        """Whether no memory is kept."""
        return not self._held

    def take(self, files: Sequence[File]) -> list[File]:
        """Copy the tensors that this process writes, and return the files with the copies in them."""
        held, self._held = self._held, {}
        copied: list[File] = []
        on_device = False
        for file in files:
            items = []
            for item in file.items:
                tensor = item.fetch()
                if item.mine:
                    copy = self._copied(held.pop((file.name, item.name), None), tensor)
                    self._held[file.name, item.name] = copy
                    items.append(replace(item, fetch=partial(torch.Tensor.detach, copy)))
                    on_device |= tensor.is_cuda
            copied.append(File(file.name, items, file.metadata))
        if on_device:
            torch.cuda.synchronize()  # copies to pinned memory run beside the program
        return copied

    def clear(self) -> None:
        """Let go of the memory."""
        self._held.clear()

    @staticmethod
    def _copied(known: Tensor | None, tensor: Tensor) -> Tensor:
        if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
            known = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return known.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


class _CancelledError(Exception):
    """The thread is to stop: nobody waits for what it writes any more."""


class BackgroundWriter:
    """Writes copied files in a thread of its own."""

    def __init__(self, folder: Path, files: Sequence[File]) -> None:
        self.began, self.seconds = time.perf_counter(), 0.0
        self._folder, self._cancelled = folder, False
        self._files = [
            replace(file, items=[replace(i, fetch=partial(self._unless_cancelled, i)) for i in file.items])
            for file in files
        ]
        self._written: Checksums = {}
        self._failure: Exception | None = None
        # A daemon: a process that ends by an error does not wait for its disk.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether it still writes."""
        return self._thread.is_alive()

    def result(self) -> dict[str, Checksum]:
        """Wait for it, and return the checksums of what was written. UserError if something could not be."""
        self._thread.join()
        if isinstance(self._failure, UserError):
            raise self._failure
        if self._failure is not None:
            raise CheckpointError(f"{type(self._failure).__name__}: {self._failure}") from self._failure
        return dict(self._written)

    def cancel(self) -> None:
        """Let it end before the next tensor, and wait for that, but not for a disk that does not answer."""
        self._cancelled = True
        self._thread.join(_PATIENCE)

    def _unless_cancelled(self, item: LazyTensor) -> Tensor:
        if self._cancelled:
            raise _CancelledError
        return item.fetch()

    def _run(self) -> None:
        try:
            self._written = write_files(self._folder, self._files)
        except Exception as error:  # told between two steps, by all processes alike
            self._failure = error
        self.seconds = time.perf_counter() - self.began


@dataclass(frozen=True)
class Pending:
    """A checkpoint of which this process's files are being written. content: of state.json."""

    target: Path
    content: bytes
    writer: BackgroundWriter
    rank: int

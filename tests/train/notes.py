"""What the processes of a run take as samples, step by step, as each of them notes it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast.data.types import PackedBatch


def take_note(folder: Path) -> Callable[[], None]:
    """In a process of a run: note the digests of each step's packs before the step. Return what undoes it."""
    from tinyllava_fast.train import loop

    take, rank = loop.Stage._next_micro_batches, os.environ.get("RANK", "0")
    folder.mkdir(parents=True, exist_ok=True)
    notes = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noting(stage: loop.Stage, *arguments: object) -> object:
        found = take(stage, *arguments)
        os.write(notes, f"{time.time():.3f} {stage.state.step} {','.join(map(_digest, found[0]))}\n".encode())
        return found

    def undo() -> None:
        loop.Stage._next_micro_batches = take
        os.close(notes)

    loop.Stage._next_micro_batches = noting
    return undo


def _digest(pack: PackedBatch) -> str:
    found = hashlib.sha1(pack.input_ids.numpy().tobytes())
    found.update(pack.pixel_values.numpy().tobytes())
    return found.hexdigest()[:12]


@dataclass
class Notes:
    """What the processes of a run have noted so far in a folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def of(self, rank: int) -> list[tuple[float, int, str]]:
        """(time, step, digests of the packs) of every step that a rank has begun."""
        path = self.folder / f"{rank}.txt"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(float(moment), int(step), digests) for moment, step, digests in lines]

    def samples(self, rank: int) -> dict[int, set[str]]:
        """Step -> the digests of its packs; several if it was repeated with others."""
        found: dict[int, set[str]] = {}
        for _, step, digests in self.of(rank):
            found.setdefault(step, set()).add(digests)
        return found

    def packs(self, ranks: int) -> dict[int, list[str]]:
        """Step -> the digests of the packs of so many ranks, sorted."""
        found: dict[int, list[str]] = {}
        for rank in range(ranks):
            for _, step, digests in self.of(rank):
                found[step] = sorted([*found.get(step, []), *digests.split(",")])
        return found

"""Checkpoints that survive kill -9 at any instant, a full disk included.

    <run>/checkpoints/<stage>-<step>/   model.safetensors, optimizer.safetensors, rng-<rank>.safetensors, state.json,
                                        checksums.json; of several processes model-<rank>.safetensors and
                                        optimizer-<rank>.safetensors, each with whole tensors or rows of some
    <run>/checkpoints/latest            name of the newest one

A checkpoint is written into ``.tmp-<name>`` by all processes, every file and the folder are fsynced, the folder is
renamed, and only then ``latest`` is replaced. Whatever dies on the way leaves the previous checkpoint valid and a
``.tmp-`` folder that the next start removes. What was damaged later is found by its checksum (train/checksums.py), and
the checkpoint before it is taken. The files may be written in the background (train/saving.py); all that processes do
together, and the renaming, happens between two steps.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from tinyllava_fast import group
from tinyllava_fast.errors import CheckpointError, writing
from tinyllava_fast.fields import Fields, read_json, shown
from tinyllava_fast.files import TMP, put_folder, remove, sync, write_file
from tinyllava_fast.hardware import available_memory_bytes, torchrun_number
from tinyllava_fast.log import log
from tinyllava_fast.tensors import TensorFile
from tinyllava_fast.train import seed
from tinyllava_fast.train.checksums import MANIFEST, Checksum, Checksums, first_difference, manifest, read_manifest
from tinyllava_fast.train.engine.base import TrainingEngine
from tinyllava_fast.train.saving import (
    BackgroundWriter,
    HostCopy,
    Pending,
    agreed,
    make_folder,
    own_bytes,
    own_files,
    write_files,
)
from tinyllava_fast.train.standing import Standing
from tinyllava_fast.train.tensor_reader import open_tensors

FORMAT = 1
LATEST = "latest"
_NAME = re.compile(r".+-\d{8}")


class ChangedKey(TypedDict):
    """A key of the configuration that changed when the run was resumed at a step."""

    step: int
    key: str
    old: object
    new: object


@dataclass
class TrainState:
    """The state of a run: everything of a checkpoint that is not a tensor."""

    stage: str = ""
    stage_index: int = 0
    stage_step: int = 0
    """Optimizer steps done in the stage."""
    step: int = 0
    """Optimizer steps done in the run."""
    loader: dict[str, object] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    """Counters of the whole run: wall_seconds, step_seconds, samples, tokens, supervised_tokens, capacity."""
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data report of each stage so far."""
    compiled: dict[str, bool] = field(default_factory=dict)
    """The choice of engine.compile: auto for each stage: rounding differs, so a resumed run chooses the same."""
    readings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The reading of pictures of each stage so far: orientation and background (train/reading.py)."""
    parts: dict[str, str] = field(default_factory=dict)
    """Checksums of what the model was built from and no checkpoint holds (train/parts.py)."""
    config: dict[str, object] = field(default_factory=dict)
    """The resolved configuration."""
    stage_steps: int = 0
    """Steps that the stage had when it was planned; 0: not known."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step since the last line of metrics.jsonl."""
    source_window: dict[str, list[float]] = field(default_factory=dict)
    """Loss sum and counts of each source since that line (train/by_source.py); empty with one source."""
    sources: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Counts of each source of each stage so far; empty with one source."""
    final_losses: dict[str, float | None] = field(default_factory=dict)
    """Loss of the last line of each stage that is over."""
    validation: dict[str, Standing] = field(default_factory=dict)
    """The validations of each stage so far (train/standing.py)."""
    checksums: bool = True
    """Whether checksums.json lies beside; False in what older versions wrote, which did not say."""
    barren: int = 0
    """Steps in a row, up to now, without a supervised token."""
    skipped_steps: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts of the steps of each stage that were no number (train/nonfinite.py)."""
    noise: dict[str, dict[str, float]] = field(default_factory=dict)
    """Running means of each stage with optim.noise_scale (train/noise.py)."""
    changes: list[ChangedKey] = field(default_factory=list)
    format: int = FORMAT

    @property
    def name(self) -> str:
        """Folder name of this state's checkpoint."""
        return f"{self.stage}-{self.step:08d}"


class CheckpointStore:
    """The ``checkpoints`` folder of a run. keep: newest checkpoints that stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = max(keep, 1)
        self.pending: Pending | None = None
        self._copy = HostCopy()
        self._good: set[str] = set()  # read whole or written by this process
        self._damaged: set[str] = set()

    def clean(self) -> None:
        """Remove what a killed run left half-written. Rank 0 only, before anything is saved."""
        if self.folder.is_dir():
            for stale in self.folder.glob(f"{TMP}*"):
                log.warning("removing %s, left by a run that was killed while saving", stale)
                remove(stale)

    def clear(self) -> None:
        """Remove every checkpoint (--resume never)."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def names(self) -> list[str]:
        """Checkpoints, oldest first by the time they were written. A damaged one may be among them."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if is_checkpoint(p)]
        return [p.name for p in sorted(found, key=lambda p: (_written(p), p.name))]

    def written_since(self, moment: int) -> bool:
        """Return whether a checkpoint was written after a moment, in ns of the system's clock."""
        return any(_written(self.folder / name) >= moment for name in self.names())

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names; the newest one if that file is missing; None without any."""
        names = self.names()
        marker = self.folder / LATEST
        name = marker.read_bytes().decode(errors="replace").strip() if marker.is_file() else None
        if name in names:
            return self.folder / str(name)
        if name is not None and names:
            log.warning("%s: names no checkpoint (%s); taking the newest, %s", marker, shown(name), names[-1])
        return self.folder / names[-1] if names else None

    def intact(self) -> Path | None:
        """Return the newest checkpoint that is as it was written; None if there is no checkpoint.

        All of its bytes are read. Damaged ones are told, noted and passed over; CheckpointError if all are damaged.
        """
        latest = self.latest()
        if latest is None:
            return None
        others = [self.folder / name for name in reversed(self.names()) if name != latest.name]
        for folder in (latest, *others):
            found = self.verified(folder)
            if not found:
                return folder
            log.warning("%s; trying the checkpoint before it", found)
        raise CheckpointError(
            f"{self.folder}: no checkpoint in it is intact; put back a copy of one, or start over with --resume never"
        )

    def verified(self, folder: Path) -> str:
        """Return what is wrong with one of these checkpoints, as ``damage`` does, and note whether it is good."""
        found = damage(folder)
        noted, other = (self._damaged, self._good) if found else (self._good, self._damaged)
        noted.add(folder.name)
        other.discard(folder.name)
        return found

    def save(self, state: TrainState, engine: TrainingEngine) -> Path:
        """Write a checkpoint; every rank calls it. Raises CheckpointError if it can't, the previous one intact.

        In each phase every process learns of another's failure, so that none waits for one that has given up.
        """
        target, content = self.folder / state.name, _content(state)
        with self._whole(target, engine.rank) as tmp:
            agreed(lambda: make_folder(tmp))
            files = agreed(lambda: write_files(tmp, own_files(engine)))
            agreed(lambda: self._publish(tmp, target, content, files) if engine.rank == 0 else None)
        return target

    def begin(self, state: TrainState, engine: TrainingEngine) -> None:
        """Copy what a checkpoint holds and let a thread write it, for ``publish``; every rank calls it.

        No other one may be pending. Raises CheckpointError as ``save`` does.
        """
        target, content = self.folder / state.name, _content(state)
        with self._whole(target, engine.rank) as tmp:
            agreed(lambda: make_folder(tmp))
            writer = BackgroundWriter(tmp, self._copy.take(own_files(engine)))
        self.pending = Pending(target, content, writer, engine.rank)

    @property
    def busy(self) -> bool:
        """Whether this process still writes its files of the pending checkpoint."""
        return self.pending is not None and self.pending.writer.busy

    def publish(self) -> Path:
        """Wait for the pending checkpoint and put it in its place; every rank calls it. Raises as ``save`` does."""
        pending = self.pending
        assert pending is not None  # noqa: S101 the caller has looked
        self.pending = None
        with self._whole(pending.target, pending.rank) as tmp:
            files = agreed(pending.writer.result)
            first = pending.rank == 0
            agreed(lambda: self._publish(tmp, pending.target, pending.content, files) if first else None)
        return pending.target

    def fits(self, engine: TrainingEngine) -> bool:
        """Return whether the memory of this machine takes the copies of its processes twice; every rank calls it."""
        need = own_bytes(own_files(engine)) * torchrun_number("LOCAL_WORLD_SIZE", 1)
        return all(group.gather(not self._copy.empty or 2 * need <= available_memory_bytes()))

    def abandon(self) -> None:
        """Give up a checkpoint that is pending, and the memory of its copy."""
        if self.pending is not None:
            self.pending.writer.cancel()
            if self.pending.rank == 0:
                remove(self._beside(self.pending.target))
            self.pending = None
        self.forget()

    def forget(self) -> None:
        """Let go of the memory that copies are kept in. None is pending."""
        self._copy.clear()

    @staticmethod
    def _beside(target: Path) -> Path:
        return target.with_name(f"{TMP}{target.name}")

    @contextmanager
    def _whole(self, target: Path, rank: int) -> Iterator[Path]:
        """Yield the folder to write to; an error removes it, and names the checkpoint."""
        tmp = self._beside(target)
        try:
            yield tmp
        except CheckpointError as error:
            if rank == 0:
                remove(tmp)
            raise CheckpointError(f"{target}: could not be saved: {error}") from None

    def _publish(self, tmp: Path, target: Path, content: bytes, files: Checksums) -> None:
        """Put the folder in its place, name it in ``latest`` and remove what is too old. Rank 0 only."""
        with writing(target):
            write_file(tmp / "state.json", content)
            write_file(tmp / MANIFEST, manifest({**files, "state.json": Checksum().plus(content)}))
            sync(tmp)
            put_folder(tmp, target)
            write_file(self.folder / LATEST, f"{target.name}\n".encode())
        self._good.add(target.name)
        self._damaged.discard(target.name)
        # Damaged ones count for nothing. One that this process has neither read nor written is read before a good one
        # is removed in its favour.
        kept = [name for name in self.names() if name not in self._damaged and name != target.name]
        if 1 < self.keep <= len(kept) and any(name in self._good for name in kept):
            kept = [name for name in kept if name in self._good or not self.verified(self.folder / name)]
        for name in (*self._damaged, *kept[: -(self.keep - 1) or None]):
            remove(self.folder / name)
        self._damaged.clear()
        remove(tmp)  # the same step, saved before this run was resumed from an older one


def is_checkpoint(folder: Path) -> bool:
    """Return True for a folder with the name of a checkpoint, whole or damaged."""
    return bool(_NAME.fullmatch(folder.name)) and not folder.name.startswith(TMP) and folder.is_dir()


def _written(folder: Path) -> int:
    """Return when a checkpoint was written, in ns."""
    state = folder / "state.json"
    return (state if state.is_file() else folder).stat().st_mtime_ns


def _content(state: TrainState) -> bytes:
    """Return state.json as it is now; training goes on to change the state."""
    return json.dumps(asdict(state) | {"checksums": True}, indent=1).encode()


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, by its file; "" if every byte is as it was written.

    Of a checkpoint from before there were checksums, the structure of each file is all that can be looked at.
    """
    if not (folder / "state.json").is_file():
        return f"{folder / 'state.json'}: missing"
    try:
        files = read_manifest(folder)
        if files is not None:
            return first_difference(folder, files)
        if _read_state(folder / "state.json").checksums:
            return f"{folder / MANIFEST}: missing"
        for name in ("model", "optimizer", "rng-0"):
            open_tensors(folder / f"{name}.safetensors")
    except CheckpointError as error:
        return str(error)
    return ""


def load_state(folder: Path) -> TrainState:
    """Return state.json of a checkpoint. Raise CheckpointError naming what is wrong with it."""
    path = folder / "state.json"
    if not path.is_file():
        known = sorted(p.parent.name for p in folder.glob("*/state.json"))
        hint = f"; it holds {', '.join(known)}" if known else _run_above(folder)
        raise CheckpointError(f"{folder}: not a checkpoint, it has no state.json{hint}")
    try:
        return _read_state(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: damaged, or of another version; {another(folder)}") from None


def _run_above(path: Path) -> str:
    """A hint at the run folder that a path lies in, if it has a checkpoint."""
    for folder in list(path.parents)[:3]:
        if CheckpointStore(folder / "checkpoints", 1).names():
            return f"; give the run folder, --resume {folder}, or one of its checkpoints"
    there = "; " if path.exists() else "; it does not exist: "
    return f"{there}--resume takes auto, never, a run folder that tlf-train wrote, or one of its checkpoints"


def _read_state(path: Path) -> TrainState:
    """state.json as a TrainState. Raises CheckpointError for a field that is missing, unknown or of another kind."""
    fields = Fields.of(read_json(path, CheckpointError), str(path), CheckpointError)
    if (found := fields.integer("format")) != FORMAT:
        raise CheckpointError(f"{fields.where}: format {found}, this version reads {FORMAT}")
    for name, hint in fields.unknown(TrainState.__dataclass_fields__).items():
        raise CheckpointError(f"{fields.where}: {name}: unknown field; {hint}")
    fields.text("stage")
    for name in ("stage_index", "stage_step", "step"):
        fields.integer(name, least=0)
    for name in ("stage_steps", "barren"):
        fields.integer(name, 0, least=0)
    loader = fields.mapping("loader")
    for name in ("epoch", "pack", "fingerprint"):
        loader.integer(name, least=0)
    loader.texts("skipped", empty=True)
    totals = fields.mapping("totals")
    for name in totals.values:
        totals.number(name)
    for name in ("config", "reports"):
        fields.mapping(name)
    for name in ("losses", "changes"):
        fields.items(name, [], empty=True)
    for name in ("compiled", "final_losses", "parts", "source_window", "sources", "validation", "skipped_steps"):
        fields.mapping(name, None)
    return TrainState(**{**fields.values, "checksums": fields.boolean("checksums", False)})


def another(folder: Path) -> str:
    """Return the remedy for a damaged checkpoint: one beside it that is whole, by name, or to start over."""
    for name in reversed(CheckpointStore(folder.parent, 1).names()):
        if name != folder.name and not damage(folder.parent / name):
            return f"resume from an older one with --resume {folder.parent / name}"
    return "no other checkpoint lies beside it: start over with --resume never"


def load_rng(folder: Path, rank: int) -> None:
    """Restore this rank's random state; a rank the checkpoint did not have keeps its seeded one."""
    path = folder / f"rng-{rank}.safetensors"
    if not path.is_file() and rank:
        log.warning("%s: saved with fewer processes; rank %d keeps its seeded random state", folder, rank)
        return
    with open_tensors(path) as tensors:
        try:
            assert isinstance(tensors, TensorFile)  # noqa: S101 of one process
            seed.set_rng_state(json.loads(tensors.metadata["state"]), dict(tensors))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None

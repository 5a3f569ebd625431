"""Checkpoints that survive kill -9 at any instant, a full disk included.

    <run>/checkpoints/<stage>-<step>/   state.json, model.safetensors, optimizer.safetensors, rng-<rank>.safetensors
    <run>/checkpoints/latest            name of the newest complete one

A checkpoint is written into ``.tmp-<name>`` by all processes, every file and the folder are fsynced, the folder is
renamed, and only then ``latest`` is replaced. Whatever dies on the way leaves the previous checkpoint valid and a
``.tmp-`` folder that the next start removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypedDict

import torch
from safetensors import SafetensorError
from torch import Tensor

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.fields import Fields, read_json, shown
from tinyllava_fast.files import TMP, put_folder, remove, sync, write_file
from tinyllava_fast.log import log
from tinyllava_fast.tensors import DTYPES, TensorFile
from tinyllava_fast.train import seed
from tinyllava_fast.train.engine.base import LazyTensor, TrainingEngine

FORMAT = 1
LATEST = "latest"
_NAME = re.compile(r".+-\d{8}")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    final_losses: dict[str, float] = field(default_factory=dict)
    """Loss of the last line of each stage that is over."""
    barren: int = 0
    """Steps in a row, up to now, without a supervised token."""
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
        """Complete checkpoints, oldest first by the time they were written."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
        found = [p for p in found if not p.name.startswith(TMP)]
        return [p.name for p in sorted(found, key=lambda p: ((p / "state.json").stat().st_mtime_ns, p.name))]

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names; the newest complete one if that file is missing; None without any."""
        names = self.names()
        marker = self.folder / LATEST
        name = marker.read_bytes().decode(errors="replace").strip() if marker.is_file() else ""
        if name in names:
            return self.folder / name
        if name and names:
            log.warning("%s: names no checkpoint (%s); taking the newest, %s", marker, shown(name), names[-1])
        return self.folder / names[-1] if names else None

    def save(self, state: TrainState, engine: TrainingEngine) -> Path:
        """Write a checkpoint; every rank calls it. Raises CheckpointError if it can't, the previous one intact."""
        target, tmp = self.folder / state.name, self.folder / f"{TMP}{state.name}"
        failure = ""
        try:
            tmp.mkdir(parents=True, exist_ok=True)
            self._write_rng(tmp, engine.rank)
            write_tensors(tmp / "model.safetensors", engine.model_state(), write=engine.rank == 0)
            write_tensors(tmp / "optimizer.safetensors", engine.optimizer_state(), write=engine.rank == 0)
            if engine.rank == 0:
                write_file(tmp / "state.json", json.dumps(asdict(state), indent=1).encode())
        except OSError as error:
            failure = str(error)
        # A rank that failed tells the others before anyone publishes.
        if float(engine.all_reduce_sum(torch.tensor(float(bool(failure)), device=engine.device))) > 0:
            if engine.rank == 0:
                remove(tmp)
            raise self._refused(target, failure or "another process could not write its part")
        try:
            if engine.rank == 0:
                self._publish(tmp, target)
        except OSError as error:
            remove(tmp)
            raise self._refused(target, str(error)) from error
        engine.barrier()
        return target

    def _write_rng(self, folder: Path, rank: int) -> None:
        plain, tensors = seed.rng_state()
        items = [LazyTensor.of(name, tensor) for name, tensor in tensors.items()]
        write_tensors(folder / f"rng-{rank}.safetensors", items, metadata={"state": json.dumps(plain)})

    def _publish(self, tmp: Path, target: Path) -> None:
        sync(tmp)
        put_folder(tmp, target)
        write_file(self.folder / LATEST, f"{target.name}\n".encode())
        for name in [n for n in self.names() if n != target.name][: -(self.keep - 1) or None]:
            remove(self.folder / name)
        remove(tmp)  # the same step, saved before this run was resumed from an older one

    def _refused(self, target: Path, reason: str) -> CheckpointError:
        return CheckpointError(f"{target}: could not be saved: {reason}; free some space, or mend the disk")


def load_state(folder: Path) -> TrainState:
    """Return state.json of a checkpoint. Raise CheckpointError naming what is wrong with it."""
    path = folder / "state.json"
    if not path.is_file():
        known = sorted(p.parent.name for p in folder.glob("*/state.json"))
        hint = f"; it holds {', '.join(known)}" if known else _run_above(folder)
        raise CheckpointError(f"{folder}: not a checkpoint, it has no state.json{hint}")
    try:
        return _state(Fields.of(read_json(path, CheckpointError), str(path), CheckpointError))
    except CheckpointError as error:
        raise CheckpointError(f"{error}: damaged, or of another version; {_another(folder)}") from None


def _run_above(path: Path) -> str:
    """A hint at the run folder that a path lies in, if it has a checkpoint."""
    for folder in list(path.parents)[:3]:
        if CheckpointStore(folder / "checkpoints", 1).names():
            return f"; give the run folder, --resume {folder}, or one of its checkpoints"
    there = "; " if path.exists() else "; it does not exist: "
    return f"{there}--resume takes auto, never, a run folder that tlf-train wrote, or one of its checkpoints"


def _state(fields: Fields) -> TrainState:
    """state.json as a TrainState. Raises CheckpointError for a field that is missing, unknown or of another kind."""
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
    for name in ("compiled", "final_losses", "parts", "source_window", "sources"):
        fields.mapping(name, None)
    return TrainState(**fields.values)


def _another(folder: Path) -> str:
    """Return the remedy for a damaged checkpoint: one beside it that is whole, by name, or to start over."""
    for name in reversed(CheckpointStore(folder.parent, 1).names()):
        if name != folder.name and _readable(folder.parent / name):
            return f"resume from an older one with --resume {folder.parent / name}"
    return "no other checkpoint lies beside it: start over with --resume never"


def _readable(folder: Path) -> bool:
    try:
        _state(Fields.of(read_json(folder / "state.json", CheckpointError), "", CheckpointError))
        for name in ("model.safetensors", "optimizer.safetensors"):
            TensorFile(folder / name)
    except (CheckpointError, SafetensorError, OSError):
        return False
    return True


def load_rng(folder: Path, rank: int) -> None:
    """Restore this rank's random state; a rank the checkpoint did not have keeps its seeded one."""
    path = folder / f"rng-{rank}.safetensors"
    if not path.is_file() and rank:
        log.warning("%s: saved with fewer processes; rank %d keeps its seeded random state", folder, rank)
        return
    with open_tensors(path) as tensors:
        try:
            seed.set_rng_state(json.loads(tensors.metadata["state"]), dict(tensors))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}); {_another(folder)}") from None


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file of a checkpoint; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete; {_another(path.parent)}")
    try:
        return TensorFile(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); {_another(path.parent)}") from None


def write_tensors(
    path: Path, items: Sequence[LazyTensor], *, write: bool = True, metadata: Mapping[str, str] | None = None
) -> None:
    """Stream tensors into a safetensors file and fsync it; only one of them is in memory at a time.

    The library's save_file takes all of them at once, which a gathered state of a large model does not allow.
    write: False on ranks that only take part in fetching.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for item in items:
        size = item.dtype.itemsize * int(torch.Size(item.shape).numel())
        shape = list(item.shape)
        header[item.name] = {"dtype": _DTYPE_NAMES[item.dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = path.open("wb") if write else None
    failure: OSError | None = None
    try:
        if file:
            file.write(struct.pack("<Q", len(text)) + text)
        for item in items:
            tensor = item.fetch()
            # After a failed write the fetches go on: other ranks wait in the same gathers.
            if file and failure is None:
                try:
                    _write_tensor(file, tensor)
                except OSError as error:
                    failure = error
        if failure:
            raise failure
        if file:
            file.flush()
            os.fsync(file.fileno())
    finally:
        if file:
            try:
                file.close()
            except OSError:  # flushing the rest to a full disk fails again; the first failure is the one to report
                failure = failure or OSError(f"{path}: closing failed")
    if failure:
        raise failure


def _write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(flat.numpy().data)

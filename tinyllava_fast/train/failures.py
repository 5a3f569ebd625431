"""Messages of a run that stops in the middle: what happened, what to set, and from where the same command goes on."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllava_fast import group
from tinyllava_fast.config.schema import EngineConfig, RecipeConfig
from tinyllava_fast.errors import DataError, LostError, ShortageError, UserError
from tinyllava_fast.train.checkpoint import CheckpointStore, TrainState
from tinyllava_fast.train.prepare import of_stage

_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED", re.I)
_UNWRITTEN = re.compile(r"cannot write the folder|could not be saved|cannot be written")
_PASSES = re.compile("|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE))))
DIVERGED = "training diverged"
_WORKER = re.compile(r"DataLoader worker \(pid.*\) (?:exited unexpectedly|is killed by signal)")


@dataclass
class Way:
    """The way on for a run that stops now. resume: as the command has it: auto, never or a path."""

    store: CheckpointStore
    resume: str = "auto"
    began: Path | None = None
    """The checkpoint that this process goes on from; None: it starts."""
    saved: Path | None = None
    """The checkpoint that it wrote last."""

    @property
    def newest(self) -> Path | None:
        """The checkpoint to go on from; None: there is none, the run starts over."""
        here = self.saved or self.began
        return here if here is None or (here / "state.json").is_file() else self.store.latest()

    def command(self, mended: str = "") -> str:
        """Return the command that goes on, or starts over if nothing was saved. mended: words to put behind it."""
        again = self.newest is None or self.resume == "auto" or (self.saved is None and self.resume != "never")
        return f"the same command{mended}" if again else f"the same command with --resume auto{mended}"

    def older(self) -> Path | None:
        """The checkpoint before the newest."""
        newest = self.newest
        if newest is None:
            return None
        beside = CheckpointStore(newest.parent, 1)
        older = [name for name in beside.names() if name != newest.name]
        return beside.folder / older[-1] if older else None


@contextmanager
def explained(way: Way, state: TrainState, engine: EngineConfig, stage: str) -> Iterator[None]:
    """Around the work of a stage: errors name it, and say from which checkpoint the same command goes on.

    Out of memory, a data worker that died and a full disk are ShortageErrors with what to set; the loss of another
    process is a LostError; other errors pass.
    """
    try:
        with of_stage(stage), group.losses_named():
            yield
    except LostError as error:
        raise LostError(without_another(way, state, str(error), stage), error.stop) from error
    except UserError as error:
        text = f"{error}{way_on(way, state, str(error))}"
        if isinstance(error, DataError) and state.step:
            text += ". No record may be removed or changed before the run has ended"
        short = bool(_UNWRITTEN.search(str(error)) and _PASSES.search(str(error)))
        raise (ShortageError if short else type(error))(text) from error
    except (RuntimeError, MemoryError, OSError) as error:
        if _is_memory(error):
            text = _out_of_memory(engine, stage)
        elif _WORKER.search(str(error)):
            text = (
                f"a process that prepares data died ({str(error).splitlines()[0]}); memory is the usual reason: lower "
                "engine.workers or engine.prefetch, or stop what else runs here"
            )
        else:
            raise
        where = f"stages.{stage}: step {state.step + 1}: {text}"
        raise ShortageError(f"{where}{way_on(way, state)}") from error


def without_another(way: Way, state: TrainState, lost: str, stage: str = "") -> str:
    """Return the message of a process that ends because another one is lost. lost: which, and how."""
    return f"stages.{stage or state.stage}: step {state.step + 1}: {lost}{way_on(way, state, mended='')}"


def way_on(way: Way, state: TrainState, said: str = "", mended: str = ", with what is mended,") -> str:
    """Return the last lines of an error: from where the same command, mended, goes on. Empty before the first step.

    said: the error so far. mended: words behind "the same command".
    """
    newest, older = way.newest, way.older()
    if newest is None:
        return f"\nNo checkpoint was saved so far: {way.command()} starts over" if state.step else ""
    if f"{newest}{os.sep}" in said:  # a file of its own is damaged
        back = f"--resume {older}" if older else "--resume never, which starts over: no other lies beside it"
        return "" if older and str(older) in said else f"\nThis checkpoint cannot be used: {back}"
    text = f"\nThe checkpoint {newest} is intact: {way.command(mended)} goes on from there"
    if _UNWRITTEN.search(said):
        text += f"; to go on in another output_dir, add --resume {newest}"
    if DIVERGED in said:
        back = f"--resume {older}" if older else "--resume never, which starts over"
        return f"{text}. If it diverges again, its weights were spoilt before: {back}"
    return f"{text}; further back with --resume {older}" if older else text


def diverged(
    state: TrainState,
    recipe: RecipeConfig,
    groups: Iterable[str],
    loss: float,
    norm: float | None,
    *,
    step: int | None = None,
    why: str = "",
    records: Path | None = None,
) -> UserError:
    """Return the error for a loss or gradient norm that is no number. groups: names as "llm.no_decay".

    step: None: the state's. why: words behind "training diverged". records: file that lists those of such steps.
    """
    parts = {group.partition(".")[0] for group in groups}
    own = [part for part in sorted(parts) if getattr(recipe, part).lr is not None]
    keys = ["optim.lr"] * (len(own) < len(parts)) + [f"recipe.{part}.lr" for part in own]
    text = (
        f"step {step or state.step} ({state.stage}): loss {loss}, gradient norm {norm}: {DIVERGED}{why}; lower "
        f"{' and '.join(keys)}, or raise optim.warmup_ratio"
    )
    if records is not None:
        text += f"; if a record is at fault: those of such steps are listed in {records}"
    return UserError(text)


def stopped(way: Way) -> str:
    """Return the message after a signal."""
    command, newest = way.command(), way.newest
    if newest is None:
        return f"stopped before the first checkpoint; {command} starts over"
    return f"stopped; {command} goes on from {newest}"


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(_MEMORY.search(str(error)))


def _out_of_memory(engine: EngineConfig, stage: str) -> str:
    ways = []
    if engine.gradient_checkpointing is not True:
        ways.append("set engine.gradient_checkpointing=true")
    if engine.type == "deepspeed" and engine.zero_stage > 0 and not engine.offload:
        ways.append("set engine.offload=true")
    if engine.workers != 0:
        ways.append("lower engine.workers or engine.prefetch")
    ways.append(f"lower stages.{stage}.batch.tokens, which needs another output_dir once the stage has a checkpoint")
    return "out of memory; " + ", or ".join(ways)

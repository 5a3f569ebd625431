"""What a run that stops in the middle says: what happened, what to set, and from where the same command goes on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.train.checkpoint import CheckpointStore, TrainState
from tinyllava_fast.train.prepare import of_stage

_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED", re.I)
_WORKER = re.compile(r"DataLoader worker \(pid.*\) (?:exited unexpectedly|is killed by signal)")


@contextmanager
def explained(store: CheckpointStore, state: TrainState, engine: EngineConfig, stage: str) -> Iterator[None]:
    """Around the work of a stage: errors name it, and say from which checkpoint the same command goes on.

    Out of memory, and a data worker that died, are UserErrors with what to set; other errors pass.
    """
    try:
        with of_stage(stage):
            yield
    except UserError as error:
        text = f"{error}{way_on(store, state, str(error))}"
        if isinstance(error, DataError) and state.step:
            text += ". No record may be removed or changed before the run has ended"
        raise type(error)(text) from error
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
        raise UserError(f"{where}{way_on(store, state)}") from error


def way_on(store: CheckpointStore, state: TrainState, said: str = "") -> str:
    """The last lines of an error in a run: where the same command, mended, goes on. Empty before the first step.

    said: the error so far, which may name the checkpoint itself.
    """
    if " is intact" in said:
        return ""
    latest = store.latest()
    if latest is None:
        return "\nNo checkpoint was saved so far: the same command starts over" if state.step else ""
    older = [str(store.folder / name) for name in store.names() if name != latest.name]
    more = f"; further back with --resume {older[-1]}" if older else ""
    return f"\nThe checkpoint {latest} is intact: the same command, with what is mended, goes on from there{more}"


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
    if engine.workers:
        ways.append("lower engine.workers or engine.prefetch")
    ways.append(f"lower stages.{stage}.batch.tokens, which needs another output_dir once the stage has a checkpoint")
    return "out of memory; " + ", or ".join(ways)

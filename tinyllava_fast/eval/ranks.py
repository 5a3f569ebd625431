"""Several processes of torchrun: each answers the questions about its share of the images into a file of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from tinyllava_fast import slurm
from tinyllava_fast.errors import LostError, UserError
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.hardware import own_gpu, torchrun_number
from tinyllava_fast.log import log

PATIENCE = timedelta(days=7)  # ranks finish hours apart
SILENCE = 300.0  # seconds after which a rank that does not run at all is lost


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without it."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """From the environment that torchrun or srun sets. UserError if it is set in part, as by another scheduler."""
        slurm.adopt()
        found = cls(*(torchrun_number(name, default) for name, default in VARIABLES))
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if found.world > 1 and missing:
            raise UserError(
                f"WORLD_SIZE is {found.world} but {missing[0]} is not set; start all processes with torchrun, or unset "
                "WORLD_SIZE to run one"
            )
        if not 0 <= found.rank < found.world:
            raise UserError(
                f"RANK is {found.rank} and WORLD_SIZE {found.world}; start with torchrun, or unset both to run alone"
            )
        return found

    def device(self, device: str) -> str:
        """ "auto" with several processes on GPUs: each its own."""
        import torch

        own = device == "auto" and self.world > 1 and torch.cuda.is_available()
        return f"cuda:{own_gpu(self.local)}" if own else device

    def share(self, questions: Sequence[Question]) -> list[Question]:
        """This rank's questions: those about one image stay together, image groups are dealt out largest first."""
        groups: dict[str, list[Question]] = {}
        for q in questions:
            groups.setdefault(q.cluster, []).append(q)
        order = sorted(groups.values(), key=lambda group: (-len(group), group[0].key))
        return [q for group in order[self.rank :: self.world] for q in group]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around the answers of all ranks: it ends when every one has come to its end. Nothing for a single process.

        LostError if one has died or does not run any more, also where torchrun then tells this one to end (SIGTERM);
        without a loss that signal ends the process with 143. What several have in common one says: SaidError in others.
        """
        if self.world == 1:
            yield
            return
        from tinyllava_fast import group

        group.join("gloo", timeout=PATIENCE, silence=SILENCE)
        with group.in_concert(), _answers_kept(), group.watched(_kept), _told_by_torchrun():
            if (command := slurm.own_command()) is not None:
                slurm.check_commands(group.gather(command))
            yield
            group.gather(None)


@contextmanager
def _answers_kept() -> Iterator[None]:
    from tinyllava_fast import group

    try:
        with group.losses_named():
            yield
    except LostError as error:
        raise LostError(_kept(str(error))) from error


def _kept(why: str) -> str:
    return f"{why}. All answers so far are kept: the same command asks the rest"


class _News(BaseException):
    """Another rank is lost. It comes up anywhere, and passes all code that takes an error for a fault of its data."""


@contextmanager
def _told_by_torchrun() -> Iterator[None]:
    """Take SIGTERM, which torchrun sends once another process has died, as the news of it."""
    from tinyllava_fast import group

    def handle(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come again while this process looks and speaks
        who = group.lost()[0]
        if who:
            raise _News(who)
        log.error("stopped; the answers so far are kept: the same command goes on with the others")
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # the caller owns the signals
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except _News as news:
        raise LostError(str(news)) from None
    finally:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, before)


VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))

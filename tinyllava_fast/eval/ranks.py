"""Several processes of torchrun: each answers the questions about its share of the images into a file of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from tinyllava_fast import slurm
from tinyllava_fast.errors import LostError, UserError
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.hardware import torchrun_number

PATIENCE = timedelta(days=7)  # ranks finish hours apart


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

        return f"cuda:{self.local}" if device == "auto" and self.world > 1 and torch.cuda.is_available() else device

    def share(self, questions: Sequence[Question]) -> list[Question]:
        """This rank's questions: those about one image stay together, image groups are dealt out largest first."""
        groups: dict[str, list[Question]] = {}
        for q in questions:
            groups.setdefault(q.cluster, []).append(q)
        order = sorted(groups.values(), key=lambda group: (-len(group), group[0].key))
        return [q for group in order[self.rank :: self.world] for q in group]

    def wait_for_all(self) -> None:
        """Return when every rank has come here. Does nothing for a single process. LostError if one has died."""
        if self.world == 1:
            return
        from tinyllava_fast import group

        try:
            with group.losses_named():
                group.join("gloo", timeout=PATIENCE)
                group.gather(None)
        except LostError as error:
            raise LostError(f"{error}. All answers so far are kept: the same command asks the rest") from error


VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))

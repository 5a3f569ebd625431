"""How evenly the processes of a run are loaded, and which of them is slow.

A process's own time of a step is all of it but what it spent in collectives, where it waits for the others: computing,
and waiting for its data. All processes end a step together, so the slowest one's own time is what the step costs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast import group
from tinyllava_fast.data.balance import idle_share
from tinyllava_fast.log import log

SLOW = 1.2  # times the median of the others
PATIENCE = 3  # lines of metrics.jsonl in a row in which a process is slow before a warning names it


class RanksEntry(TypedDict):
    """The processes over the steps of a line.

    idle_share: of their time, in which they wait for the slowest one. imbalance: own time of the slowest one over the
    mean, and slowest its rank; the slowest of one step may be another one than that of the next. own_s: mean of a step.
    """

    idle_share: float
    imbalance: float
    slowest: int
    own_s: float


class Stragglers:
    """Collects the own times of all processes, and warns of one that stays slow; every process makes one.

    rank: this process's. all_reduce_sum: the engine's. device: of its collectives.
    """

    def __init__(self, rank: int, all_reduce_sum: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._hosts = group.gather(socket.gethostname())
        self._rank, self._summed, self._device = rank, all_reduce_sum, device
        self._slow = [0] * len(self._hosts)  # lines in a row

    def settle(self, own: Sequence[float]) -> np.ndarray:
        """Return the own seconds of all processes [steps, ranks]. own: this one's of each step. Every process calls."""
        table = torch.zeros(len(own), len(self._hosts), dtype=torch.float64)
        table[:, self._rank] = torch.tensor(own, dtype=torch.float64)
        return self._summed(table.to(self._device)).cpu().numpy()

    def judge(self, seconds: np.ndarray) -> RanksEntry:
        """Return what a line says of these steps; after so many lines in a row a slow process is named, once."""
        each = seconds.mean(0)
        for rank, mine in enumerate(each):
            usual = float(np.median(np.delete(each, rank)))
            self._slow[rank] = self._slow[rank] + 1 if mine > SLOW * usual else 0
            if self._slow[rank] == PATIENCE and self._rank == 0:
                log.warning(
                    "rank %d on %s is slow: %.2f s a step for its own part, %.1f times the median of the other "
                    "processes (%.2f s), which wait for it. Is something else running there, or is its disk slow?",
                    *(rank, self._hosts[rank], mine, mine / max(usual, 1e-9), usual),
                )
        slowest, mean = int(each.argmax()), float(each.mean())
        return {
            "idle_share": idle_share(seconds),
            "imbalance": float(each[slowest]) / max(mean, 1e-9),
            "slowest": slowest,
            "own_s": mean,
        }

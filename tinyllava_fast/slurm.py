"""A process that SLURM's srun has started among others, described to torch as torchrun would describe it.

srun starts one process for each task and says in SLURM_* variables which one it is. Those of the *step* count: a batch
script, and a command in it that no srun has started, run once whatever the job has asked for.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping

from tinyllava_fast.errors import UserError

FIRST_PORT, PORTS = 20_000, 12_000  # below those that Linux hands out by itself
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def adopt(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; False where nothing is set.

    Nothing is set for one task alone, or where torchrun has set RANK. An address or a port that is there already stays,
    as a batch script may export it; else the address is that of the step's first node, the port follows from the job.
    UserError if SLURM's variables make no sense, or if scontrol, which knows the node's name, fails.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if environment.get("RANK") or tasks == "1":
        return False
    number = {name: _number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")}
    here = _number(environment, "SLURM_NODEID")
    local = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if number["SLURM_PROCID"] >= number["SLURM_STEP_NUM_TASKS"] or here >= len(local):
        raise UserError(
            f"SLURM_PROCID={number['SLURM_PROCID']} of SLURM_STEP_NUM_TASKS={tasks}, SLURM_NODEID={here} of "
            f"SLURM_STEP_TASKS_PER_NODE={environment.get('SLURM_STEP_TASKS_PER_NODE', '')!r}: these do not fit one "
            "another; start with srun, or unset SLURM_STEP_NUM_TASKS to run one process"
        )
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if len(local) == 1 else _first_node(environment))
    environment.setdefault("MASTER_PORT", str(_port(environment)))
    environment["RANK"] = str(number["SLURM_PROCID"])
    environment["WORLD_SIZE"] = str(number["SLURM_STEP_NUM_TASKS"])
    environment["LOCAL_RANK"] = str(number["SLURM_LOCALID"])
    environment["LOCAL_WORLD_SIZE"] = str(local[here])
    return True


def _number(environment: MutableMapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"environment variable {name}: expected a whole number, got {text!r}; start with srun, or unset "
            "SLURM_STEP_NUM_TASKS to run one process"
        )
    return int(text)


def _tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node.

    >>> _tasks_per_node("4(x2),3")
    [4, 4, 3]
    """
    return [int(tasks) for tasks, times in _TASKS.findall(text) for _ in range(int(times or 1))]


def _port(environment: MutableMapping[str, str]) -> int:
    """Return a port that follows from the job and its step: two on one node have different ones."""
    job, step = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return FIRST_PORT + (7 * job + step) % PORTS


def _first_node(environment: MutableMapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"SLURM has started processes on {nodes!r}, but scontrol does not say which node is the first ({error}); "
            "export MASTER_ADDR, the name or address of that node, before srun"
        ) from None

"""A process that SLURM's srun has started among others, described to torch as torchrun would describe it.

srun starts one process for each task and says in SLURM_* variables which one it is. Those of the *step* count: a batch
script, and a command in it that no srun has started, run once whatever the job has asked for. The shell of
`srun --pty` and what mpirun has started are no such process either. That all were given the same command shows
once they have met (``check_commands``).
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence

from tinyllava_fast import hardware
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log

ADOPTED = "TLF_SLURM_STEP"
"""Environment variable: the step that ``adopt`` has described, as JOB.STEP."""
ALONE = "unset SLURM_STEP_NUM_TASKS to run each process by itself"
_MPIRUN = {"OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE", "MPI_LOCALRANKID": "PMI_SIZE"}
"""Which process of mpirun it is, and where their number stands: Open MPI's, and Intel MPI's, which is MPICH's too."""
_OTHERS = ("SLURM_PTY_PORT", *_MPIRUN)  # srun --pty, whose shell is its first task; mpirun, which srun may have started
FIRST_PORT, PORTS = 20_000, 12_000  # below those that Linux hands out by itself
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def adopt(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; False where nothing is set.

    Nothing is set for one task alone, where torchrun has set RANK, in the shell of srun --pty and under mpirun. An
    address or a port that is there already stays, as a batch script may export it; else the address is that of the
    step's first node, the port follows from the job.
    UserError if SLURM's variables make no sense, or if scontrol, which knows the node's name, fails; and if mpirun has
    started several processes: it names no place where they could meet.
    """
    _refuse_mpirun(environment)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if environment.get("RANK") or tasks == "1" or any(environment.get(name) for name in _OTHERS):
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
    environment[ADOPTED] = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    if environment is os.environ and environment["RANK"] != "0":  # set up before the rank was known
        log.setLevel(max(log.level, logging.WARNING))
    log.info(
        "SLURM: process %s of the %s of step %s, which meet at %s:%s; %s",
        *(environment["RANK"], tasks, environment[ADOPTED], environment["MASTER_ADDR"], environment["MASTER_PORT"]),
        ALONE,
    )
    return True


def _refuse_mpirun(environment: Mapping[str, str]) -> None:
    for rank, size in _MPIRUN.items():
        count = environment.get(size, "1")
        if rank in environment and count != "1" and not environment.get("RANK"):
            raise UserError(
                f"mpirun has started {count} processes ({size}), whose ranks are not read; start them with srun, "
                "torchrun or tlf-train --nproc, export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
                f"MASTER_PORT in each, or unset {rank} to run each by itself"
            )


def remedy(environment: Mapping[str, str] = os.environ) -> str:
    """Return what to do where several processes are wrong; "" where SLURM has not started them."""
    return f", or, since SLURM's srun has started them, {ALONE}" if environment.get(ADOPTED) else ""


def check_commands(commands: Sequence[Sequence[str]]) -> None:
    """Raise UserError if processes were given different commands, as by `srun bash -c '... $SLURM_PROCID'`.

    commands: of every process, in the order of ranks.
    """
    for rank, command in enumerate(commands):
        if list(command) != list(commands[0]):
            raise UserError(
                f"SLURM's srun has started {len(commands)} processes with different commands: rank 0 has "
                f"{shlex.join(commands[0])!r}, rank {rank} has {shlex.join(command)!r}; give all the same to share the "
                f"work, or {ALONE}"
            )


def own_command(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the arguments of this process where srun has started it among others; else None."""
    return sys.argv[1:] if environment.get(ADOPTED) else None


def own_cores(local_size: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the CPUs for this one of so many processes of a node: those of its task, or its share of all.

    srun that is told --cpus-per-task says so to its tasks, and mostly binds each to CPUs of its own.
    """
    all_, told = hardware.cores(), environment.get("SLURM_CPUS_PER_TASK", "")
    if environment.get(ADOPTED) and told.isascii() and told.isdigit():
        return max(min(int(told), all_), 1)
    return max(all_ // local_size, 1)


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

"""What srun says becomes what torchrun would say; the batch scripts requeue a run that was asked to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tinyllava_fast import slurm
from tinyllava_fast.errors import UserError

CLUSTER = Path(__file__).parents[1] / "configs" / "cluster"
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_NTASKS": "7",
}  # fmt: skip


def stand_in(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the others, whose programs stand in for a cluster's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_task_is_described_as_by_torchrun(programs: Path) -> None:
    stand_in(programs, "scontrol", '[ "$*" = "show hostnames n[0-1]" ] && printf "n0\\nn1\\n"')
    environment = dict(STEP)
    assert slurm.adopt(environment)
    told = {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert told == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "n0",
    }  # fmt: skip
    other = dict(STEP) | {"SLURM_STEP_ID": "2", "MASTER_ADDR": "here"}
    assert slurm.adopt(other) and other["MASTER_ADDR"] == "here"
    assert 1024 < int(environment["MASTER_PORT"]) < 32768 and other["MASTER_PORT"] != environment["MASTER_PORT"]


def test_one_node_needs_no_name() -> None:
    environment = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    assert slurm.adopt(environment) and environment["MASTER_ADDR"] == "127.0.0.1"
    assert environment["LOCAL_WORLD_SIZE"] == "7"


def test_tasks_of_each_node() -> None:
    assert slurm._tasks_per_node("4(x2),3") == [4, 4, 3]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, which runs once
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "RANK": "3"},
        {**STEP, "SLURM_PTY_PORT": "40123", "SLURM_PROCID": "0"},
        {**STEP, "OMPI_COMM_WORLD_RANK": "3"},
    ],
    ids=["no cluster", "batch script", "one task", "torchrun inside", "srun --pty", "mpirun"],
)
def test_nothing_is_set_where_srun_has_not_started_several(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert not slurm.adopt(environment) and environment == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID: expected a whole number, got 'x'"),
        ({"SLURM_PROCID": "7"}, "SLURM_PROCID=7 of SLURM_STEP_NUM_TASKS=7"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2 of SLURM_STEP_TASKS_PER_NODE='4,3'"),
        ({}, "scontrol does not say which node is the first.*export MASTER_ADDR"),
    ],
    ids=["no number", "rank", "node", "no scontrol"],
)
def test_what_makes_no_sense_is_refused(programs: Path, changes: dict[str, str], said: str) -> None:
    stand_in(programs, "scontrol", "exit 1")
    with pytest.raises(UserError, match=said):
        slurm.adopt(STEP | changes)


@pytest.mark.parametrize("mpi", ["Open MPI", "Intel MPI"])
def test_processes_of_mpirun_are_refused_by_name(mpi: str) -> None:
    """Intel MPI starts its helpers by srun, one a node: their step is not what the processes are."""
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE") if mpi == "Open MPI" else ("MPI_LOCALRANKID", "PMI_SIZE")
    told = dict(zip(names, ("1", "8"), strict=True))
    with pytest.raises(UserError, match=rf"mpirun has started 8 processes \({names[1]}\).* unset {names[0]} to run"):
        slurm.adopt({**STEP, **told})
    assert not slurm.adopt({**STEP, **told, "RANK": "1"})
    alone = {**STEP, **told, names[1]: "1"}
    assert not slurm.adopt(alone) and "RANK" not in alone


def test_processes_with_different_commands_are_refused() -> None:
    slurm.check_commands([["a", "b c"], ["a", "b c"]])
    with pytest.raises(UserError, match=r"rank 0 has 'model_0', rank 1 has 'model_1'.*unset SLURM_STEP_NUM_TASKS"):
        slurm.check_commands([["model_0"], ["model_1"]])


def test_a_task_has_the_cpus_that_srun_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound to them it sees no others; dividing those again by the tasks of the node would leave most idle."""
    monkeypatch.setattr("tinyllava_fast.hardware.cores", lambda: 12)
    task = {slurm.ADOPTED: "4711.1", "SLURM_CPUS_PER_TASK": "12"}
    assert slurm.own_cores(4, task) == 12 and slurm.own_cores(4, task | {"SLURM_CPUS_PER_TASK": "5"}) == 5
    assert slurm.own_cores(4, {"SLURM_CPUS_PER_TASK": "12"}) == 3  # torchrun in a batch script
    assert slurm.own_cores(24, {}) == 1


def test_what_refuses_several_processes_names_slurm() -> None:
    assert slurm.remedy({}) == ""
    assert "unset SLURM_STEP_NUM_TASKS" in slurm.remedy({slurm.ADOPTED: "4711.1"})


@pytest.mark.parametrize("name", ["one_node", "many_nodes"])
@pytest.mark.parametrize("end", ["by itself", "early", "refused", "finished"])
def test_the_batch_script_requeues_what_was_asked_to_end(name: str, end: str, programs: Path, tmp_path: Path) -> None:
    """srun passes the signal on, as SLURM's does; the training that it runs says what it was given, and ends with 0."""
    stand_in(programs, "srun", '[ "$1 $2" = "--kill-on-bad-exit=1 --cpus-per-task=12" ] || exit 9\nshift 2\nexec "$@"')
    stand_in(programs, "scontrol", 'if [ "$1" = show ]; then printf "n0\\nn1\\n"; else echo "$@" > requeued; fi')
    stand_in(
        programs,
        "training",
        'if [ "${!#}" = --print-config ]; then echo "output_dir: run"; exit; fi\n'
        f'echo "$MASTER_ADDR $*" > began.tmp; trap "exit {2 if end == "refused" else 0}" USR1; mv began.tmp began\n'
        'if [ "$1" = wait ]; then while :; do sleep 0.02; done; fi; exit 3',
    )
    environment = {**os.environ, "TLF_TRAIN": "training", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[0-1]"}
    environment["SLURM_CPUS_PER_TASK"] = "12"
    early = end != "by itself"
    (tmp_path / "run").mkdir()
    state = "finished" if end == "finished" else "stopped"
    (tmp_path / "run" / "status.json").write_text(json.dumps({"state": state}, indent=1))
    environment.pop("MASTER_ADDR", None)
    words = ["bash", str(CLUSTER / f"{name}.sbatch"), "wait" if early else "run.yaml", "seed=1"]
    with subprocess.Popen(words, cwd=tmp_path, env=environment) as script:
        until = time.monotonic() + 60
        while not (tmp_path / "began").exists() and time.monotonic() < until:
            time.sleep(0.01)
        if early:
            script.send_signal(signal.SIGUSR1)
        assert script.wait(60) == {"by itself": 3, "refused": 2}.get(end, 0)
    first = "n0" if name == "many_nodes" else ""
    assert (tmp_path / "began").read_text() == f"{first} {words[2]} seed=1\n"
    assert (tmp_path / "requeued").exists() == (end == "early")
    if end == "early":
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"

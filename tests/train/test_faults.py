"""Several processes of a run of which one fails, is killed or is told to stop: the others end at once, in our words."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.train.processes import Ranks, fork_server
from tinyllava_fast import heartbeat
from tinyllava_fast.train.checkpoint import CheckpointStore
from tinyllava_fast.train.saving import BackgroundWriter
from tinyllava_fast.train.status import read_status

SHAPE = {
    "engine__type": "ddp",
    "stages__pretrain__max_steps": 2,
    "stages__finetune__max_steps": 4,
    "checkpoint__every_steps": 1,
    "checkpoint__keep": 9,
}
SOON = 20
"""Seconds; without a word between the processes it would be half an hour."""
SILENCE = 10
"""Seconds: engine.silence_timeout, which no process that is well reaches on a busy machine."""


@pytest.fixture(scope="module")
def server():
    return fork_server()


def limit_files(size: int) -> None:
    """While this process saves, none of its files may exceed so many bytes; afterwards coverage writes its own."""
    save = CheckpointStore.save

    def limited(store: CheckpointStore, *arguments: object) -> Path:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            return save(store, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    CheckpointStore.save = limited


def small_files() -> None:
    """A random state fits, a model does not."""
    limit_files(40_000)


def tiny_files() -> None:
    """Not even a random state fits."""
    limit_files(3000)


def no_folders() -> None:
    """The folder of the second checkpoint cannot be made here."""
    make = Path.mkdir

    def failing(path: Path, *arguments: object, **settings: object) -> None:
        if path.name == ".tmp-pretrain-00000002":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        make(path, *arguments, **settings)

    Path.mkdir = failing


FAULTS = {
    "model of rank 0": (0, small_files, "model-0.safetensors: cannot be written: File too large"),
    "model of rank 1": (1, small_files, "model-1.safetensors: cannot be written: File too large"),
    "random state of rank 1": (1, tiny_files, "rng-1.safetensors: cannot be written: File too large"),
    "folder in rank 1": (1, no_folders, ".tmp-pretrain-00000002: cannot be written: No space left on device"),
    "folder in rank 0": (0, no_folders, ".tmp-pretrain-00000002: cannot be written: No space left on device"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_save_that_fails_in_one_process_ends_all_with_one_message(server, tiny_run, tmp_path, name):
    rank, fault, reason = FAULTS[name]
    path = tiny_run(**SHAPE)
    with Ranks(server, tmp_path / "said", [str(path)], faults={rank: fault}) as ranks:
        assert ranks.wait(60) == [1, 1]
        said = ranks.lines()
    assert len(said) == 1, said
    assert f"could not be saved: rank {rank}: " in said[0] and reason in said[0]
    saved = CheckpointStore(path.parent / "run" / "checkpoints", 9).names()
    assert saved == (["pretrain-00000001"] if "folder" in name else [])
    whole = "\n".join(ranks.said(r) for r in (0, 1))
    assert not saved or f"{saved[0]} is intact: the same command, with what is mended, goes on from there" in whole
    assert not list((path.parent / "run" / "checkpoints").glob(".tmp-*"))


def limit_background() -> None:
    """While the background of this process writes, none of its files may exceed 40,000 bytes."""
    run = BackgroundWriter._run

    def limited(writer: BackgroundWriter) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        try:
            run(writer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    BackgroundWriter._run = limited


@pytest.mark.parametrize("rank", [0, 1])
def test_a_background_that_fails_in_one_process_ends_all_with_one_message(server, tiny_run, tmp_path, rank):
    path = tiny_run(**SHAPE | {"engine__type": "fsdp", "checkpoint__asynchronous": True})
    with Ranks(server, tmp_path / "said", [str(path)], faults={rank: limit_background}) as ranks:
        assert ranks.wait(60) == [1, 1]
        said = ranks.lines()
    assert len(said) == 1, said
    assert f"could not be saved: rank {rank}: " in said[0]
    assert f"model-{rank}.safetensors: cannot be written: File too large" in said[0]
    assert not list((path.parent / "run" / "checkpoints").iterdir())


def wait_for_step(run: Path, step: int) -> None:
    """Until metrics.jsonl has so many lines."""
    until = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_bytes().count(b"\n") < step:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("engine", ["ddp", "fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_the_others_name_a_process_that_was_killed(server, tiny_run, tmp_path, losses, engine, victim):
    path = tiny_run(**SHAPE | {"engine__type": engine, "stages__finetune__max_steps": 3000})
    run = path.parent / "run"
    with Ranks(server, tmp_path / "said", [str(path)]) as ranks:
        wait_for_step(run, 4)
        os.kill(ranks.processes[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        codes = ranks.wait(SOON)
        seconds = time.monotonic() - began
        survivor = 1 - victim
        assert codes[victim] == -signal.SIGKILL and codes[survivor] == 1
        assert seconds < SOON / 2
        said = ranks.said(survivor)
    assert "Traceback" not in said and len(ranks.lines()) == 1
    assert f"rank {victim} (process {ranks.processes[victim].pid}) was killed" in said
    assert "is intact: the same command goes on from there" in said


def bad_answer() -> None:
    """This process fails in its third step, alone."""
    from tinyllava_fast.errors import DataError
    from tinyllava_fast.train import loop

    take = loop.Stage._next_micro_batches

    def failing(stage: loop.Stage, *arguments: object) -> object:
        if stage.state.step == 2:
            raise DataError("records.json: record id 'r7': image 7.png: cannot be read")
        return take(stage, *arguments)

    loop.Stage._next_micro_batches = failing


def test_the_others_hear_why_one_has_ended(server, tiny_run, tmp_path):
    path = tiny_run(**SHAPE)
    with Ranks(server, tmp_path / "said", [str(path)], faults={1: bad_answer}) as ranks:
        assert ranks.wait(60) == [1, 2]
    assert "Traceback" not in ranks.said(0) + ranks.said(1)
    assert "rank 1 has ended: stages.finetune: records.json: record id 'r7': image 7.png" in ranks.said(0)


def test_a_signal_to_one_process_ends_all_within_seconds(server, tiny_run, tmp_path):
    path = tiny_run(**SHAPE | {"stages__finetune__max_steps": 3000, "checkpoint__every_steps": 1000})
    with Ranks(server, tmp_path / "said", [str(path)]) as ranks:
        wait_for_step(path.parent / "run", 4)
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
        began = time.monotonic()
        assert ranks.wait(SOON) == [143, 143]
        assert time.monotonic() - began < SOON / 2
    assert "stopped; the same command goes on from" in ranks.said(0)


def told_in_the_last_step() -> None:
    """SIGTERM reaches this process in the last step of its first stage."""
    from tinyllava_fast.train import loop

    advance = loop.Stage._advance

    def advanced(stage: loop.Stage, *arguments: object) -> None:
        advance(stage, *arguments)
        if stage.state.step == 2:
            signal.raise_signal(signal.SIGTERM)

    loop.Stage._advance = advanced


def test_a_signal_in_the_last_step_of_a_stage_ends_all_before_the_next(server, tiny_run, tmp_path):
    path = tiny_run(**SHAPE)
    with Ranks(server, tmp_path / "said", [str(path)], faults={1: told_in_the_last_step}) as ranks:
        assert ranks.wait(60) == [143, 143]
    names = CheckpointStore(path.parent / "run" / "checkpoints", 9).names()
    assert names[-1] == "pretrain-00000002" and "goes on from" in ranks.said(0)


def told_between_stages() -> None:
    """A signal reaches this process while it prepares its second stage."""
    from tinyllava_fast.train import loop

    prepare = loop.prepare_stage

    def told(run: object, index: int) -> object:
        if index == 1:
            signal.raise_signal(TOLD)
        return prepare(run, index)

    loop.prepare_stage = told


TOLD = signal.SIGUSR1


def test_a_signal_to_one_process_between_two_stages_is_the_end_of_all(server, tiny_run, tmp_path):
    path = tiny_run(**SHAPE)
    with Ranks(server, tmp_path / "said", [str(path)], faults={1: told_between_stages}) as ranks:
        assert ranks.wait(60) == [0, 0]
    assert "stopped; the same command goes on from" in ranks.said(0) and "pretrain-00000002" in ranks.said(0)
    assert read_status(str(path.parent / "run")).state == "stopped"


def test_a_signal_that_follows_a_death_is_the_news_of_it(server, tiny_run, tmp_path):
    """As torchrun sends it, to a process between two stages."""
    path = tiny_run(**SHAPE)
    with Ranks(server, tmp_path / "said", [str(path)], faults={0: killed_between_stages, 1: news}) as ranks:
        assert ranks.wait(60) == [-signal.SIGKILL, 1]
    assert f"rank 0 (process {ranks.processes[0].pid}) was killed" in ranks.said(1)


def killed_between_stages() -> None:
    """This process dies while it prepares its second stage."""
    from tinyllava_fast.train import loop

    prepare = loop.prepare_stage
    loop.prepare_stage = lambda run, index: os.kill(os.getpid(), signal.SIGKILL) if index else prepare(run, index)


def news() -> None:
    """This process, too, is then told to end."""
    from tinyllava_fast.train import loop

    prepare = loop.prepare_stage

    def told(run: object, index: int) -> object:
        if index == 1:
            time.sleep(1)
            signal.raise_signal(signal.SIGTERM)
        return prepare(run, index)

    loop.prepare_stage = told


def test_packs_that_the_processes_cannot_share_are_found_before_anything_is_read(server, tiny_run, tmp_path):
    path = tiny_run(**SHAPE | {"stages__finetune__batch__packs_per_step": 3})
    with Ranks(server, tmp_path / "said", [str(path)]) as ranks:
        assert ranks.wait(60) == [2, 2]
    (line,) = ranks.lines()
    assert "stages.pretrain.batch.packs_per_step: 3 is not a multiple of the 2 processes; try 4" in line
    assert not list((path.parent / "run").glob("*.jsonl"))


@pytest.mark.parametrize(("victim", "launcher"), [pytest.param(0, True, marks=pytest.mark.slow), (1, True), (0, False)])
def test_a_process_that_is_stopped_is_named_and_killed(server, tiny_run, tmp_path, victim, launcher):
    """Also rank 0 with the store of all in it."""
    path = tiny_run(**SHAPE | {"stages__finetune__max_steps": 3000, "engine__silence_timeout": SILENCE})
    run = path.parent / "run"
    with Ranks(server, tmp_path / "said", [str(path)], launcher=launcher) as ranks:
        wait_for_step(run, 4)
        os.kill(ranks.processes[victim].pid, signal.SIGSTOP)
        codes = ranks.wait(2 * SOON)
        survivor = 1 - victim
        assert codes[victim] == -signal.SIGKILL and codes[survivor] == 1
        (said,) = ranks.lines()
        whole = ranks.said(survivor)
    assert f"rank {victim} (process {ranks.processes[victim].pid}) is stopped: it has not run for {SILENCE} s" in said
    assert "is intact: the same command goes on from there" in whole
    if survivor == 0:
        assert "is stopped: it has not run" in read_status(str(run)).why


def hanging() -> None:
    """This process never takes its third step."""
    from tinyllava_fast.train import loop

    brief_patience()
    take = loop.Stage._next_micro_batches

    def waiting_for_ever(stage: loop.Stage, *arguments: object) -> object:
        if stage.state.step == 2 and stage.state.stage_step:
            time.sleep(1000)
        return take(stage, *arguments)

    loop.Stage._next_micro_batches = waiting_for_ever


def brief_patience() -> None:
    """A process that hangs is named after a third of the silence that is allowed."""
    heartbeat.LATE = 0.3


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_runs_but_hangs_is_named_with_the_place(server, tiny_run, tmp_path, victim):
    path = tiny_run(**SHAPE | {"stages__pretrain__max_steps": 4, "engine__silence_timeout": SILENCE})
    faults = {victim: hanging, 1 - victim: brief_patience}
    with Ranks(server, tmp_path / "said", [str(path)], faults=faults) as ranks:
        codes = ranks.wait(60)
        assert codes[1 - victim] == 1 and codes[victim] in (1, -signal.SIGKILL)
        survivor, hung = ranks.said(1 - victim), ranks.said(victim)
    process = f"rank {victim} (process {ranks.processes[victim].pid})"
    assert f"{process} hangs: it runs, but has not come for 3 s" in survivor
    assert "pretrain-00000002 is intact: the same command goes on from there" in survivor
    assert f"rank {victim} hangs here:" in hung and "waiting_for_ever" in hung and "Traceback" not in survivor + hung


@pytest.mark.slow
def test_what_takes_long_is_no_silence(server, tiny_run, tmp_path):
    """Rank 1 computes for longer than the timeout before its third step."""
    path = tiny_run(**SHAPE | {"engine__silence_timeout": SILENCE})
    with Ranks(server, tmp_path / "said", [str(path)], faults={1: long_step}) as ranks:
        assert ranks.wait(60) == [0, 0], ranks.said(0)
    assert not ranks.lines()


def long_step() -> None:
    """This process takes longer than the timeout for its third step, most of it in Python."""
    from tinyllava_fast.train import loop

    take = loop.Stage._next_micro_batches

    def slow(stage: loop.Stage, *arguments: object) -> object:
        if stage.state.step == 2:
            until = time.monotonic() + SILENCE + 1
            while time.monotonic() < until:
                pass
            time.sleep(1)
        return take(stage, *arguments)

    loop.Stage._next_micro_batches = slow

"""Checkpoints written in the background: what they hold, what a failure or a kill leaves, and when they count."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.train.processes import Ranks, fork_server
from tests.train.test_checkpoint import FakeEngine, no_space, state
from tests.train.test_resume import back_to
from tests.train.test_validation import validations
from tinyllava_fast.errors import CheckpointError, DataError
from tinyllava_fast.train import cli, loop, saving, tensor_writer
from tinyllava_fast.train.checkpoint import CheckpointStore, damage
from tinyllava_fast.train.checksums import Checksums
from tinyllava_fast.train.engine.base import dealt

BEHIND = "checkpoint.asynchronous=true"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No file of the background is written before the event is set."""
    opened, write = threading.Event(), saving.write_files

    def waiting(folder: Path, files: list[saving.File]) -> dict[str, object]:
        if threading.current_thread() is not threading.main_thread():
            opened.wait(30)
        return write(folder, files)

    monkeypatch.setattr(saving, "write_files", waiting)
    yield opened
    opened.set()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_it_holds_the_state_of_its_instant_and_is_nothing_until_it_is_published(store, gate) -> None:
    engine, held = FakeEngine(), state(2)
    before = store.save(state(1), engine)
    twin = contents(CheckpointStore(store.folder.with_name("twin"), 2).save(held, engine))
    store.begin(held, engine)
    engine.weight.mul_(3)  # training goes on in place
    held.step = held.stage_step = 3
    assert store.busy and store.names() == [before.name] and store.latest() == before
    gate.set()
    path = store.publish()
    assert path.name == "finetune-00000002" and store.latest() == path and not store.busy
    assert contents(path) == twin and damage(path) == ""
    store.begin(state(3), engine)  # into the same memory
    assert store.names() == [before.name, path.name]
    third = store.publish()
    assert store.names() == [path.name, third.name] and contents(path) == twin
    store.save(state(4), engine)
    names = ("model.safetensors", "optimizer.safetensors")
    assert all((third / n).read_bytes() == (store.latest() / n).read_bytes() for n in names)


def test_a_full_disk_in_the_background_is_told_when_it_is_published(store, monkeypatch) -> None:
    path = store.save(state(1), FakeEngine())
    with monkeypatch.context() as patch:
        patch.setattr(tensor_writer, "_bytes_of", no_space)
        store.begin(state(2), FakeEngine())
        with pytest.raises(CheckpointError, match=r"00000002: could not be saved: .*No space left.*; free some space"):
            store.publish()
    assert store.names() == [path.name] and store.latest() == path and store.pending is None
    assert not list(store.folder.glob(".tmp-*"))


def test_any_other_failure_of_the_thread_is_told_too(store, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(tensor_writer, "_bytes_of", broken)
    store.begin(state(2), FakeEngine())
    with pytest.raises(CheckpointError, match=r"could not be saved: MemoryError: no room"):
        store.publish()


def test_what_is_given_up_leaves_nothing(store, gate) -> None:
    store.begin(state(1), FakeEngine())
    threading.Timer(0.05, gate.set).start()
    store.abandon()
    assert store.pending is None and not list(store.folder.iterdir())


def test_tensors_are_dealt_by_bytes_each_to_one_process() -> None:
    sizes = [5, 1, 1, 1, 4, 4, 0, 8]
    items = [saving.LazyTensor.of(str(i), torch.zeros(n)) for i, n in enumerate(sizes)]
    shares = [[i.mine for i in dealt(items, rank, 3)] for rank in range(3)]
    assert [sum(owners) for owners in zip(*shares, strict=True)] == [1] * len(sizes)
    assert [sum(n for n, mine in zip(sizes, share, strict=True) if mine) for share in shares] == [8, 8, 8]


SLOW_S = 0.15
WRITE = saving.write_files


def write_slowly(folder: Path, files: list[saving.File]) -> Checksums:
    """The background takes longer than a step of the tests."""
    if threading.current_thread() is not threading.main_thread():
        time.sleep(SLOW_S)
    return WRITE(folder, files)


def slow_disk() -> None:
    saving.write_files = write_slowly


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "write_files", write_slowly)


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """in_step(n, do): ``do`` is called in step n of the run."""

    def plan(step: int, do: Callable[[], None]) -> None:
        advance = loop.Stage._advance

        def stepping(stage: loop.Stage, *arguments: object) -> None:
            advance(stage, *arguments)
            if stage.state.step == step:
                do()

        monkeypatch.setattr(loop.Stage, "_advance", stepping)

    return plan


def assert_same_weights(run: Path, whole: Path) -> None:
    """The models at the end, and the states of the last checkpoint, have the same bytes."""
    names = ("final/model.safetensors", "checkpoints/finetune-00000012/optimizer.safetensors")
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_a_run_saved_in_the_background_and_its_resumption_are_the_same_run(tiny_run, losses, slow, caplog) -> None:
    validation = {"share": 0.3, "every_steps": 2, "keep": "best"}
    path = tiny_run(stages__finetune__validation=validation, checkpoint={"every_steps": 2, "keep": 9})
    whole, run = path.parent / "whole", path.parent / "run"
    assert cli.main([str(path), f"output_dir={whole}"]) == 0
    assert cli.main([str(path), BEHIND]) == 0
    assert "beside the steps, which waited" in caplog.text
    assert losses(run) == losses(whole) and validations(run) == validations(whole)
    assert_same_weights(run, whole)
    assert (run / "best").is_dir() and sorted(os.listdir(run / "best")) == sorted(os.listdir(whole / "best"))
    assert CheckpointStore(run / "checkpoints", 9).names() == CheckpointStore(whole / "checkpoints", 9).names()
    back_to(run, "finetune-00000006")
    assert cli.main([str(path), BEHIND]) == 0
    assert losses(run) == losses(whole)
    assert_same_weights(run, whole)


def test_a_signal_with_a_pending_save_keeps_both_checkpoints(tiny_run, losses, slow, in_step) -> None:
    path = tiny_run(checkpoint={"every_steps": 3, "keep": 9})
    whole, run = path.parent / "whole", path.parent / "run"
    assert cli.main([str(path), f"output_dir={whole}"]) == 0
    in_step(8, lambda: signal.raise_signal(signal.SIGTERM))  # step 7 is being written
    assert cli.main([str(path), BEHIND]) == 143
    names = CheckpointStore(run / "checkpoints", 9).names()
    assert names[-2:] == ["finetune-00000007", "finetune-00000008"]
    assert all(damage(run / "checkpoints" / name) == "" for name in names)
    assert cli.main([str(path), BEHIND]) == 0
    assert losses(run) == losses(whole)


def test_an_error_with_a_pending_save_names_that_checkpoint(tiny_run, slow, in_step, caplog) -> None:
    def fail() -> None:
        raise DataError("records.json: record id 'r7': cannot be read")

    path = tiny_run()
    in_step(8, fail)
    assert cli.main([str(path), BEHIND]) == 2
    assert "finetune-00000007 is intact: the same command, with what is mended, goes on" in caplog.text
    assert not list((path.parent / "run" / "checkpoints").glob(".tmp-*"))


@pytest.fixture(scope="module")
def server():
    return fork_server()


def very_slow_disk() -> None:
    """The background begins to write after seconds."""

    def waiting(folder: Path, files: list[saving.File]) -> Checksums:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(4)
        return WRITE(folder, files)

    saving.write_files = waiting


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_while_the_background_writes_leaves_the_checkpoint_before(
    server, tiny_run, tmp_path, losses, victim
) -> None:
    """fsdp in two processes, one of whose disks is slow; started again, the run ends as if nothing had happened."""
    path = tiny_run(engine__type="fsdp", checkpoint={"every_steps": 3, "keep": 9, "asynchronous": True})
    whole, run = path.parent / "whole", path.parent / "run"
    with Ranks(server, tmp_path / "whole-said", [str(path), f"output_dir={whole}"]) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    pending = run / "checkpoints" / ".tmp-pretrain-00000003"
    with Ranks(server, tmp_path / "said", [str(path)], faults={1 - victim: very_slow_disk}) as ranks:
        until = time.monotonic() + 60
        while not (pending / f"optimizer-{victim}.safetensors").is_file() and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(ranks.processes[victim].pid, signal.SIGKILL)
        codes = ranks.wait(20)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in (1, -signal.SIGKILL)
    assert CheckpointStore(run / "checkpoints", 9).names() == []
    with Ranks(server, tmp_path / "again", [str(path)], faults={0: slow_disk, 1: slow_disk}) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    assert losses(run) == losses(whole)
    assert not list((run / "checkpoints").glob(".tmp-*"))

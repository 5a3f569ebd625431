"""A cross-section of the matrix of engines, and a run that wanders between them: samples and losses of one process."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.train.matrix import ENGINES, TOLERANCE, Matrix
from tests.train.notes import Notes, take_note
from tests.train.processes import Ranks, fork_server
from tests.train.soak import losses


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("fsdp", 4), ("zero1", 2)])
def test_an_engine_trains_as_one_process(tmp_path, engine, processes):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    recipes = ["partial", "LoRA"]
    matrix = Matrix(tmp_path, 4, recipes)
    matrix.reference([2 * processes])
    found = matrix.difference(engine, processes, [2])
    assert list(found) == recipes and max(found.values()) < TOLERANCE, found


def note_and_stop(folder: Path, step: int) -> None:
    """This process notes its samples and asks, in a step, that all save and end."""
    from tinyllava_fast.train import loop

    take_note(folder)
    take = loop.Stage._next_micro_batches

    def stopping(stage: loop.Stage, *arguments: object) -> object:
        if stage.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(stage, *arguments)

    loop.Stage._next_micro_batches = stopping


@pytest.mark.slow
def test_a_run_goes_on_under_other_engines_and_numbers_of_processes(tiny_run, tmp_path):
    pytest.importorskip("deepspeed")
    packs = {f"stages__{stage}__batch__packs_per_step": 12 for stage in ("pretrain", "finetune")}
    path = tiny_run(**packs, loggers=[], checkpoint__every_steps=0)
    server, run, whole = fork_server(), path.parent / "run", path.parent / "whole"

    def train(name: str, changes: list[str], count: int, until: int) -> dict[int, list[str]]:
        notes = tmp_path / "notes" / name
        work = partial(note_and_stop, notes, until)
        with Ranks(server, tmp_path / "said", [str(path), *changes], count, dict.fromkeys(range(count), work)) as ranks:
            assert ranks.wait() == [143 if until < 12 else 0] * count, ranks.said(0)
        return Notes(notes).packs(count)

    expected = train("whole", [f"output_dir={whole}"], 1, 99)
    found: dict[int, list[str]] = {}
    for engine, count, until in (("fsdp", 4, 3), ("zero2", 2, 6), ("torch", 1, 9), ("ddp", 3, 99)):
        found |= train(engine, ENGINES.get(engine, []), count, until)
        assert len(losses(run)) == min(until, 12)
    assert found == expected
    assert losses(run) == pytest.approx(losses(whole), abs=TOLERANCE)

"""A stage gets ready in named steps; a mistake in any of them leaves the run folder as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.engine.launch import start_process
from tinyllava_fast.train.run import Run
from tinyllava_fast.train.stage import prepare_stage


def started(path: Path, *overrides: str) -> Run:
    config = load_run(path, overrides)
    run = Run(config, start_process(config.engine))
    run.start("auto")
    return run


def test_a_ready_stage_stands_before_its_first_step(tiny_run: Callable[..., Path]) -> None:
    run = started(tiny_run())
    ready = prepare_stage(run, 0)
    assert (run.state.stage, run.state.stage_index, run.state.stage_step, run.state.stage_steps) == (
        "pretrain",
        0,
        0,
        4,
    )
    assert run.outlooks is not None and [o.steps for o in run.outlooks] == [0, 8], "the later stage was looked at"
    assert set(ready.peak_lrs) == {"connector", "connector.no_decay"} and ready.micro_batches == 2
    assert ready.loader.steps == 4 and ready.flops > 0 and ready.report["supervised_tokens"] > 0
    assert ready.compiled is ready.features is ready.profiler is None
    trains = {name for name, p in ready.model.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith("connector.") for name in trains)
    run.close()


def test_a_stage_that_has_become_shorter_is_refused(tiny_run: Callable[..., Path]) -> None:
    run = started(tiny_run())
    run.state.stage, run.state.stage_step = "pretrain", 3
    run.config = load_run(tiny_run(), ["stages.pretrain.max_steps=2"])
    with pytest.raises(UserError, match=r"stages\.pretrain: max_steps or epochs give 2 steps, but 3 are done"):
        prepare_stage(run, 0)
    run.close()

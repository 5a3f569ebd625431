"""--dry-run: what it says, what it refuses, and that nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.pictures import UPRIGHT
from tinyllava_fast.models.build import build_model
from tinyllava_fast.train import cli
from tinyllava_fast.train.answers import open_answering
from tinyllava_fast.train.loop import start
from tinyllava_fast.train.prepare import average_flops, build_loader, validation_loader
from tinyllava_fast.train.run import Run
from tinyllava_fast.train.standing import interval
from tinyllava_fast.train.validation import cost_of

TinyRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def test_it_tells_what_a_run_would_do_and_leaves_nothing(tiny_run: TinyRun, capsys: Any) -> None:
    path = tiny_run(
        stages__finetune__validation={"share": 0.3, "every_steps": 3},
        stages__finetune__recipe={
            "llm": {"tune": "lora", "layer_decay": 0.5, "lora": {"r": 2, "b_lr_ratio": 16}},
            "vision": {"tune": "full", "lr": 1e-3},
        },
        records=60,
    )
    before = sorted(path.parent.rglob("*"))
    assert cli.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(path.parent.rglob("*")) == before
    for text in (
        f"starts in {path.parent / 'run'}",
        "stage pretrain",
        "data: 60 samples",
        "steps: 4 of 2 packs",
        "learning rate: cosine, 1 steps of warm-up: 0.003 at step 1",
        "stage finetune",
        "vision has its own peak, 0.001",
        "llm by layer, 0.5 times from each to the one below: "
        "embedding 0.00038, first layer 0.00075, last layer 0.0015, above it 0.003",
        "llm: B of its adapters has 16 times the rate of A, at most 0.048",
        "every 3 steps and at the end",
        "fits this machine",
        "nothing was trained and nothing was written",
    ):
        assert text in said, text
    assert cli.main([str(path)]) == 0
    summary = json.loads((path.parent / "run" / "summary.json").read_text())
    assert f"data: {summary['data']['finetune']['records']} samples" in said
    assert cli.main([str(path), "--dry-run"]) == 0
    assert "goes on from" in capsys.readouterr().out


def test_it_refuses_what_a_run_would_refuse(tiny_run: TinyRun, caplog: Any) -> None:
    path = tiny_run()
    for override, message in (
        ("stages.finetune.data.records=nowhere.json", "cannot read the records"),
        ("stages.finetune.recipe.vision.lora.r=4", "would ignore it"),
        ("stages.finetune.batch.tokens=8", "tokens exceed"),
        ("loggers=[nothing]", "unknown logger"),
    ):
        assert cli.main([str(path), "--dry-run", override]) == 2
        assert message in caplog.text
    assert not (path.parent / "run").exists()
    assert cli.main([str(path)]) == 0
    assert cli.main([str(path), "--dry-run", "seed=3"]) == 2
    assert "was trained with another configuration" in caplog.text


def test_a_model_that_is_too_large_is_said_to_be(tiny_run: TinyRun, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tinyllava_fast.hardware.available_memory_bytes", lambda: 2**19)
    assert cli.main([str(tiny_run()), "--dry-run", "checkpoint.asynchronous=true"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT this machine: 0 MiB are free; lower stages.finetune.batch.tokens" in said
    assert ", the copy of a checkpoint " in said


def test_the_interval_of_validations_is_that_of_the_run(tiny_run: TinyRun, capsys: Any) -> None:
    """The answers to the samples count: they cost more than the loss here."""
    path = tiny_run(
        stages__finetune__validation={"share": 0.3, "samples": 4, "max_packs": 1, "max_new_tokens": 8},
        stages__finetune__max_steps=300,
        records=60,
    )
    config = load_run(path)
    assert cli.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    ready = Run(config, start(config))
    ready.start("never")
    ready.state.stage_index = 1
    model = build_model(config.model, seed=0)
    train_loader = build_loader(ready, config.stages[1], model, UPRIGHT)
    held = validation_loader(ready, config.stages[1], model, UPRIGHT)
    flops = average_flops(model, config.stages[1], train_loader)
    asked = open_answering(config, config.stages[1], held.dataset.data, ready.tokenizer, ready.processor)
    with_answers, without = (cost_of(model, config.stages[1], held, one, flops) for one in (asked, None))
    every = interval(config.stages[1].validation, 300, with_answers)
    assert 0 < every != interval(config.stages[1].validation, 300, without)
    assert f"4 of them answered, every {every:,} steps and at the end" in said
    ready.close()

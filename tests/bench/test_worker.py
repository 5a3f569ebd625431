"""The process of one side: what it says through its pipes, and how it ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from tinyllava_fast.bench import train, worker
from tinyllava_fast.bench.settings import TrainSettings
from tinyllava_fast.log import log

pytest.importorskip("easy_vqa")
SETTINGS = TrainSettings(rounds=1, warmup=1, samples=2, peers=("float32",), quick=True)


def test_a_worker_says_what_is_wrong_and_exits_with_2(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "prepare_memory", lambda: None)
    path = train.compose(config, ["stages.finetune.data.template=no_such_template"], tmp_path, SETTINGS)
    log.addHandler(caplog.handler)
    try:
        assert worker.main(["ours", str(path), "--per-step", "2", "--precision", "bf16"], io.StringIO()) == 2
    finally:
        log.removeHandler(caplog.handler)
    assert "no_such_template" in caplog.text


def test_a_worker_ends_quietly_when_its_parent_has_gone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = train.compose(config, [], tmp_path, SETTINGS)
    prepared: list[bool] = []
    monkeypatch.setattr(worker, "prepare_memory", lambda: prepared.append(True))
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"steps": 1}\n'))
    answers = io.StringIO()
    assert worker.main(["ours", str(path), "--per-step", "2", "--precision", "bf16"], answers) == 0
    assert prepared  # ours runs with tlf-train's memory settings
    ready, step = map(json.loads, answers.getvalue().splitlines())
    assert ready["ready"]["flops"]["decoder"] > 0 and len(step["losses"]) == 1

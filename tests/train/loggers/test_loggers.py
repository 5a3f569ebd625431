"""Loggers, each with its real package where that is installed; nothing leaves the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import prepare
from tinyllava_fast.errors import UserError
from tinyllava_fast.train import cli
from tinyllava_fast.train.loggers._markdown import table
from tinyllava_fast.train.loggers.base import LOGGERS, Logged

VALIDATION = {"share": 0.3, "every_steps": 4, "samples": 2, "max_new_tokens": 4}


def test_each_file_is_a_logger() -> None:
    assert LOGGERS.names() == ["tensorboard", "trackio", "wandb"]


def test_whatever_is_answered_stays_text() -> None:
    row = {"question": "a|b", "truth": "<b>", "image": "", "now": "x\ny | z", "before": "&"}
    assert table([row]).splitlines()[-1] == "| 0 | a\\|b | x y \\| z | &amp; | &lt;b&gt; |"  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_a_sentence_before_anything_is_read(
    tmp_path: Path, name: str, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    path = prepare(tmp_path, loggers=[name])
    assert cli.main([str(path)]) == 2
    assert f"loggers: {name} needs {name}, which does not import" in caplog.text
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger(tmp_path: Path, caplog: Any) -> None:
    assert cli.main([str(prepare(tmp_path, loggers=["tensorbord"]))]) == 2
    assert "loggers: unknown logger 'tensorbord'; did you mean 'tensorboard'?" in caplog.text


def run_in_a_process(path: Path, **variables: str) -> None:
    """Train in a process of its own: these packages keep threads and files open for as long as it lives."""
    import os

    command = [sys.executable, "-m", "tinyllava_fast.train.cli", str(path)]
    subprocess.run(command, check=True, env=os.environ | variables, timeout=300)


@pytest.fixture
def logged(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: prepare(tmp_path, loggers=[name], stages__finetune__validation=VALIDATION)


def test_weights_and_biases_offline(logged: Callable[[str], Path], monkeypatch: Any) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    path = logged("wandb")
    run = path.parent / "run"
    run_in_a_process(path, WANDB_MODE="offline", WANDB_SILENT="true")
    (folder,) = (run / "wandb").glob("offline-run-*")
    name = (run / "wandb-id").read_text().strip()
    assert folder.name.endswith(name)
    stored = (folder / f"run-{name}.wandb").read_bytes()
    assert b"finetune/train/loss" in stored and b"finetune/validation/loss" in stored
    assert list((folder / "files" / "media" / "table").rglob("*.table.json"))
    run_in_a_process(path, WANDB_MODE="offline", WANDB_SILENT="true")  # resumed at its end, by the same name
    assert (run / "wandb-id").read_text().strip() == name


def test_trackio(logged: Callable[[str], Path]) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    import sqlite3

    path = logged("trackio")
    run_in_a_process(path, HF_HUB_OFFLINE="1")
    (database,) = (path.parent / "run" / "trackio").glob("*.db")
    with sqlite3.connect(database) as found:
        rows = [json.loads(row[0]) for row in found.execute("select metrics from metrics order by step")]
    assert any("finetune/train/loss" in row for row in rows) and any("finetune/validation/loss" in row for row in rows)


def test_weights_and_biases_that_cannot_begin_are_a_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    """By the real package: a mode that it does not know."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(UserError, match=r"loggers: wandb: its run could not begin: .*Set WANDB_MODE=offline"):
        LOGGERS.get("wandb")(Logged(tmp_path, {}))

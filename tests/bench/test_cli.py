"""The command: what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli, machine, train
from tinyllava_fast.bench.settings import SMOLLM2, TrainSettings


def test_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "m.json"
    assert cli.main(["machine", "--quick", "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert set(report["gemm"]) == {"float32", "bfloat16"}
    assert all(g["flops_per_s"] > 0 for g in report["gemm"].values())
    assert report["copy_bytes_per_s"] > 0 and report["cores"] >= 1 and report["torch"]
    assert "GEMM bfloat16" in capsys.readouterr().out


def test_ops(tmp_path: Path) -> None:
    target = tmp_path / "o.json"
    assert cli.main(["ops", "--op", "pack_plan", "--quick", "--rounds", "1", "--json", str(target)]) == 0
    assert [r["op"] for r in json.loads(target.read_text())["rows"]] == ["pack_plan"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ops", "--op", "nothing", "--quick"], "--op 'nothing'"),
        (["train", "--rounds", "0"], "--rounds 0"),
        (["train", "--peer", "fp8"], "--peer 'fp8'"),
        (["train", "--peer", "bf16", "--peer", "bf16"], "name each peer once"),
        (["train", "--config", "no/such.yaml"], "no such config file"),
        (["train", "model.lm.path=x"], "unknown key"),
        (["machine", "--quick", "--json", "/dev/null/x.json"], "cannot write"),
    ],
)
def test_user_mistakes_exit_with_2(arguments: list[str], said: str, caplog: pytest.LogCaptureFixture) -> None:
    from tinyllava_fast.log import log

    log.addHandler(caplog.handler)
    try:
        assert cli.main(arguments) == 2
    finally:
        log.removeHandler(caplog.handler)
    assert said in caplog.text


def test_train_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def fake(config: Path, overrides: list[str], settings: TrainSettings) -> dict[str, object]:
        seen.update(config=config, overrides=overrides, settings=settings)
        return {}

    monkeypatch.setattr(train, "benchmark", fake)
    monkeypatch.setattr(train, "show", lambda result: None)
    assert cli.main(["train", "--compile", "--rounds", "3", "engine.threads=2"]) == 0
    assert seen["config"] == SMOLLM2 and SMOLLM2.is_file()
    assert seen["overrides"] == ["engine.threads=2", "engine.compile=true"]
    assert seen["settings"] == TrainSettings(rounds=3)


def test_a_termination_signal_unwinds(monkeypatch: pytest.MonkeyPatch) -> None:
    unwound: list[bool] = []

    def killed(*_: object, **__: object) -> dict[str, object]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # the handler runs before this returns
        finally:
            unwound.append(True)
        raise AssertionError("unreachable")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(machine, "measure", killed)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["machine"])
    assert stopped.value.code == 143 and unwound and signal.getsignal(signal.SIGTERM) == before

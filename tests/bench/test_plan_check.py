"""The plan against measurement: collectives and packs of the worker, and the command on a tiny model."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from tinyllava_fast.bench import cli, cluster, plan_check, plan_worker
from tinyllava_fast.bench.settings import PlanCheckSettings
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.lmm import LMM


def test_a_made_up_pack_trains(lmm: LMM) -> None:
    pack = plan_worker.synthetic_pack(lmm, (20, 31, 9), seed=1)
    assert pack.num_samples == len(pack.pixel_values) == 3 and pack.num_tokens == 60
    loss = lmm(**pack.tensors())
    (loss / pack.num_supervised).backward()
    assert torch.isfinite(loss) and pack.num_supervised == 12
    again = plan_worker.synthetic_pack(lmm, (20, 31, 9), seed=1)
    assert torch.equal(pack.input_ids, again.input_ids) and torch.equal(pack.pixel_values, again.pixel_values)


def test_what_a_process_says_goes_to_the_user() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.send("ValueError: no such link")
    with pytest.raises(UserError, match="process 1: ValueError: no such link"):
        plan_check._answer(ours, 1)
    theirs.close()
    with pytest.raises(UserError, match="process 1: it was killed"):
        plan_check._answer(ours, 1)


@pytest.mark.parametrize("name", ["plan_check_2core_zen5", "plan_check_network_2core_zen5"])
def test_the_plan_holds_where_it_was_measured(name: str) -> None:
    """bench/results: what is planned now is what the file says, and near the memory and bytes that were measured."""
    file = cluster.HERE / "results" / f"{name}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    again = plan_check.planned_again(file)
    assert again["constants"] == result["constants"]
    for row, new in zip(result["rows"], again["rows"], strict=True):
        measured, told = new["measured"], new["predicted"]
        assert measured == row["measured"] and told["step_s"] == pytest.approx(row["predicted"]["step_s"])
        assert told["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.17), row["engine"]
        if row["mbit"]:
            assert told["wire_bytes"] == pytest.approx(measured["wire_bytes"], rel=0.02), row["engine"]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match=r"other\.json: not a report of `tlf-bench plan-check --json`"):
        plan_check.benchmark(PlanCheckSettings(source=tmp_path / "other.json"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"processes": (1,)}, "--processes 1: at least 2"),
        ({"network": (0,)}, "--network 0: at least 1"),
        ({"engines": ("dpp",)}, "--engine 'dpp'; did you mean 'ddp'"),
    ],
    ids=["processes", "network", "engine"],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, tuple[object, ...]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PlanCheckSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "check.json"
    assert cli.main(["plan-check", "--quick", "--engine", "ddp", "--engine", "fsdp", "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert [row["engine"] for row in report["rows"]] == ["ddp", "fsdp"]
    assert all(row["measured"]["step_s"] > 0 and row["measured"]["peak_bytes"] > 2**27 for row in report["rows"])
    assert cluster.measured_cpu(report).slowdown is not None
    assert "The plan is off by at most" in capsys.readouterr().out

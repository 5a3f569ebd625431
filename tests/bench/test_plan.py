"""The plan: what each engine keeps and sends, what bounds it, and how mistakes are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyllava_fast.bench import cli, cluster, plan
from tinyllava_fast.bench.settings import PlanSettings
from tinyllava_fast.errors import UserError


@pytest.fixture(scope="module")
def work() -> plan.Work:
    return plan.work_of(PlanSettings(llm="smollm2_135m", vision="siglip_b16_224", tokens=2048))


def row(
    work: plan.Work, name: str, count: int = 8, packs: int = 1, gpu: str = "h100", **changes: Any
) -> dict[str, Any]:
    engine = dataclasses.replace(plan.ENGINES[name], **changes)
    return plan.predict(work, cluster.read_device(gpu), engine, count, packs)


def test_shapes_are_those_that_are_published() -> None:
    """Parameters as the models' pages on the Hub count them, in millions, without what a tower drops."""
    known = {"smollm2_135m": 134.5, "qwen2_0_5b": 494.0, "tinyllama_1_1b": 1100.0, "phi_2": 2779.7, "gemma_2b": 2506.2}
    known |= {"qwen2_5_3b": 3085.9, "qwen1_5_0_5b": 464.0, "stablelm_2_1_6b": 1644.5, "smollm2_360m": 361.8}
    known["qwen2_5_0_5b"] = known["qwen2_0_5b"]
    assert set(known) == set(cluster.table()["llm"])
    for name, millions in known.items():
        found = plan.work_of(PlanSettings(llm=name, vision="siglip_b16_224")).skeleton.llm
        assert sum(p.numel() for p in found.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3), name


def test_what_engines_send(work: plan.Work) -> None:
    """Of 8 processes: float32 gradients, bfloat16 weights; what is sharded travels for every pack."""
    learnt, weights = work.learnt, sum(p.numel() for p in work.skeleton.parameters())
    seven = 7 / 8
    assert row(work, "ddp")["wire_bytes"] == pytest.approx(2 * seven * 4 * learnt)
    assert row(work, "ddp", packs=3)["wire_bytes"] == row(work, "ddp")["wire_bytes"]
    assert row(work, "zero1")["wire_bytes"] == pytest.approx(seven * (8 + 2) * learnt)
    assert row(work, "zero2", packs=2)["wire_bytes"] == pytest.approx(seven * (2 * 8 + 2) * learnt)
    forward, reduced = seven * 2 * weights, seven * 4 * learnt
    for name in ("fsdp", "zero3"):
        once = row(work, name)["wire_bytes"]
        assert forward + reduced < once < 2 * forward + reduced
        assert row(work, name, packs=2)["wire_bytes"] == pytest.approx(2 * once, rel=1e-6)


def test_memory_follows_what_is_shared(work: plan.Work) -> None:
    learnt = work.learnt
    assert row(work, "ddp")["memory"]["masters and moments"] == 12 * learnt
    assert row(work, "zero2")["memory"]["masters and moments"] == 12 * learnt // 8
    assert row(work, "zero2", offload=True)["memory"]["masters and moments"] == 0
    assert row(work, "fsdp")["memory"]["weights"] == row(work, "ddp")["memory"]["weights"] // 8
    plain, again = row(work, "fsdp"), row(work, "fsdp", gradient_checkpointing=True)
    assert again["need"] < plain["need"] and again["step_s"] > plain["step_s"]


def test_a_step_is_the_sum_of_its_causes_and_one_bounds_it(work: plan.Work) -> None:
    for name in plan.ENGINES:
        for gpu in ("h100", "rtx4090", "cpu"):
            found = row(work, name, 1 if name == "torch" else 64, gpu=gpu)
            assert found["step_s"] == pytest.approx(sum(found["seconds"].values()))
            assert 0 < found["efficiency"] <= 1 and found["mfu"] < 1
            assert found["bound"] in (*found["seconds"], "memory")
    assert row(work, "ddp", 64, gpu="rtx4090")["bound"] == "links"
    assert row(work, "fsdp", 1024)["bound"] == "latency"


def test_links_matter_less_with_more_packs(work: plan.Work) -> None:
    few, many = (row(work, "ddp", 64, packs)["efficiency"] for packs in (1, 8))
    assert many > few


def test_the_simplest_of_the_fastest_is_taken() -> None:
    rows = [{"fits": fits, "step_s": s} for fits, s in ((False, 1.0), (True, 2.05), (True, 2.0), (True, 3.0))]
    assert plan.best(rows) == 1
    assert plan.best([rows[0]]) is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    words = ["plan", "--gpus", "64", "--llm", "smollm2_135m", "--recipe", "pretrain", "--plot", str(tmp_path)]
    assert cli.main([*words, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert {r["engine"] for r in report["rows"]} == set(plan.ENGINES) - {"torch"}
    assert {r["gpus"] for r in report["curve"]} == {2**power for power in range(11)}
    said = capsys.readouterr().out
    assert "PREDICTED, nothing ran" in said and "Take engine.type=" in said and "no GPU has run this" in said
    with Image.open(tmp_path / "plan.png") as image:
        assert min(image.size) > 400


def test_one_device_runs_plain_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpus", "1", "--gpu", "rtx4090", "--llm", "phi_2"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "ddp" not in said and "engine.offload=true" in said
    assert cli.main(["plan", "--gpus", "1", "--gpu", "rtx4090", "--llm", "phi_2", "--engine", "torch"]) == 0
    assert "Nothing fits: at least" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "b200"}, r"--gpu 'b200'; did you mean 'h200'"),
        ({"llm": "phi2"}, r"--llm 'phi2'; did you mean 'phi_2'"),
        ({"vision": "siglip_so400m"}, r"--vision 'siglip_so400m'; did you mean 'siglip_so400m_384'"),
        ({"engine": "fsdp2"}, r"--engine 'fsdp2'; did you mean 'fsdp'"),
        ({"engine": "torch"}, r"--engine torch runs one process; --gpus 8 asks for 8"),
        ({"engine": "ddp", "gpus": 1}, r"--engine ddp needs several processes"),
        ({"tokens": 4096}, r"--tokens 4096: --samples 8 samples with 728 image tokens each need more than"),
    ],
    ids=["gpu", "llm", "vision", "engine", "torch", "one", "tokens"],
)
def test_mistakes_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan.benchmark(PlanSettings(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 0}, "--gpus 0: at least 1"),
        ({"gpus": 2048}, "--gpus 2048: at most 1,024"),
        ({"recipe": "qlora"}, "--recipe 'qlora'"),
        ({"node_gbps": -1.0}, "--node-gbps -1.0: a number above 0"),
    ],
    ids=["none", "many", "recipe", "speed"],
)
def test_settings_are_refused_by_flag(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PlanSettings(**changes)

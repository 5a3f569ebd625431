"""`tlf-doctor --fit`: the plan's own figures, for a device that is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinyllava_fast.bench import cluster, plan
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import PlanSettings
from tinyllava_fast.doctor import fit as module
from tinyllava_fast.doctor.cli import main
from tinyllava_fast.doctor.fit import Question, fit, full_name, sentences
from tinyllava_fast.errors import UserError

SMALL = Question("smollm2_135m", "siglip_b16_224", "lora", 16, 1024, 2)


def device(gib: float) -> cluster.Device:
    base = cluster.read_device("cpu", per_node=1)
    return replace(base, memory=gib * 2**30, flops=1e12, update_bytes=1e10, slowdown=None, title="a box")


@pytest.fixture(scope="module")
def found() -> Report:
    return fit(SMALL, device(8))


def test_it_says_what_the_plan_says(found: Report) -> None:
    settings = PlanSettings(
        gpus=1, llm=SMALL.llm, vision=SMALL.tower, recipe="lora", lora_rank=16, tokens=1024, samples=2, engine="torch"
    )
    row = plan.predict(plan.work_of(settings), device(8), plan.ENGINES["torch"], 1, 1)
    whole, again = found["rows"]
    assert (whole["need"], whole["step_s"]) == (row["need"], row["step_s"])
    assert not whole["checkpointing"] and again["checkpointing"]
    assert again["need"] < whole["need"] and again["step_s"] > whole["step_s"]


def test_no_larger_pack_than_the_largest_fits(found: Report) -> None:
    most = found["rows"][0]["most_tokens"]
    assert most > 1024 and found["rows"][0]["fits"]
    assert not fit(replace(SMALL, tokens=most + 64), device(8))["rows"][0]["fits"]
    small = [{**row, "fits": False, "most_tokens": 0} for row in found["rows"]]
    text = "\n".join(sentences({**found, "rows": small}))
    assert "DOES NOT FIT" in text and "take a smaller language model" in text


def test_names() -> None:
    assert full_name("vision", "siglip_so400m") == "siglip_so400m_384" and full_name("llm", "phi_2") == "phi_2"
    with pytest.raises(UserError, match="several begin so: smollm2_135m, smollm2_360m"):
        full_name("llm", "smollm2")
    with pytest.raises(UserError, match="'phii' is no language model whose sizes are known; did you mean 'phi_2'"):
        full_name("llm", "phii")


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "measured_device", lambda: device(24))
    flags = ["--recipe", "lora", "--tokens", "1024", "--samples", "2"]
    assert main(["--fit", "smollm2_135m", "siglip_b16", *flags]) == 0
    out = capsys.readouterr().out
    assert "smollm2_135m + siglip_b16_224, lora" in out and "a box: 24.00 GiB" in out
    assert main(["--fit", "smollm2_135m", "siglip_b17", *flags]) == 2

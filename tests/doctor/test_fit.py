"""`tlf-doctor --fit`: the plan's own figures, for a device that is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinyllava_fast.bench import cluster, plan
from tinyllava_fast.bench.settings import PlanSettings
from tinyllava_fast.doctor import fit as module
from tinyllava_fast.doctor.cli import main
from tinyllava_fast.doctor.fit import Question, fit, full_name, sentences
from tinyllava_fast.errors import UserError

SMALL = Question("smollm2_135m", "siglip_b16_224", "lora", 16, 1024, 2)


def device(gib: float) -> cluster.Device:
    base = cluster.read_device("cpu", per_node=1)
    return replace(base, memory=gib * 2**30, flops=1e12, update_bytes=1e10, slowdown=None, title="a box")


def test_it_says_what_the_plan_says() -> None:
    found = fit(SMALL, device(24))
    settings = PlanSettings(
        gpus=1, llm=SMALL.llm, vision=SMALL.tower, recipe="lora", lora_rank=16, tokens=1024, samples=2, engine="torch"
    )
    row = plan.predict(plan.work_of(settings), device(24), plan.ENGINES["torch"], 1, 1)
    assert found["rows"][0]["need"] == row["need"] and found["rows"][0]["step_s"] == row["step_s"]
    assert [r["checkpointing"] for r in found["rows"]] == [False, True]
    assert (
        found["rows"][1]["need"] < found["rows"][0]["need"] and found["rows"][1]["step_s"] > found["rows"][0]["step_s"]
    )


def test_the_largest_pack_fits_and_no_larger_one() -> None:
    most = fit(SMALL, device(8))["rows"][0]["most_tokens"]
    assert most > 1024
    rows = [fit(replace(SMALL, tokens=tokens), device(8))["rows"][0] for tokens in (most - 64, most + 64)]
    assert [row["fits"] for row in rows] == [True, False]
    text = "\n".join(sentences(fit(SMALL, device(0.5))))
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

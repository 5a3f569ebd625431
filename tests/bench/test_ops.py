"""Competitors of the op benchmark compute the same thing, or the comparison is worth nothing."""

from __future__ import annotations

import json

import pytest
import torch

from tinyllava_fast.bench import cli, ops
from tinyllava_fast.bench.case import BOTH, FORWARD, SUITE, Case, Setting, Work
from tinyllava_fast.bench.settings import OpsSettings
from tinyllava_fast.errors import UserError
from tinyllava_fast.ops import __all__ as public_ops

CASES = [case for name in SUITE for case in SUITE.get(name)(Setting(torch.float32, quick=True, compile=False))]
HEADLINE = {
    "packed_attention_vs_sdpa_per_segment",
    "packed_attention_vs_block_mask",
    "linear_cross_entropy_vs_full_logits",
    "linear_cross_entropy_memory",
    "splice_vs_index_copy",
    "lora_linear_vs_peft",
    "nf4_vs_bitsandbytes",
}


def test_every_public_op_is_benchmarked() -> None:
    plain = {"NF4", "Int8", "unpack_nf4", "quantize_nf4", "quantize_int8"}  # tuples, and changes of layout
    plain |= {"linear"}  # it chooses among decode_linear, linear_nf4 and prefill_linear, which are here
    assert set(SUITE) == {case.op for case in CASES} >= set(public_ops) - plain


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.label}")
def test_candidates_agree(case: Case) -> None:
    expected = case.run["ours"]()
    grads = torch.autograd.grad(expected.sum(), case.leaves) if case.leaves else ()
    cannot = {"nested tensors, jagged"}  # on a CPU
    assert len(set(case.run) - cannot) >= 2 and set(case.work) <= {FORWARD, BOTH}
    for name in set(case.run) - cannot:
        out = case.run[name]()
        assert out.shape == expected.shape
        if case.masks:
            continue
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if case.leaves:
            for one, other in zip(torch.autograd.grad(out.sum(), case.leaves), grads, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    target = tmp_path_factory.mktemp("ops") / "o.json"
    assert cli.main(["ops", "--quick", "--no-compile", "--rounds", "2", "--json", str(target)]) == 0
    return json.loads(target.read_text())


def test_the_headline_has_exactly_its_keys(report: dict) -> None:
    assert set(report["headline"]) == HEADLINE
    assert all(value > 0 for value in report["headline"].values())


def test_rows_of_the_report(report: dict, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(r["op"], r["pass"]): r for r in report["rows"]}
    assert ("pack_plan", BOTH) not in rows and report["format"] == ops.FORMAT
    forward, both = rows["packed_attention", FORWARD], rows["packed_attention", BOTH]
    assert both["flops"] == 3 * forward["flops"] and both["bytes"] > 2 * forward["bytes"]
    for name, median in both["medians"].items():
        assert both["flops_per_s"][name] == pytest.approx(both["flops"] / median)
        assert 0 < both["roofline"][name] and both["peak_bytes"][name] >= 0
    assert set(both["ratio"]) == set(both["medians"]) - {"ours"}
    assert both["saved_bytes"]["torch sdpa, block mask"] > 0 and forward["saved_bytes"] == {}
    assert report["absent"]["packed_attention"]["nested tensors, jagged"].startswith("forward: ")
    assert "flash-attn" in report["absent"]["packed_attention"]
    assert "liger-kernel" in report["absent"]["linear_cross_entropy"]
    ops.show(report)
    shown = capsys.readouterr().out
    assert "Headline" in shown and "Not in the race" in shown and "torch sdpa, block mask" in shown


def test_a_headline_without_its_op_is_absent_and_the_smallest_claim_stands() -> None:
    def claim(ratio: float, direction: str = BOTH, peaks: tuple[int, int] = (0, 0)) -> tuple[Case, dict]:
        case = Case("op", "s", {}, {}, headline={"key": "rival"}, memory_headline={"memory": "rival"})
        peak_bytes = dict(zip(("rival", "ours"), peaks, strict=True))
        return case, {"pass": direction, "ratio": {"rival": {"ratio": ratio}}, "peak_bytes": peak_bytes}

    assert ops.headline([claim(3.0), claim(2.0, peaks=(8, 2)), claim(1.0, FORWARD)]) == {"key": 2.0, "memory": 4.0}
    absent = Case("op", "s", {}, {}, headline={"key": "not installed"})
    assert ops.headline([(absent, {"pass": BOTH, "ratio": {}, "peak_bytes": {}})]) == {}


def test_the_roof_is_the_slower_of_the_two() -> None:
    roof = {"flops_per_s": 100.0, "bytes_per_s": 10.0}
    assert ops.least_seconds(Work(flops=200, bytes=10), roof) == 2.0
    assert ops.least_seconds(Work(flops=200, bytes=50), roof) == 5.0


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"--op 'splise'; did you mean 'splice'"):
        ops.benchmark(OpsSettings(ops=("splise",), quick=True))
    with pytest.raises(UserError, match="--device tpu"):
        ops.benchmark(OpsSettings(device="tpu", quick=True))


def test_compiled_candidates_take_part() -> None:
    compiled = Setting(torch.float32, quick=True).compiled("torch compiled", lambda: torch.zeros(1))
    assert list(compiled) == ["torch compiled"]
    names = next(SUITE.get("packed_attention")(Setting(torch.float32, quick=True))).run
    assert {"torch sdpa, per segment, compiled", "flex_attention, block mask, compiled"} <= set(names)

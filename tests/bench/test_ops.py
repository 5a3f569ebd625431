"""Competitors of the op benchmark compute the same thing, or the comparison is worth nothing."""

from __future__ import annotations

import pytest
import torch

from tinyllava_fast.bench import ops
from tinyllava_fast.bench.cases import TINY, Case, cases
from tinyllava_fast.errors import UserError
from tinyllava_fast.ops import __all__ as public_ops

CASES = list(cases(TINY, torch.float32, "cpu"))


def test_every_public_op_is_benchmarked() -> None:
    plain = {"NF4", "Int8", "unpack_nf4", "quantize_nf4", "quantize_int8"}  # tuples, and changes of layout
    assert {c.op.partition(",")[0] for c in CASES} == set(public_ops) - plain


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_candidates_agree(case: Case) -> None:
    expected = case.run["ours"]()
    grads = torch.autograd.grad(expected.sum(), case.leaves) if case.leaves else ()
    assert len(case.run) >= 2
    for name, run in case.run.items():
        if name.endswith("compiled"):
            continue  # Inductor on each of them would take most of a minute
        out = run()
        assert out.shape == expected.shape
        if case.masks:
            continue
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if case.leaves:
            for one, other in zip(torch.autograd.grad(out.sum(), case.leaves), grads, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_rows_of_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "compile", lambda f: f)
    result = ops.benchmark(["packed_attention", "pack_plan"], dtype="float32", rounds=2, quick=True)
    passes = [(r["op"], r["pass"]) for r in result["rows"]]
    assert passes == [
        ("packed_attention", "forward"),
        ("packed_attention", "forward+backward"),
        ("pack_plan", "forward"),
    ]
    row = result["rows"][0]
    assert set(row["ratio"]) == set(row["medians"]) - {"ours"} and row["medians"]["ours"] > 0
    assert result["rows"][1]["flops"] == 3 * row["flops"]
    ops.show(result)
    assert "packed_attention forward" in capsys.readouterr().out


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--op 'splise'; did you mean 'splice'"):
        ops.benchmark(["splise"], quick=True)
    with pytest.raises(UserError, match="--dtype 'bf16'"):
        ops.benchmark(dtype="bf16", quick=True)
    with pytest.raises(UserError, match="--rounds 0"):
        ops.benchmark(rounds=0, quick=True)

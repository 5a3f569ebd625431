"""--compare: a regression is told from noise, and files that cannot be compared are refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.bench import cli, compare, ops
from tinyllava_fast.bench.settings import OpsSettings
from tinyllava_fast.errors import UserError


def row(median: float, spread: float, shape: str = "T=8") -> dict[str, Any]:
    half = spread / 2
    quartiles = [median - half, median + half]
    return {
        "op": "splice", "shape": shape, "pass": "forward", "medians": {"ours": median}, "spread": {"ours": quartiles},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "slower"),
    [
        ((1.0, 0.02), (1.2, 0.02), True),
        ((1.0, 0.02), (1.1, 0.02), False),  # less than 15 %
        ((1.0, 0.30), (1.2, 0.02), False),  # within the noise of the baseline
        ((1.0, 0.02), (1.2, 0.30), False),  # within the noise of this run
        ((1.2, 0.02), (1.0, 0.02), False),
    ],
)
def test_slower_is_more_than_noise(before: tuple, after: tuple, slower: bool) -> None:
    (entry,) = compare.compare({"rows": [row(*after)]}, {"rows": [row(*before)]})
    assert entry["slower"] is slower and entry["ratio"] == before[0] / after[0]
    assert entry["noise"] == pytest.approx((before[1] / before[0], after[1] / after[0]))


def test_rows_without_a_counterpart(capsys: pytest.CaptureFixture[str]) -> None:
    entries = compare.compare({"rows": [row(1, 0), row(1, 0, "T=9")]}, {"rows": [row(1, 0), row(1, 0, "T=7")]})
    assert ["slower" in entry for entry in entries] == [True, False]
    compare.show(entries, "old.json")
    assert "not in the baseline" in capsys.readouterr().out


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ops.benchmark(OpsSettings(ops=("pack_plan",), quick=True, rounds=2))


def run(path: Path, content: dict[str, Any], *more: str) -> int:
    path.write_text(json.dumps(content))
    return cli.main(["ops", "--op", "pack_plan", "--quick", "--rounds", "2", "--compare", str(path), *more])


def test_exit_codes(tmp_path: Path, baseline: dict[str, Any]) -> None:
    slow, fast = copy.deepcopy(baseline), copy.deepcopy(baseline)
    for scale, content in ((1e6, slow), (1e-9, fast)):
        for entry in content["rows"]:
            entry["medians"]["ours"] *= scale
            entry["spread"]["ours"] = [scale * x for x in entry["spread"]["ours"]]
    assert run(tmp_path / "slow.json", slow) == 0
    assert run(tmp_path / "fast.json", fast) == 1
    other = {**slow, "machine": {**slow["machine"], "cpu": "abacus"}}
    assert run(tmp_path / "other.json", other) == 2
    assert run(tmp_path / "other.json", other, "--compare-anyway") == 0


def test_refusals_name_the_file_and_what_differs(tmp_path: Path, baseline: dict[str, Any]) -> None:
    path = str(tmp_path / "b.json")
    facts = {**baseline["machine"], "cpu": "abacus", "torch": "1.0"}
    with pytest.raises(UserError, match=r"b.json: not the same machine: cpu is 'abacus', there .*; --compare-anyway"):
        compare.check_same_machine(baseline, facts, "bfloat16", path)
    with pytest.raises(UserError, match=r"dtype is 'float32', there 'bfloat16'"):
        compare.check_same_machine(baseline, baseline["machine"], "float32", path)
    compare.check_same_machine(baseline, {**baseline["machine"], "torch": "1.0"}, "bfloat16", path)
    with pytest.raises(UserError, match=r"b.json: cannot read it"):
        compare.read_baseline(path)
    Path(path).write_text(json.dumps({"rows": [row(1, 0)]}))
    with pytest.raises(UserError, match=r"b.json: format 'none', expected 'tlf-bench ops"):
        compare.read_baseline(path)
    assert compare.read_baseline(path, anyway=True)["rows"] == [row(1, 0)]
    Path(path).write_text(json.dumps({"rows": [{"op": "splice"}]}))
    with pytest.raises(UserError, match=r"b.json: it has no rows with op, shape"):
        compare.read_baseline(path, anyway=True)

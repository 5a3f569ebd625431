"""Triton kernels compiled without a GPU: the command, the committed table, and that each defect would be seen."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl

from tinyllava_fast.bench import cli, triton_resources
from tinyllava_fast.errors import UserError
from tinyllava_fast.kernels._common import CompileCase


@triton.jit
def product(a, b, c, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def case(size: int, warps: int, kind: str = "bf16") -> CompileCase:
    signature = {"a": f"*{kind}", "b": f"*{kind}", "c": "*fp32"}
    return CompileCase("product", f"{size} {warps}", product, signature, {"SIZE": size}, warps, 2, True)


def only(monkeypatch: pytest.MonkeyPatch, *cases: CompileCase) -> None:
    monkeypatch.setattr(triton_resources, "discover", lambda *_: iter([("made_up", c) for c in cases]))


def test_the_committed_table_is_complete_and_sound() -> None:
    """Every case of every kernel file, once per architecture."""
    table = triton_resources.read_table()
    assert not triton_resources.missing(table)
    assert not triton_resources.problems(table, table)
    assert table["versions"]["triton"] and len(table["kernels"]) >= 30


def test_every_kernel_compiles_as_the_table_says() -> None:
    """The first case of each kernel; `tlf-bench triton --check` compiles all of them for all architectures."""
    first: dict[tuple[str, str], CompileCase] = {}
    for file, one in triton_resources.discover():
        first.setdefault((file, one.name), one)
    result = triton_resources.measure(["sm_90"], lambda file, one: first[file, one.name].shape == one.shape)
    assert len(result["kernels"]) == len(first) >= 4
    assert not triton_resources.problems(result, triton_resources.read_table())


@pytest.mark.parametrize("arch", list(triton_resources.SHARED_LIMIT))
def test_tensor_cores_are_counted(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    only(monkeypatch, case(64, 4))
    result = triton_resources.measure([arch])
    if arch in result["skipped"]:
        pytest.skip(result["skipped"][arch])
    (row,) = result["kernels"]
    assert row["mma"] > 0 and row["spills"] == 0 and 0 < row["shared_bytes"] < 64 << 10 and 16 < row["registers"] < 256
    assert not triton_resources.problems(result, None)


def test_each_defect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, case(128, 1))  # 512 float32 accumulators a thread, of 255 registers
    spilling = triton_resources.measure(["sm_80"])
    assert "registers spill" in triton_resources.problems(spilling, None)[0]

    sound: dict[str, Any] = copy.deepcopy(spilling)
    sound["kernels"][0] |= {"spills": 0, "mma": 8, "registers": 100, "shared_bytes": 1024}
    assert not triton_resources.problems(sound, None)
    for change, text in (
        ({"mma": 0}, "no tensor-core instruction"),
        ({"shared_bytes": 164 << 10}, "167936 bytes of shared memory, sm_80 has 166912"),
        ({"registers": 111}, "111 registers, 100 in the table"),
    ):
        worse = copy.deepcopy(sound)
        worse["kernels"][0] |= change
        (said,) = triton_resources.problems(worse, sound)
        assert text in said and said.startswith("made_up.product [128 1] on sm_80")
    slightly = copy.deepcopy(sound)
    slightly["kernels"][0]["registers"] = 110
    assert not triton_resources.problems(slightly, sound)
    assert [m.split(": ")[1] for m in triton_resources.missing(sound)] == ["0 rows, expected 1"]


def test_an_architecture_beyond_this_triton_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, case(64, 4))
    monkeypatch.setitem(triton_resources.SHARED_LIMIT, "sm_13", 0)
    result = triton_resources.measure(["sm_13"])
    assert not result["kernels"] and result["skipped"]["sm_13"].startswith(f"triton {triton.__version__} cannot: ")
    before = {
        "kernels": [{"name": "made_up.product", "shape": "64 4", "arch": "sm_13", "registers": 9}],
        "versions": {},
    }
    (said,) = triton_resources.problems(result, before)
    assert said.startswith("sm_13: in the table, but triton ")


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, case(64, 4))
    target, flags = tmp_path / "t.json", ["triton", "--arch", "sm_80,sm_90"]
    assert cli.main([*flags, "--json", str(target)]) == 0
    assert "made_up.product" in capsys.readouterr().out
    table = json.loads(target.read_text())
    assert [(r["name"], r["arch"]) for r in table["kernels"]] == [("made_up.product", a) for a in ("sm_80", "sm_90")]
    monkeypatch.setattr(triton_resources, "read_table", lambda: table)
    assert cli.main([*flags, "--check"]) == 0
    monkeypatch.setattr(triton_resources, "read_table", lambda: {**table, "kernels": []})
    assert cli.main([*flags, "--check"]) == 1


def test_user_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--arch 'sm90'; did you mean 'sm_90'"):
        triton_resources.measure(["sm90"])
    with pytest.raises(UserError, match="cannot read the committed table"):
        triton_resources.read_table(tmp_path / "none.json")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="interpreted, not compiled; unset it"):
        triton_resources.measure(["sm_90"])


def test_shared_memory_also_fits_smaller_cards() -> None:
    """One table of settings serves every architecture: what sm_80 takes must fit the 99 KB of a block on sm_86."""
    table = triton_resources.read_table()["kernels"]
    rows = [r for r in table if r["name"].startswith("packed_attention.") and r["arch"] == "sm_80"]
    assert len(rows) > 20 and max(r["shared_bytes"] for r in rows) <= 99 << 10

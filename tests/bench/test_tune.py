"""The search for launch settings as far as it goes without a GPU: what races, who wins, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllava_fast.bench import cli, tune
from tinyllava_fast.bench.case import TINY
from tinyllava_fast.bench.timing import Series
from tinyllava_fast.errors import UserError
from tinyllava_fast.kernels import _common
from tinyllava_fast.kernels._common import TABLE, Launch, read_table


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "launch.json"
    path.write_text(TABLE.read_text())
    return path


def test_without_a_gpu_it_says_so_in_one_sentence(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"^--tune measures launch settings .* needs a GPU; there is none here$"):
        tune.tune(table)
    assert cli.main(["ops", "--tune"]) == 2
    assert cli.main(["ops", "--tune", "--op", "splice"]) == 2
    assert table.read_text() == TABLE.read_text()


@pytest.mark.parametrize("part", tune.PARTS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_candidates_fit_and_include_the_committed_settings(part: str, head_dim: int) -> None:
    found = list(tune.candidates(part, head_dim, 2, 163 << 10))
    assert len(found) == len(set(found)) > 20
    assert len(list(tune.candidates(part, head_dim, 2, 99 << 10))) < len(found)
    for buckets in read_table()["attention"].values():
        assert buckets[f"{head_dim} half"][part] in found


def test_the_committed_table_is_written_as_it_would_be_rewritten() -> None:
    assert tune.dumps(read_table()) == TABLE.read_text()


def test_rewriting_adds_one_architecture_and_keeps_the_rest(table: Path) -> None:
    before = read_table(table)["attention"]["sm_80"]
    winner = Launch(16, 16, 4, 1)
    tune.rewrite(table, "sm_90", {"64 half": {"fwd": winner}})
    tune.rewrite(table, "sm_75", {})
    after = read_table(table)["attention"]
    assert list(after) == ["sm_75", "sm_80", "sm_90"] and after["sm_75"] == after["sm_80"] == before
    assert after["sm_90"]["64 half"] == {**before["64 half"], "fwd": winner}
    assert {k: v for k, v in after["sm_90"].items() if k != "64 half"} == {
        k: v for k, v in before.items() if k != "64 half"
    }
    tune.rewrite(table, "sm_90", {"128 half": {"dq": winner}})
    again = read_table(table)["attention"]["sm_90"]
    assert again["64 half"]["fwd"] == winner and again["128 half"]["dq"] == winner


class Stub:
    """A problem whose kernel refuses some settings and gets others wrong; nothing is compiled."""

    pack, dtype = TINY, torch.float32

    def __init__(self, present: Launch, broken: set[Launch], wrong: set[Launch]) -> None:
        self._present, self._broken, self._wrong = present, broken, wrong

    def present(self) -> dict[str, Launch]:
        return dict.fromkeys(tune.PARTS, self._present)

    def run(self, part: str, launch: Launch) -> list[torch.Tensor]:
        if launch in self._broken:
            raise RuntimeError("out of resources: shared memory")
        return [torch.full((2,), 2.0 if launch in self._wrong else 1.0)]


def timer(seconds: Callable[[str], float]) -> tune.Race:
    def race(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Series]:
        for run in runs.values():
            run()
        return {name: Series((seconds(name) / 2, seconds(name), seconds(name) * 3)) for name in runs}

    return race


def test_the_smallest_median_wins_among_settings_that_work() -> None:
    present, best = Launch(64, 64, 4, 2), Launch(64, 32, 4, 1)
    broken, wrong = Launch(32, 32, 4, 1), Launch(32, 64, 4, 1)
    times = {tune._name(x): t for x, t in ((present, 1.0), (best, 0.5), (broken, 0.1), (wrong, 0.2))}
    stub = Stub(present, {broken}, {wrong})
    found, changes = tune.search(stub, 163 << 10, timer(lambda name: times.get(name, 2.0)))  # type: ignore[arg-type]
    assert found == dict.fromkeys(tune.PARTS, best)
    assert [c["part"] for c in changes] == list(tune.PARTS) and {c["ratio"] for c in changes} == {2.0}


def test_a_gain_within_noise_changes_nothing() -> None:
    present = Launch(64, 64, 4, 2)
    stub = Stub(present, set(), set())
    race = timer(lambda name: 1.0 if name == tune._name(present) else 0.99)
    assert tune.search(stub, 163 << 10, race) == (stub.present(), [])  # type: ignore[arg-type]
    tune.show({"arch": "sm_90", "gpu": "none", "changes": []})


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "ROWS", (16, 32))
    monkeypatch.setattr(tune, "WARPS", (4,))
    monkeypatch.setattr(tune, "STAGES", (1,))
    yield


def test_settings_on_trial_reach_the_launches(few_candidates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem's own runs, on the torch reference here: what they ask the table for while they run."""
    asked: list[Launch] = []

    def spy(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Series]:
        for run in runs.values():
            run()
        return {name: Series((1.0,)) for name in runs}

    problem = tune.Problem(TINY, torch.float32, "cpu")
    plain = tune.packed_attention

    def packed(*args: Any) -> Any:
        asked.append(_common.attention_launch("cpu", TINY.head_dim, torch.float32)["fwd"])
        return plain(*args)

    monkeypatch.setattr(tune, "packed_attention", packed)
    _, changes = tune.search(problem, 163 << 10, spy)
    assert changes == [] and {(a.m, a.n) for a in asked} >= {(16, 32), (32, 16), (32, 32)}


def test_the_table_is_json_with_one_line_a_setting() -> None:
    raw = json.loads(TABLE.read_text())
    settings = sum(len(parts) for archs in raw.values() for buckets in archs.values() for parts in buckets.values())
    assert TABLE.read_text().count('"stages"') == settings >= 18

"""`tlf-bench parity`: the reference equals ours in float32, the verdict can fail, the command runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.bench.conftest import RecordingGate
from tinyllava_fast.bench import cli, parity, sides
from tinyllava_fast.bench.settings import ParitySettings
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError

pytest.importorskip("easy_vqa")
SETTINGS = ParitySettings(steps=3, samples=2, seeds=2)


def test_both_sides_agree_in_float32_whatever_trains(config: Path, tmp_path: Path) -> None:
    """Weight decay, clipping and a learning rate of the tower's own included."""
    tree = yaml.safe_load(config.read_text())
    tree["stages"][0]["recipe"]["vision"] = {"tune": "full", "lr": 3.0e-4}
    tree["stages"][0]["optim"].update(weight_decay=0.1, betas=[0.9, 0.95])
    tree["stages"][0]["data"].update(turns="independent", augment={"hflip": 0.5})
    config.write_text(yaml.safe_dump(tree))
    curves = {}
    for seed in (0, 1):
        run = load_run(parity.compose(config, [], tmp_path, SETTINGS, seed))
        assert run.seed == seed and run.stages[0].data.turns == "conversation"
        for side in ("ours", "reference"):
            gate = RecordingGate()
            sides.serve(side, run, gate, per_step=2, precision="float32")  # type: ignore[arg-type]
            curves[side, seed] = gate.losses
    for seed in (0, 1):
        assert curves["ours", seed] == pytest.approx(curves["reference", seed], abs=1e-4)
    assert curves["ours", 0] != pytest.approx(curves["ours", 1], abs=1e-3)
    ours, reference = ([curves[side, seed] for seed in (0, 1)] for side in ("ours", "reference"))
    assert parity.judge(ours, reference)["ratio"] < 0.1


def test_the_verdict() -> None:
    reference = [[5.0, 4.0, 3.0, 2.0], [5.2, 4.1, 3.2, 2.2], [4.8, 3.9, 2.8, 1.8]]
    same = parity.judge(reference, reference)
    assert same["parity"] and same["gap"] == same["bias"] == 0.0
    assert same["noise"] == pytest.approx((3 * 0.2**2 / 4 + 0.1**2 / 4) ** 0.5)
    late = [[*curve[:3], curve[3] + 0.3] for curve in reference]  # a small gap, all of it one way and at the end
    result = parity.judge(late, reference)
    assert result["gap"] < result["noise"] and not result["parity"]
    assert not parity.judge([[x + 1 for x in curve] for curve in reference], reference)["parity"]


@pytest.mark.slow
def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "parity.json"
    assert cli.main(["parity", "--config", str(config), "--quick", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [len(curve) for curve in result["ours"] + result["reference"]] == [2, 2, 2, 2]
    assert result["largest_gap"] < 1e-3 and "parity: gap" in capsys.readouterr().out


def test_what_the_reference_cannot_train_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.llm\.tune: 'lora'; the reference knows"):
        parity.compose(config, ["stages.0.recipe.llm.tune=lora"], tmp_path, SETTINGS, 0)

"""Every YAML of the project loads, and every path in it is one the project makes."""

from pathlib import Path

import pytest

from tinyllava_fast.config.load import dump, load_run

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))


def test_there_are_configs() -> None:
    assert len(RUNS) >= 3


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_config_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    assert run.output_dir.startswith("runs/")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(run))
    assert load_run(copy) == run

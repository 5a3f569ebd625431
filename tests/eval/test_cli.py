"""What the command says before anything is loaded."""

from __future__ import annotations

import pytest

from tinyllava_fast.eval.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/x/final", "--benchmarks", "gqaa"], "unknown benchmark 'gqaa'; did you mean 'gqa'?"),
        (["--benchmarks", "gqaa", "--dry-run"], "unknown benchmark 'gqaa'; did you mean 'gqa'?"),
        (["runs/x/final", "--benchmarks", "gqa"], "--data is missing"),
        (["runs/x/final", "--data", "x"], "--benchmarks is missing"),
        (["--benchmarks", "gqa"], "give a model folder, or --dry-run"),
    ],
)
def test_what_is_missing_or_unknown(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err

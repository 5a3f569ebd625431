"""What the command says before anything is loaded, and flags that change the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.eval.own import answers, write_data
from tests.lora import write_adapter
from tests.tiny import tiny_config
from tinyllava_fast.eval.cli import main
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model
from tinyllava_fast.models.lmm import LMM


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


def test_an_adapter_and_guesses(folder: Path, lmm: LMM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Answers are those of the merged model, and belong to the adapter: with it the questions are asked anew."""
    merged = write_adapter(lmm, tmp_path / "red", seed=0)
    save_model(merged, tokenizer, build_image_processor(tiny_config()), tmp_path / "merged")
    write_data(tmp_path / "data")
    command = ["--benchmarks", "custom", "--data", str(tmp_path / "data"), "--device", "cpu", "--speculate", "4"]
    command += ["--option", "custom.max_new_tokens=20", "--output", str(tmp_path / "out")]
    found = []
    for model in ([str(tmp_path / "merged")], [str(folder)], [str(folder), "--adapter", str(tmp_path / "red")]):
        assert main([*model, *command]) == 0
        found.append(answers(tmp_path / "out"))
        run = json.loads((tmp_path / "out/custom/run.json").read_text())
        assert run["answered_now"] == len(found[-1])
    assert found[0] == found[2] != found[1]

"""Validation in a run: what it says, that it leaves no trace, the best model, an early end, all of it resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import COLOURS
from tests.train.mixes import write_mix
from tests.train.test_resume import back_to
from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.data.split import Split
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_tokenizer
from tinyllava_fast.train.loop import train

TinyRun = Callable[..., Path]
LORA = {"llm": {"tune": "lora", "lora": {"r": 4, "alpha": 8, "dropout": 0.2}}, "vision": {"tune": "full"}}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validations(run: Path) -> dict[int, dict[str, Any]]:
    """Validation of each step that has one, without its duration."""
    found = {e["step"]: e["validation"] for e in lines(run) if "validation" in e}
    return {step: {k: v for k, v in one.items() if k != "seconds"} for step, one in found.items()}


def wrong_answers(path: Path) -> Path:
    """The run's records with other colours: what is learnt is wrong of them."""
    records = json.loads((path.parent / "records.json").read_text())
    names = list(COLOURS)
    for record in records:
        for message in record["conversations"]:
            if message["value"] in names:
                message["value"] = names[(names.index(message["value"]) + 1) % len(names)]
    other = path.parent / "wrong.json"
    other.write_text(json.dumps([r for r in records if "image" in r]))
    return other


def test_a_validation_leaves_no_trace_in_the_training(tiny_run: TinyRun, losses: Any) -> None:
    path = tiny_run(stages__finetune__recipe=LORA)
    plain, watched = path.parent / "plain", path.parent / "watched"
    train(load_run(path, [f"output_dir={plain}"]))
    looked = [f"stages.finetune.validation.{k}" for k in (f"records={path.parent / 'records.json'}", "every_steps=1")]
    summary = train(load_run(path, [f"output_dir={watched}", *looked]))
    assert losses(watched) == losses(plain)
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (plain, watched)]
    assert weights[0] == weights[1]
    assert sorted(validations(watched)) == list(range(5, 13)) and not validations(plain)
    told = summary["validation"]["finetune"]
    assert told["output"] == "last" and told["last"]["step"] == 12 and told["seconds"] > 0
    assert not (watched / "best").exists()


def test_the_loss_is_the_mean_over_the_held_out_tokens(tiny_run: TinyRun) -> None:
    """However they are packed; and plain, whatever is added to the training loss."""
    path = tiny_run(
        stages__finetune__validation={"share": 0.3}, stages__finetune__optim__label_smoothing=0.2, records=60
    )
    config = load_run(path)
    summary = train(config)
    (found,) = validations(path.parent / "run").values()
    stage = config.stages[1]
    model = io.load_model(path.parent / "run" / "final")[0]
    sides = [
        PackedDataset(
            stage.data,
            load_run(path, ["stages.finetune.batch.tokens=256"]).stages[1].batch,
            tokenizer=build_tokenizer(config.model),
            processor=build_image_processor(config.model),
            tokens_per_image=model.tokens_per_image,
            seed=5,
            split=Split(0.3, held_out),
        )
        for held_out in (True, False)
    ]
    held = sides[0]
    with torch.no_grad():
        batches = [held.pack(0, indices).to("cpu") for indices in held.plan(0)]
        total = sum(float(model(**batch.tensors())) for batch in batches)
    assert found["loss"] == pytest.approx(total / held.report.supervised_tokens, rel=1e-5)
    assert found["supervised_tokens"] == held.report.supervised_tokens and found["samples"] == len(held)
    assert summary["data"]["finetune"]["records"] == len(sides[1]) == 60 - len(held)
    assert summary["data"]["pretrain"]["records"] == 60


OVERFIT = {"every_steps": 2, "keep": "best", "patience": 2, "samples": 2, "max_new_tokens": 4}


@pytest.fixture
def overfit(tiny_run: TinyRun) -> Path:
    """A run that learns, and by that becomes worse on what it is validated with."""
    path = tiny_run(stages__finetune__max_steps=80, stages__finetune__optim__lr=0.02, checkpoint__keep=9, log_every=5)
    validation = OVERFIT | {"records": str(wrong_answers(path))}
    return tiny_run(
        stages__finetune__max_steps=80,
        stages__finetune__optim__lr=0.02,
        checkpoint__keep=9,
        log_every=5,
        stages__finetune__validation=validation,
    )


def test_a_mix_is_told_apart_after_a_validation_too(tmp_path: Path, losses: Any) -> None:
    path = write_mix(tmp_path)
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    train(load_run(path, [f"output_dir={plain}"]))
    looked = [f"stages.finetune.validation.{k}" for k in (f"records={tmp_path / 'words'}", "every_steps=1")]
    train(load_run(path, [f"output_dir={watched}", *looked]))
    assert losses(watched) == losses(plain)
    assert [e["sources"] for e in lines(watched)] == [e["sources"] for e in lines(plain)]


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_an_overfitting_stage_ends_early_with_its_best_model(overfit: Path) -> None:
    run = overfit.parent / "run"
    summary = train(load_run(overfit))
    found = validations(run)
    by_loss = {step: one["loss"] for step, one in found.items()}
    best = min(by_loss, key=by_loss.__getitem__)
    assert max(by_loss) == best + 4 < 84, "two validations later, long before the planned end"
    assert [step for step, one in found.items() if one["best"]][-1] == best
    told = summary["validation"]["finetune"]
    assert told["best"] == {"step": best, "metric": "loss", "value": by_loss[best]}
    assert told["output"] == "best" and told["ended_early"] is True and summary["steps"] == best + 4
    assert same(run / "final", run / "finetune") and same(run / "finetune", run / "best" / f"finetune-{best:08d}")
    assert not same(run / "finetune", run / "last" / "finetune")
    again = train(load_run(overfit))  # a finished run is left as it is
    assert again["steps"] == summary["steps"] and validations(run) == found
    assert same(run / "final", run / "best" / f"finetune-{best:08d}")


def test_best_models_and_early_ends_are_resumed(overfit: Path, losses: Any, caplog: Any) -> None:
    whole, run = overfit.parent / "whole", overfit.parent / "run"
    train(load_run(overfit, [f"output_dir={whole}"]))
    train(load_run(overfit))
    best = json.loads((whole / "summary.json").read_text())["validation"]["finetune"]["best"]["step"]
    names = sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir() and p.name.startswith("finetune"))
    for name in {names[0], names[len(names) // 2], names[-1]}:
        back_to(run, name)
        train(load_run(overfit))
        assert losses(run) == losses(whole) and validations(run) == validations(whole), name
        assert same(run / "final", whole / "final") and same(run / "last" / "finetune", whole / "last" / "finetune")
    elsewhere = overfit.parent / "elsewhere"
    train(load_run(overfit, [f"output_dir={elsewhere}"]), resume=str(run / "checkpoints" / names[-1]))
    assert same(elsewhere / "final", whole / "final") and (elsewhere / "best" / f"finetune-{best:08d}").is_dir()
    assert "begins anew" not in caplog.text


def test_a_best_model_stays_while_a_checkpoint_calls_it_so(overfit: Path) -> None:
    run = overfit.parent / "run"
    overrides = ["stages.finetune.validation.patience=0", "stages.finetune.max_steps=12", "checkpoint.keep=2"]
    train(load_run(overfit, overrides))
    kept = {p.name for p in (run / "best").iterdir()}
    states = [json.loads((p / "state.json").read_text()) for p in (run / "checkpoints").iterdir() if p.is_dir()]
    named = {f"finetune-{s['validation']['finetune']['best']['step']:08d}" for s in states if s["validation"]}
    assert kept == named and len(kept) <= 2


def test_a_share_of_several_sources_is_held_out_of_each(tmp_path: Path) -> None:
    """Pictures that are files, pictures inside an archive, and text alone."""
    path = write_mix(tmp_path, stages__finetune__validation={"share": 0.3, "samples": 3, "max_new_tokens": 2})
    config = load_run(path)
    train(config)
    data, (found,) = config.stages[-1].data, validations(path.parent / "run").values()
    sides = [
        PackedDataset(
            replace(data, sources=[replace(source, weight=None) for source in data.sources]),
            config.stages[-1].batch,
            tokenizer=build_tokenizer(config.model),
            processor=build_image_processor(config.model),
            tokens_per_image=4,
            seed=0,
            split=split,
        )
        for split in (None, Split(0.3, held_out=True), Split(0.3, held_out=False))
    ]
    counts = [[len(source) for source in side.sources] for side in sides]
    assert counts[0] == [held + kept for held, kept in zip(*counts[1:], strict=True)] and min(counts[1]) > 0
    assert found["samples"] == sum(counts[1]) and found["loss"] > 0


def test_the_share_may_not_change_and_the_rest_may(tiny_run: TinyRun) -> None:
    path = tiny_run(stages__finetune__validation={"share": 0.2, "every_steps": 2}, checkpoint__keep=9)
    train(load_run(path))
    longer = "stages.finetune.max_steps=10"
    with pytest.raises(CheckpointError, match=r"validation\.share: .*it decides which samples train"):
        train(load_run(path, [longer, "stages.finetune.validation.share=0.3"]))
    back_to(path.parent / "run", "finetune-00000007")
    train(load_run(path, ["stages.finetune.validation.every_steps=1", "stages.finetune.validation.samples=1"]))
    assert sorted(validations(path.parent / "run")) == [6, 8, 9, 10, 11, 12]


def test_mistakes_are_found_before_the_first_stage_trains(tiny_run: TinyRun) -> None:
    path = tiny_run()
    key = "stages.finetune.validation"
    for override, message in (
        (
            f"{key}.records=nowhere.json",
            r"nowhere\.json: .*\(stages\.finetune\.validation\.records of a run\)",
        ),
        (f"{key}.share=0.0001", r"validation\.share: 0\.0001 holds out none of its records; raise it"),
    ):
        with pytest.raises(UserError, match=message):
            train(load_run(path, [override]))
    assert not (path.parent / "run" / "metrics.jsonl").exists()

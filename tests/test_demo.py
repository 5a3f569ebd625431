"""The demo end to end with a tiny model: data, training, both evaluations, report; a second run repeats nothing."""

from __future__ import annotations

import json
import logging
import signal
import sys

import pytest
import yaml

from tinyllava_fast import demo
from tinyllava_fast.data.easy_vqa import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data") / "easy_vqa")


@pytest.fixture(scope="module")
def config(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    stage = {
        "data": {"image_folder": str(data / "images"), "turns": "independent"},
        "max_steps": 2,
        "batch": {"tokens": 512, "max_images": 4},
    }
    run = {
        "output_dir": str(root / "demo"),
        "model": {
            "llm": {
                "tokenizer": str(data / "tokenizer"),
                "config": {**small, "model_type": "llama", "max_position_embeddings": 256, "eos_token_id": 2},
            },
            "vision": {"feature_layer": -1, "config": {**small, "image_size": 32, "patch_size": 16}},
        },
        "stages": [
            {"name": "pretrain", **stage, "data": {**stage["data"], "records": str(data / "captions.json")}},
            {"name": "finetune", **stage, "data": {**stage["data"], "records": str(data / "train.json")}},
        ],
        "engine": {"dtype": "float32", "workers": 0, "device": "cpu"},
        "log_every": 1,
    }
    path = root / "demo.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_demo(config, data, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(demo.log, "info", lambda text, *values: said.append(text % values))
    arguments = ["--config", str(config), "--data", str(data), "--limit", "12"]
    assert demo.main(arguments) == 0
    run = config.parent / "demo"
    results = json.loads((run / "results.json").read_text())
    assert results["questions"] == 12 and 0 <= results["accuracy"] <= 1 and 0 <= results["blind_accuracy"] <= 1
    for key in ("train_seconds", "eval_seconds", "samples_per_s", "tokens_per_s", "peak_rss_bytes"):
        assert results[key] > 0, key
    out = capsys.readouterr().out
    assert "blank images" in out and "samples/s" in out and "questions/s" in out
    assert f"tlf-serve {run / 'final'}, then open http://127.0.0.1:8000" in said[-1]
    html = (run / "report.html").read_text()
    assert "finetune" in html and "Captions" in html and (run / "report.png").stat().st_size > 20_000

    def never(*_, **__):
        raise AssertionError("a finished step was repeated")

    monkeypatch.setattr(demo, "train", never)
    monkeypatch.setattr("tinyllava_fast.infer.engine.Engine.run", never)
    assert demo.main(arguments) == 0
    assert json.loads((run / "results.json").read_text()) == results

    asked = []
    monkeypatch.setattr(demo, "train", lambda *_, fresh: asked.append(fresh) or 7)
    assert demo.main([*arguments, "seed=5"]) == 7  # another configuration is not taken for the finished one
    assert demo.main([*arguments, "--fresh"]) == 7
    assert asked == [False, True] and not any((run / name).exists() for name in ("eval", "eval-blind"))


def test_bad_input(tmp_path, config, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL, logger="tinyllava_fast")
    assert demo.main(["--config", str(tmp_path / "none.yaml")]) == 2

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert demo.main(["--config", str(config)]) == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_checkpoint(number, tmp_path, monkeypatch):
    """The trainer, here a stand-in that ends on its own terms, is neither killed nor left behind."""
    done = tmp_path / "saved"
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(number, _):\n"
        f"    time.sleep(0.5); pathlib.Path({str(done)!r}).touch(); sys.exit(128 + number)\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, save)\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        f"if {int(number)} == signal.SIGINT: os.kill(os.getpid(), signal.SIGINT)  # a terminal signals both\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(demo, "trainer_command", lambda *_: [sys.executable, str(trainer)])
    assert demo.train(tmp_path / "x.yaml", [], fresh=False) == 128 + number
    assert done.exists()

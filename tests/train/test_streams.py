"""Runs whose records are streams: killed and resumed, in one process and two, with faults, and what they report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.train.mixes import write_digits, write_words
from tests.train.processes import Ranks, fork_server
from tests.train.test_kill import check_run
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.train import cli
from tinyllava_fast.train.loop import train


@pytest.fixture(scope="module")
def server():
    return fork_server()


def write_stream(tiny_run, **changes) -> Path:
    """A run whose stage mixes shards of tar, a stream, with lines that are one, and a source that is none."""
    path = tiny_run(**{"records": 20, "stages__finetune__max_steps": 12, **changes})
    folder = path.parent
    for name in ("digits", "words"):
        (folder / name).mkdir()
    for shard in range(3):
        write_digits(folder / "digits" / f"{shard}.tar", 7 + shard)
        write_words(folder / "words" / f"{shard}.jsonl", 5 + shard)
    colours = {"path": str(folder / "records.json"), "name": "colours", "image_folder": str(folder / "images")}
    sources = [
        {"path": str(folder / "digits"), "stream": True, "weight": 3},
        {**colours, "weight": 2},
        {"path": str(folder / "words"), "stream": True, "weight": 1},
    ]
    run = yaml.safe_load(path.read_text())
    run["stages"] = run["stages"][-1:]
    run["stages"][0]["data"] |= {"records": "", "sources": sources, "shuffle_buffer": 12}
    path.write_text(yaml.safe_dump(run))
    return path


def test_killed_runs_go_on_as_if_nothing_had_happened(server, tiny_run, losses):
    path = write_stream(tiny_run, stages__finetune__max_steps=16, checkpoint__every_steps=2, engine__workers=2)
    check_run(server, path, losses, 2)
    lines = losses(path.parent / "run")
    alone = train(load_run(path, [f"output_dir={path.parent / 'alone'}", "engine.workers=0"]))
    assert losses(path.parent / "alone") == lines
    counts = alone["sources"]["finetune"]
    assert set(counts) == {"digits", "colours", "words"}
    shares = [counts[name]["samples"] / sum(c["samples"] for c in counts.values()) for name in counts]
    assert shares == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.08)


def test_two_processes_train_as_one(server, tiny_run, losses):
    path = write_stream(tiny_run, engine__type="ddp", checkpoint__every_steps=4)
    train(load_run(path, [f"output_dir={path.parent / 'one'}", "engine.type=torch"]))
    with Ranks(server, path.parent / "said", [str(path)]) as ranks:
        assert ranks.wait() == [0, 0], ranks.lines()
    one, two = losses(path.parent / "one"), losses(path.parent / "run")
    for key in ("samples", "tokens"):
        assert [e[key] for e in _sources(path, "one")] == [e[key] for e in _sources(path, "run")]
    assert len(one) == 12 and [loss for *_, loss in two] == pytest.approx([loss for *_, loss in one], rel=2e-4)
    states = [
        json.loads((path.parent / run / "checkpoints" / "finetune-00000008" / "state.json").read_text())["loader"]
        for run in ("one", "run")
    ]
    assert states[0] == states[1] and states[0]["begin"]


def test_faults_are_listed_as_they_come_and_after_a_resumption(tiny_run, capsys):
    path = write_stream(tiny_run, stages__finetune__data__on_error="quarantine", checkpoint__every_steps=4)
    for words in (path.parent / "words").iterdir():
        words.write_text('{"id": "x", "messages": 3}\n{\n' + words.read_text())
    assert cli.main([str(path), "--dry-run"]) == 0
    assert "data of a stream's first shuffle_buffer: " in capsys.readouterr().out
    summary = train(load_run(path))
    listed = path.parent / "run" / "quarantine.jsonl"
    before = [json.loads(line) for line in listed.read_text().splitlines()]
    assert summary["skipped"] == len(before) >= 2
    assert {(line["source"], line["kind"]) for line in before} == {("words", "record")}
    train(load_run(path), resume=str(path.parent / "run" / "checkpoints" / "finetune-00000008"))
    assert sorted(listed.read_text().splitlines()) == sorted(json.dumps(line) for line in before)
    assert "stage" in before[0] and before[0]["reason"]


def test_one_stream_is_as_short_to_write_as_one_file(tiny_run, losses):
    path = tiny_run(records=20, stages__finetune__data__stream=True, stages__finetune__data__shuffle_buffer=7)
    summary = train(load_run(path))
    assert summary["steps"] == 12 and not any("sources" in line for line in _entries(path))
    text = str(path)
    with pytest.raises(UserError, match=r"stages.finetune: max_steps: not given, and a stage with a stream"):
        train(load_run(text, ["stages.finetune.max_steps=null"]), resume="never")
    with pytest.raises(UserError, match=r"validation.share: 0.2 of a stream cannot be held out"):
        train(load_run(text, ["stages.finetune.validation.share=0.2"]), resume="never")
    held = [f"stages.finetune.validation.records={path.parent / 'records.json'}", f"output_dir={path.parent / 'held'}"]
    found = train(load_run(text, held))
    assert found["validation"]["finetune"]


def _sources(path: Path, run: str):
    lines = [json.loads(line) for line in (path.parent / run / "metrics.jsonl").read_text().splitlines()]
    return [entry for line in lines for entry in line["sources"].values()]


def _entries(path: Path):
    return [json.loads(line) for line in (path.parent / "run" / "metrics.jsonl").read_text().splitlines()]

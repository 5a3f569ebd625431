"""What the model answers while it trains: fixed samples through the engine, benchmarks on the weights as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.mixes import write_mix
from tests.train.test_validation import lines, same
from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.split import Split
from tinyllava_fast.data.templates.base import TEMPLATES, Template
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.train import answers
from tinyllava_fast.train.answers import check_answering, choose_samples
from tinyllava_fast.train.loop import train

TinyRun = Callable[..., Path]


def questions(path: Path) -> Path:
    """A benchmark of one's own over the run's images."""
    records = [r for r in json.loads((path.parent / "records.json").read_text()) if "image" in r][:12]
    rows = [
        {
            "id": r["id"],
            "image": r["image"],
            "question": "what colour is it ?",
            "answer": r["conversations"][1]["value"],
        }
        for r in records
    ]
    (path.parent / "images" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent / "images"


def test_samples_are_of_different_pictures_and_always_the_same(tiny_run: TinyRun) -> None:
    data = load_run(tiny_run(records=60)).stages[1].data
    split = Split(0.4, held_out=True)
    samples = choose_samples(data, split, 6)
    assert samples == choose_samples(data, split, 6) and len(samples) == 6
    assert len({sample.images or sample.question for sample in samples}) == 6
    assert samples != choose_samples(data, None, 6) and choose_samples(data, split, 0) == []
    assert all(Path(image).is_file() for sample in samples for image in sample.images)


def test_the_table_holds_the_answers_of_the_saved_model(tiny_run: TinyRun) -> None:
    """Those of the last validation are what the stage's model folder answers; those before are of the one before."""
    validation = {"share": 0.3, "every_steps": 20, "samples": 5, "max_new_tokens": 6}
    path = tiny_run(
        stages__finetune__validation=validation, stages__finetune__max_steps=60, stages__finetune__optim__lr=0.01
    )
    config = load_run(path)
    train(config)
    run = path.parent / "run"
    state = json.loads((run / "checkpoints" / "finetune-00000064" / "state.json").read_text())
    standing = state["validation"]["finetune"]
    samples = choose_samples(config.stages[1].data, Split(0.3, held_out=True), 5)
    assistant = Assistant.from_pretrained(run / "final", batch_tokens=4096, compile=False)
    answers = {a.id: a.text for a in assistant.engine.run(sample.request(6) for sample in samples)}
    assert standing["answers"] == answers and len(answers) == 5
    assert set(standing["answers_before"]) == set(answers)
    page = (run / "index.html").read_text()
    assert "answer before" in page and all(sample.truth in page for sample in samples)
    (run / "index.html").unlink()
    train(config)
    assert samples[0].truth in (run / "index.html").read_text(), "a resumed run remembers its samples"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "finetune")).Reload()
    assert "validation/loss" in events.Tags()["scalars"] and "samples/0" in events.Tags()["images"]
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("validation/samples")]
    tables = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    assert len(tables) == 3 and samples[0].truth in tables[0]


def test_a_benchmark_in_the_loop_chooses_the_best_model(tiny_run: TinyRun) -> None:
    path = tiny_run()
    benchmark = {"name": "custom", "data": str(questions(path)), "limit": 8, "options": {"max_new_tokens": 4}}
    validation = {"every_steps": 10, "benchmarks": [benchmark], "metric": "custom", "keep": "best"}
    path = tiny_run(
        stages__finetune__validation=validation, stages__finetune__max_steps=40, stages__finetune__optim__lr=0.02
    )
    questions(path)
    summary = train(load_run(path))
    run = path.parent / "run"
    scores = {e["step"]: e["validation"]["scores"]["custom"] for e in lines(run) if "validation" in e}
    assert sorted(scores) == [14, 24, 34, 44]
    told = summary["validation"]["finetune"]
    best = max(scores, key=lambda step: (scores[step], -step))
    assert told["best"] == {"step": best, "metric": "custom", "value": scores[best]} and "loss" not in told["last"]
    assert same(run / "finetune", run / "best" / f"finetune-{best:08d}")
    results = json.loads((run / "validation" / "finetune" / "custom" / "results.json").read_text())
    assert results["questions"] == 8 and results["metrics"][0]["value"] == scores[44]
    assert results["model"] == "finetune-00000044"


def test_mistakes_in_benchmarks_are_found_before_the_first_stage(tiny_run: TinyRun, caplog: Any) -> None:
    path = tiny_run()
    for benchmark, message in (
        ({"name": "custm", "data": "."}, "unknown benchmark 'custm'; did you mean 'custom'"),
        ({"name": "custom", "data": str(path.parent)}, r"questions\.jsonl"),
    ):
        broken = tiny_run(stages__finetune__validation={"benchmarks": [benchmark]})
        with pytest.raises(UserError, match=message):
            train(load_run(broken))
    assert not (path.parent / "run").exists(), "a start that fails leaves no folder"


def test_benchmarks_need_whole_weights(tiny_run: TinyRun) -> None:
    path = tiny_run(stages__finetune__validation={"benchmarks": [{"name": "custom", "data": "."}]})
    config = load_run(path, ["engine.type=deepspeed", "engine.zero_stage=3"])
    with pytest.raises(UserError, match=r"stages\.finetune\.validation\.benchmarks: FSDP and ZeRO 3 shard the weights"):
        check_answering(config.stages[1].validation, config.engine, "stages.finetune")
    check_answering(config.stages[1].validation, load_run(path).engine, "stages.finetune")


def test_samples_of_archives_are_asked_with_the_template_of_their_source(tmp_path: Path, monkeypatch: Any) -> None:
    """Pictures inside a WebDataset archive, a template of the source's own, a record's own system text."""
    path = write_mix(tmp_path, stages__finetune__validation={"share": 0.5, "samples": 6, "max_new_tokens": 2})
    tree = yaml.safe_load(path.read_text())
    data = tree["stages"][-1]["data"]
    data["sources"][1]["template"] = "of digits"
    assert "llama" in TEMPLATES.names()
    monkeypatch.setattr(TEMPLATES, "_entries", dict(TEMPLATES._entries))
    TEMPLATES.register("of digits")(Template(eos="</s>", system="look at digits ."))
    path.write_text(yaml.safe_dump(tree))
    asked: dict[str, list[str]] = {}
    plain = answers.answer_samples

    def noting(assistant: Assistant, samples: Any, config: Any) -> dict[str, str]:
        prompts = [sample.request(2) for sample in samples]
        for request in prompts:
            asked[request.id] = [assistant.engine.template.render([("q", None)], None).text]
        return plain(assistant, samples, config)

    monkeypatch.setattr(answers, "answer_samples", noting)
    train(load_run(path))
    assert {name.partition(":")[0] for name in asked} == {"colours", "digits"}
    for name, (prompt,) in asked.items():
        assert ("look at digits ." in prompt) == name.startswith("digits"), (name, prompt)
    page = (path.parent / "run" / "index.html").read_text()
    samples = choose_samples(load_run(path).stages[-1].data, Split(0.5, held_out=True), 6)
    inside = [sample for sample in samples if not isinstance(sample.images[0], str)]
    assert inside and page.count("<img") == len(samples) and "which digit ?" in page
    alone = replace(load_run(path).stages[-1].data, sources=[], records=str(tmp_path / "words"))
    words = choose_samples(alone, None, 9)
    assert {sample.system for sample in words} == {None, "be brief ."}
    said = [sample.request(2).messages[0] for sample in words if sample.system]
    assert said and all(message == {"from": "system", "value": "be brief ."} for message in said)


def test_a_picture_that_is_gone_is_an_answer_in_brackets(tmp_path: Path) -> None:
    path = write_mix(tmp_path)
    samples = [s for s in choose_samples(load_run(path).stages[-1].data, None, 6) if s.key.startswith("digits")]
    (tmp_path / "digits").write_bytes(b"")
    assert samples

    class Nothing:
        class engine:
            @staticmethod
            def run(requests: Any, keep_going: bool) -> list[Any]:
                assert keep_going and not requests
                return []

    found = answers.answer_samples(Nothing(), samples, load_run(path).stages[-1].validation)  # type: ignore[arg-type]
    assert set(found) == {sample.key for sample in samples}
    assert all(text.startswith("(") and "digits" in text for text in found.values())

"""Several sources in one stage: their proportions, their losses, and records that are left out."""

from __future__ import annotations

import json

import pytest

from tests.train.mixes import write_mix
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.loop import train


def entries(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_mix_trains_in_its_proportions_and_reports_each_source(tmp_path):
    path = write_mix(
        tmp_path, stages=2, records=40, log_every=2, stages__finetune__epochs=1, stages__finetune__max_steps=None
    )
    summary = train(load_run(path))
    counts = summary["sources"]["finetune"]
    assert {name: source["samples"] for name, source in counts.items()} == {"colours": 45, "digits": 30, "words": 15}
    lines = [line for line in entries(tmp_path / "run") if line["stage"] == "finetune"]
    for key in ("samples", "tokens", "supervised_tokens"):
        each = {name: sum(line["sources"][name][key] for line in lines) for name in counts}
        assert each == {name: source[key] for name, source in counts.items()}
    assert len(lines) > 3 and not any("sources" in line for line in entries(tmp_path / "run")[: -len(lines)])


def test_the_losses_of_the_sources_add_up(tmp_path):
    path = write_mix(tmp_path, records=20, stages__finetune__max_steps=3)
    train(load_run(path))
    lines = entries(tmp_path / "run")
    assert len(lines) == 3
    for line in lines:
        sources = line["sources"].values()
        tokens = sum(source["supervised_tokens"] for source in sources)
        total = sum(source["loss"] * source["supervised_tokens"] for source in sources if source["supervised_tokens"])
        assert total / tokens == pytest.approx(line["loss"], rel=1e-6)


def test_one_source_in_the_list_trains_as_records_do(tmp_path, losses):
    data = {"template": "llama", "image_folder": str(tmp_path / "a" / "images")}
    records = str(tmp_path / "a" / "records.json")
    found = []
    for given in (
        {"records": records},
        {"sources": [{"path": records}]},
        {"sources": [{"path": records, "weight": 2}]},
    ):
        path = write_mix(tmp_path / "a", records=20, stages__finetune__data={**data, **given})
        train(load_run(path), resume="never")
        found.append(losses(tmp_path / "a" / "run"))
    assert found[0] == found[1] == found[2]


def test_files_may_move_and_weights_may_not(tmp_path, losses):
    path = write_mix(tmp_path, records=20, stages__finetune__max_steps=4, checkpoint={"every_steps": 1, "keep": 9})
    train(load_run(path))
    before = losses(tmp_path / "run")
    (tmp_path / "digits").rename(tmp_path / "moved")
    second = str(tmp_path / "run" / "checkpoints" / "finetune-00000002")
    with pytest.raises(UserError, match=r"sources\[1\]\.weight: checkpoint 2\.0, now 5\.0 \(it decides"):
        train(load_run(path, ["stages.finetune.data.sources.1.weight=5"]), resume=second)
    moved = f"stages.finetune.data.sources.1.path={tmp_path / 'moved'}"
    with pytest.raises(UserError, match=r"digits: cannot read the records: No such file"):
        train(load_run(path), resume=second)
    summary = train(load_run(path, [moved, "stages.finetune.data.sources.1.name=digits"]), resume=second)
    assert losses(tmp_path / "run") == before
    assert summary["changes"][-1]["key"] == "stages.finetune.data.sources[1].name"


@pytest.mark.parametrize("kind", ["skip", "quarantine"])
def test_records_that_cannot_be_used_are_left_out_and_listed(tmp_path, kind):
    path = write_mix(tmp_path, records=20, stages__finetune__max_steps=3, stages__finetune__data__on_error=kind)
    rows = json.loads((tmp_path / "records.json").read_text())
    rows[0]["conversations"][1]["value"] = "it ends </s> here"
    rows[1]["image"] = "gone.png"
    (tmp_path / "images" / "2.png").write_bytes(b"")
    (tmp_path / "images" / "4.png").write_text("<html>not found</html>")
    (tmp_path / "images" / "5.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    rows[6]["conversations"][1]["value"] = "word " * 300
    rows[8]["conversations"] = []
    path.with_name("mended.json").write_text(json.dumps(rows))
    lines = (tmp_path / "words").read_text().splitlines()
    (tmp_path / "words").write_text("\n".join([lines[0], "{", *lines[1:]]))
    overrides = [f"stages.finetune.data.sources.colours.path={tmp_path / 'mended.json'}"]
    summary = train(load_run(path, overrides))
    assert summary["skipped"] == 8
    listed = tmp_path / "run" / "quarantine.jsonl"
    assert listed.exists() == (kind == "quarantine")
    if kind == "skip":
        return
    found = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["source"], line["kind"]) for line in found] == [
        ("colours", "template"),
        ("colours", "record"),
        ("colours", "image"),
        ("colours", "image"),
        ("colours", "image"),
        ("colours", "image"),
        ("colours", "size"),
        ("words", "record"),
    ]
    assert {line["stage"] for line in found} == {"finetune"}
    assert "template's own '</s>'" in found[0]["reason"] and found[1]["record"].startswith("record 8 (id 'r8'")
    assert "does not exist" in found[2]["reason"] and "git lfs pull" in found[5]["reason"]
    assert "line 2, record 1: malformed JSON" in found[-1]["reason"]
    with pytest.raises(UserError, match="template's own '</s>'"):
        train(load_run(path, [*overrides, "stages.finetune.data.on_error=fail"]), resume="never")


def test_a_run_that_met_a_broken_image_goes_on_without_it(tmp_path):
    path = write_mix(tmp_path, records=20, stages__finetune__max_steps=6, checkpoint={"every_steps": 1, "keep": 9})
    train(load_run(path))
    for picture in (tmp_path / "images").iterdir():
        picture.write_bytes(picture.read_bytes()[:-30])  # its header is whole
    second = str(tmp_path / "run" / "checkpoints" / "finetune-00000002")
    with pytest.raises(UserError, match="truncated or not an image"):
        train(load_run(path), resume=second)
    (tmp_path / "images" / "1.png").unlink()
    summary = train(load_run(path, ["stages.finetune.data.on_error=quarantine"]), resume=second)
    assert summary["steps"] == 6 and summary["skipped"]
    found = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(found) == summary["skipped"] and {line["kind"] for line in found} == {"image"}
    assert {True, False} == {"1.png does not exist" in line["reason"] for line in found}

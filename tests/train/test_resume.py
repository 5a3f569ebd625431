"""Changes allowed between a checkpoint and its continuation: whatever an error advises, and what has not begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.train.conftest import prepare
from tinyllava_fast.config.load import load_run, to_dict
from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.train import cli, loop, resume
from tinyllava_fast.train.checkpoint import CheckpointStore, TrainState, load_state
from tinyllava_fast.train.failures import Way, explained

EVERY = ["checkpoint.every_steps=1", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The YAML of a finished run of 4 and 8 steps, whose folder is ``run`` beside it. Read only."""
    path = prepare(tmp_path_factory.mktemp("trained"))
    assert run_cli(path) == 0
    return path


@pytest.fixture
def copied(trained, tmp_path) -> tuple[Path, Path, str]:
    """(YAML, run folder, override of it): a copy of that run to go on with."""
    run = tmp_path / "run"
    shutil.copytree(trained.parent / "run", run)
    return trained, run, f"output_dir={run}"


def errors(caplog) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelname == "ERROR")


def run_cli(path: Path, *overrides: str) -> int:
    return cli.main([str(path), *EVERY, *overrides])


def back_to(run: Path, name: str) -> None:
    """Let the run folder be as it was when that checkpoint was the newest."""
    for folder in (run / "checkpoints").iterdir():
        if folder.is_dir() and int(folder.name[-8:]) > int(name[-8:]):
            shutil.rmtree(folder)
    (run / "checkpoints" / "latest").write_text(name)


def stopped_at(path: Path, step: int, monkeypatch, error: BaseException, code: int = 2) -> None:
    """Train until an error comes up inside a step; the command ends with this exit code."""
    advance = loop.Stage._advance

    def failing(stage, *arguments):
        advance(stage, *arguments)
        if stage.state.step == step:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stage, "_advance", failing)
        assert run_cli(path) == code


def test_a_picture_damaged_in_the_middle_is_skipped_or_mended_on_resume(tiny_run, losses, caplog):
    path = tiny_run()
    run, whole, skip = (path.parent / name for name in ("run", "whole", "skip"))
    assert run_cli(path, f"output_dir={whole}") == 0
    picture = path.parent / "images" / "9.png"
    good = picture.read_bytes()
    damage(picture)
    assert run_cli(path) == 2
    said = errors(caplog)
    assert "records.json: record id 'r9'" in said and "9.png" in said
    step = len(losses(run))
    stage = losses(run)[-1][1]
    assert 0 < step < 12
    assert f"set stages.{stage}.data.on_bad_image=skip" in said
    assert f"{stage}-{step:08d} is intact: the same command, with what is mended, goes on from there" in said
    assert "No record may be removed or changed" in said
    shutil.copytree(run, skip)

    both = [f"stages.{name}.data.on_bad_image=skip" for name in ("pretrain", "finetune")]
    assert run_cli(path, f"output_dir={skip}", *both) == 0
    assert len(losses(skip)) == 12 and losses(skip)[:step] == losses(whole)[:step]
    summary = json.loads((skip / "summary.json").read_text())
    assert summary["skipped"] >= 1 and "r9" in summary["skipped_records"][0]
    changed = [c for c in summary["changes"] if c["key"].endswith("on_bad_image")]
    assert {(c["step"], c["old"], c["new"]) for c in changed} == {(step, "fail", "skip")}
    picture.write_bytes(good)
    assert run_cli(path) == 0
    assert losses(run) == losses(whole)


def damage(picture: Path) -> None:
    """Cut the file so that its header can be read and its pixels cannot."""
    picture.write_bytes(picture.read_bytes()[:45])


STAGE_TWO = {
    "records": ("data.records=nowhere.json", "nowhere.json"),
    "template": ("data.template=lama", "did you mean 'llama'"),
    "images": ("data.image_folder=nowhere", "missing image file"),
    "tokens": ("batch.tokens=40", "exceed stages.finetune.batch.tokens=40"),
    "images of a pack": ("batch.max_images=0", "max_images"),
    "segments": ("batch.max_segments=0", "max_segments"),
    "adapter": ("recipe.llm={tune: lora, lora: {target_modules: [q_prj]}}", "q_prj"),
    "layer": ("recipe.llm={tune: partial, from_layer: 7}", "recipe.llm.from_layer: 7 is out of range"),
    "frozen": (
        "recipe={llm: {tune: frozen}, connector: {tune: frozen}, vision: {tune: frozen}}",
        "every component is frozen",
    ),
    "quantized": ("recipe.llm={tune: qlora, quant: nf4, lora: {r: 2}}", "set quant: int8"),
    "recipe": ("recipe.type=bas", "unknown recipe 'bas'"),
    "packs": ("batch.packs_per_step=0", "packs_per_step"),
}


@pytest.mark.parametrize("name", STAGE_TWO)
def test_the_second_stage_is_looked_at_before_the_first_one_starts(tiny_run, caplog, name):
    path = tiny_run()
    override, message = STAGE_TWO[name]
    assert run_cli(path, f"stages.finetune.{override}") == 2
    assert message in errors(caplog)
    assert not (path.parent / "run" / "metrics.jsonl").exists()


def test_keys_of_a_stage_that_has_not_begun_are_free(copied, losses, caplog):
    path, run, output = copied
    whole = run.parent / "whole"
    mended = ["stages.finetune.batch.tokens=120", "stages.finetune.recipe.vision.tune=frozen"]
    mended += ["stages.finetune.data.turns=independent", "stages.finetune.optim.label_smoothing=0.1"]
    assert run_cli(path, f"output_dir={whole}", *mended) == 0
    back_to(run, "pretrain-00000004")
    assert run_cli(path, output, *mended) == 0
    assert losses(run) == losses(whole)
    assert "stages.finetune.batch.tokens: checkpoint 96, now 120" in caplog.text
    assert "changed from step 5 on" in caplog.text


def test_a_stage_may_be_added_behind_a_finished_run_renamed_or_dropped(tiny_run, losses):
    path = tiny_run()
    run = path.parent / "run"
    assert run_cli(path) == 0
    config = yaml.safe_load(path.read_text())
    lines = losses(run)
    third = {**config["stages"][1], "name": "more", "max_steps": 2}
    path.write_text(yaml.safe_dump({**config, "stages": [*config["stages"], third]}))
    assert run_cli(path) == 0
    assert losses(run)[:12] == lines and [stage for _, stage, _ in losses(run)[12:]] == ["more"] * 2
    back_to(run, "pretrain-00000003")
    path.write_text(yaml.safe_dump({**config, "stages": [config["stages"][0], {**config["stages"][1], "name": "b"}]}))
    assert run_cli(path) == 0
    assert [(s, x) for s, _, x in losses(run)] == [(s, x) for s, _, x in lines]
    assert load_state(CheckpointStore(run / "checkpoints", 9).latest()).stage == "b"


def test_benchmarks_of_a_validation_may_change(trained):
    old, new = (to_dict(load_run(str(trained))) for _ in range(2))
    for tree, data in ((old, "here"), (new, "there")):
        tree["stages"][0]["validation"]["benchmarks"] = [{"name": "pope", "data": data}]
    changes = resume.differences(old, new, TrainState(stage_index=0, stage_step=1, stage_steps=4))
    assert [(change.key, change.why_not) for change in changes] == [
        (f"stages.{old['stages'][0]['name']}.validation.benchmarks[0].data", "")
    ]


@pytest.mark.parametrize(
    ("asked", "attempt", "launched", "taken"),
    [
        ("never", 0, "before", "never"),  # a first attempt, by whatever clock its files were written
        ("never", 0, "", "never"),
        ("never", 1, "before", "auto"),
        ("never", 1, "after", "never"),
        ("never", 1, "", "auto"),
        ("a/path", 1, "before", "auto"),
        ("a/path", 1, "after", "a/path"),
        ("a/path", 1, "", "a/path"),
        ("auto", 1, "after", "auto"),
    ],
)
def test_a_restart_goes_on_from_what_its_run_has_saved(trained, monkeypatch, asked, attempt, launched, taken):
    store = CheckpointStore(trained.parent / "run" / "checkpoints", 9)
    newest = (store.latest() / "state.json").stat().st_mtime_ns
    moments = {"before": str(newest - 1), "after": str(newest + 1), "": ""}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("TLF_LAUNCHED_NS", moments[launched])
    monkeypatch.setenv("TLF_ATTEMPT", str(attempt))
    assert resume._of_attempt(store, asked) == taken


FREE = [
    ["engine.gradient_checkpointing=true"],
    ["stages.finetune.data.feature_cache=0", "stages.finetune.data.overlong=truncate", "log_every=1"],
    ["engine.workers=1", "engine.prefetch=2", "checkpoint.keep=3"],
    ["plugins=[]", "data_root=.", "stages.pretrain.data.on_bad_image=skip"],
]


@pytest.mark.parametrize("changed", FREE)
def test_what_moves_work_around_changes_no_loss(copied, losses, changed, caplog):
    path, run, output = copied
    lines = losses(run)
    back_to(run, "finetune-00000007")
    assert run_cli(path, output, *changed) == 0
    for (*at, loss), (*then, before) in zip(losses(run), lines, strict=True):
        assert at == then and loss == pytest.approx(before, rel=1e-6)


def test_records_and_images_may_move_but_not_change(tiny_run, losses, caplog):
    path = tiny_run()
    run, new = path.parent / "run", path.parent / "new"
    assert run_cli(path) == 0
    lines = losses(run)
    back_to(run, "finetune-00000007")
    new.mkdir()
    shutil.move(path.parent / "images", new / "pictures")
    shutil.move(path.parent / "records.json", new / "data.json")
    moved = [f"stages.{s}.data.records={new / 'data.json'}" for s in ("pretrain", "finetune")]
    moved += [f"stages.{s}.data.image_folder={new / 'pictures'}" for s in ("pretrain", "finetune")]
    rows = json.loads((new / "data.json").read_text())
    (new / "data.json").write_text(json.dumps([*rows[1:], rows[0]]))
    assert run_cli(path, *moved) == 2
    assert "its position in the data means nothing; put them back" in errors(caplog)
    (new / "data.json").write_text(json.dumps(rows))
    assert run_cli(path, *moved) == 0
    assert losses(run) == lines and "are these the same images" not in caplog.text
    for row in (row for row in rows if "image" in row):
        row["image"] = str(new / "pictures" / row["image"])
    (new / "data.json").write_text(json.dumps(rows))
    back_to(run, "finetune-00000007")
    assert run_cli(path, *moved) == 0
    assert losses(run) == lines and "image paths differ from those of the checkpoint" in caplog.text


def test_a_diverged_run_goes_on_with_a_lower_rate(tiny_run, losses, caplog):
    path = tiny_run()
    wild = ["stages.finetune.optim.clip_norm=0", "stages.finetune.recipe.connector.lr=1e30"]
    assert run_cli(path, *wild) == 2
    said = errors(caplog)
    assert "training diverged; lower stages.finetune.optim.lr" in said and "is intact: the same command" in said
    latest = CheckpointStore(path.parent / "run" / "checkpoints", 9).latest()
    back_to(path.parent / "run", "pretrain-00000004")
    assert latest is not None
    assert run_cli(path, "stages.finetune.optim.clip_norm=0", "stages.finetune.optim.lr=1e-4") == 0


def test_rates_change_from_the_next_step_on(copied, losses):
    path, run, output = copied
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    back_to(run, "finetune-00000007")
    lower = ["stages.finetune.optim.lr=3e-4", "stages.finetune.recipe.vision.lr=1e-4"]
    assert run_cli(path, output, *lower) == 0
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in after[:8]] == [e["loss"] for e in before[:8]]
    for old, new in zip(before[7:], after[7:], strict=True):
        assert new["lr"] == pytest.approx({k: v / 10 for k, v in old["lr"].items()})
    # the same change, made twice, is the same training
    back_to(run, "finetune-00000009")
    assert run_cli(path, output, *lower) == 0
    again = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again == [e["loss"] for e in after]


def test_a_running_stage_with_constant_rates_may_be_made_longer(tiny_run, losses):
    path = tiny_run()
    run, whole = path.parent / "run", path.parent / "whole"
    constant = ["stages.finetune.optim.schedule=constant", "stages.finetune.optim.warmup_ratio=0"]
    assert run_cli(path, f"output_dir={whole}", *constant, "stages.finetune.max_steps=10") == 0
    assert run_cli(path, *constant) == 0
    back_to(run, "finetune-00000009")
    assert run_cli(path, *constant, "stages.finetune.max_steps=10") == 0
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("extension", ["stages.finetune.max_steps=20", "stages.finetune.optim.lr=1e-5"])
def test_a_stage_that_is_over_names_ways_that_train_on(tiny_run, losses, caplog, extension):
    path = tiny_run()
    run = path.parent / "run"
    assert run_cli(path) == 0
    summary = (run / "summary.json").read_text()
    assert run_cli(path, extension) == 2
    said = errors(caplog)
    assert "(the stage is over, no step is left that it could change)" in said
    assert f"model.path: {run / 'finetune'} and another output_dir" in said
    assert "add a stage behind 'finetune' to this configuration" in said
    assert (run / "summary.json").read_text() == summary
    assert load_run(run / "config.yaml") == load_run(path, EVERY)  # it says what was trained
    config = yaml.safe_load(path.read_text())
    alone = {**config, "stages": config["stages"][1:], "output_dir": str(path.parent / "next")}
    alone["model"] = {"path": str(run / "finetune")}
    path.write_text(yaml.safe_dump(alone))
    assert run_cli(path, extension) == 0
    assert losses(path.parent / "next")[0][2] < losses(run)[4][2] - 0.3  # it starts from what was learnt


def test_fewer_steps_than_are_done_are_refused(copied, caplog):
    path, run, output = copied
    back_to(run, "finetune-00000009")
    assert run_cli(path, output, "stages.finetune.max_steps=3") == 2
    assert "max_steps or epochs give 3 steps, but 5 are done" in errors(caplog)
    assert run_cli(path, output, "stages.finetune.max_steps=6") == 0


MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", MEMORY, ids=range(len(MEMORY)))
def test_out_of_memory_says_what_to_set(tmp_path, error):
    store, state = CheckpointStore(tmp_path, 1), TrainState(step=4)
    engine = EngineConfig(type="deepspeed", gradient_checkpointing="selective", workers=2)
    with pytest.raises(UserError) as caught, explained(Way(store), state, engine, "b"):
        raise error
    assert str(caught.value) == (
        "stages.b: step 5: out of memory; set engine.gradient_checkpointing=true, or set engine.offload=true, or lower "
        "engine.workers or engine.prefetch, or lower stages.b.batch.tokens, which needs another output_dir once the "
        "stage has a checkpoint\nNo checkpoint was saved so far: the same command starts over"
    )


@pytest.mark.parametrize(
    ("error", "said", "advice"),
    [
        (MEMORY[1], "stages.finetune: step 6: out of memory", "engine.gradient_checkpointing=true"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "data died", "engine.workers=0"),
    ],
)
def test_what_an_error_in_a_step_advises_goes_on(tiny_run, losses, monkeypatch, caplog, error, said, advice):
    path = tiny_run(stages__pretrain__max_steps=2, stages__finetune__max_steps=4)
    run, whole = path.parent / "run", path.parent / "whole"
    assert run_cli(path, f"output_dir={whole}") == 0
    stopped_at(path, 5, monkeypatch, error, code=1)
    assert said in errors(caplog) and advice.partition("=")[0] in errors(caplog)
    assert "finetune-00000004 is intact: the same command" in errors(caplog)
    assert run_cli(path, advice) == 0
    for (*at, loss), (*then, before) in zip(losses(run), losses(whole), strict=True):
        assert at == then and loss == pytest.approx(before, rel=1e-6)


def test_other_errors_are_not_taken_for_a_mistake(tiny_run, monkeypatch):
    path = tiny_run()
    with pytest.raises(RuntimeError, match="a fault of ours"):
        stopped_at(path, 2, monkeypatch, RuntimeError("a fault of ours"))


def test_a_mistake_with_resume_never_loses_no_checkpoint(copied, losses, caplog):
    path, run, output = copied
    lines, names = losses(run), CheckpointStore(run / "checkpoints", 9).names()
    assert cli.main([str(path), output, "--resume", "never", "stages.pretrain.batch.tokens=40"]) == 2
    assert losses(run) == lines and CheckpointStore(run / "checkpoints", 9).names() == names


def test_the_last_model_of_a_resumed_run_is_the_whole_run_s(tiny_run):
    path = tiny_run()
    run, whole = path.parent / "run", path.parent / "whole"
    assert run_cli(path, f"output_dir={whole}") == 0
    assert run_cli(path, "stages.finetune.data.overlong=truncate") == 0
    back_to(run, "finetune-00000006")
    assert run_cli(path, "stages.pretrain.data.on_bad_image=skip") == 0
    for weight, twin in zip(*(io.load_model(r / "final")[0].parameters() for r in (run, whole)), strict=True):
        assert torch.equal(weight, twin)

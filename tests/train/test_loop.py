import dataclasses
import errno
import functools
import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open

from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_model
from tinyllava_fast.train import checkpoint, cli, prepare, resume, saving, stage
from tinyllava_fast.train import compile as compiling
from tinyllava_fast.train.compile import CompiledForward
from tinyllava_fast.train.engine.base import LazyTensor
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.optimizers import bitsandbytes


@pytest.fixture
def whole(tiny_run, losses):
    """(path of the YAML, run folder, losses, summary) of an uninterrupted run."""
    path = tiny_run()
    summary = train(load_run(path))
    run = path.parent / "run"
    return path, run, losses(run), summary


def test_a_run_leaves_everything_it_promises(whole):
    path, run, lines, summary = whole
    assert [(step, stage) for step, stage, _ in lines] == [
        *((s, "pretrain") for s in range(1, 5)),
        *((s, "finetune") for s in range(5, 13)),
    ]
    assert lines[-1][2] < lines[4][2] - 0.3  # it learns
    assert load_run(run / "config.yaml") == load_run(path)
    stored = json.loads((run / "summary.json").read_text())
    assert stored == summary
    assert stored["steps"] == 12 and stored["samples"] >= 24 and stored["skipped"] == 0
    assert 0 < stored["step_seconds"] <= stored["train_seconds"]
    assert stored["peak_rss_bytes"] > 10**7 and 0 <= stored["padding_share"] < 1
    assert stored["data"]["finetune"]["records"] == 40
    entry = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(entry["lr"]) == {"vision", "connector", "llm"} and entry["lr"]["vision"] < entry["lr"]["llm"]
    assert {"grad_norm", "samples_per_s", "tokens_per_s", "supervised_tokens_per_s", "padding_share"} <= set(entry)
    assert {"data_wait_share", "memory_bytes", "epoch", "step_s"} <= set(entry)
    assert any((run / "tensorboard").iterdir())


def test_each_stage_starts_from_the_one_before_and_trains_its_recipe(whole):
    path, run, _, _ = whole
    start = build_model(load_run(path).model, seed=0)
    pretrained, final = io.load_model(run / "pretrain")[0], io.load_model(run / "final")[0]
    for before, after, moved in (
        (start, pretrained, {"connector"}),
        (pretrained, final, {"connector", "llm", "vision"}),
    ):
        for name, weight in before.state_dict().items():
            same = torch.equal(weight, after.state_dict()[name])
            assert not (name.split(".")[0] not in moved and not same), name
        assert any(
            not torch.equal(w, after.state_dict()[n])
            for n, w in before.state_dict().items()
            if n.startswith("connector")
        )
    assert final.config.template == "llama" and final.config.turns == "conversation"


def test_a_finished_run_is_left_as_it_is(whole, losses):
    path, run, lines, summary = whole
    again = train(load_run(path))
    assert again["steps"] == summary["steps"] and losses(run) == lines


@pytest.mark.parametrize("name", ["pretrain-00000003", "pretrain-00000004", "finetune-00000007"])
def test_resuming_repeats_the_run_bit_for_bit(tiny_run, losses, whole, name):
    path, _, lines, _ = whole
    path = tiny_run(checkpoint__keep=9, output_dir=str(path.parent / "other"))
    train(load_run(path))
    other = path.parent / "other"
    for folder in (other / "checkpoints").iterdir():
        if folder.is_dir() and int(folder.name[-8:]) > int(name[-8:]):
            shutil.rmtree(folder)
    (other / "checkpoints" / "latest").write_text(name)
    summary = train(load_run(path))
    assert losses(other) == lines
    assert summary["steps"] == 12
    for weight, twin in zip(
        *(io.load_model(r / "final")[0].parameters() for r in (other, path.parent / "run")), strict=True
    ):
        assert torch.equal(weight, twin)


def test_resume_from_a_path_and_never(tiny_run, losses, whole):
    path, run, lines, _ = whole
    fresh = ["output_dir=" + str(path.parent / "fresh")]
    train(load_run(path, fresh), resume=str(run / "checkpoints" / "finetune-00000010"))
    assert losses(path.parent / "fresh") == lines[10:]
    train(load_run(path, ["output_dir=" + str(path.parent / "newer")]), resume=str(run))
    train(load_run(path, fresh), resume="never")
    assert losses(path.parent / "fresh") == lines


def test_data_root_holds_every_file_and_may_move(tiny_run, losses, whole):
    path, _, lines, _ = whole
    files = {"records": "records.json", "image_folder": "images", "template": "llama"}
    other = path.parent / "rooted"
    moved = tiny_run(stages__pretrain__data=files, stages__finetune__data=files, output_dir=str(other))
    with pytest.raises(UserError, match=r"records\.json: cannot read the records"):
        train(load_run(moved))
    train(load_run(moved, [f"data_root={path.parent}"]))
    assert losses(other) == lines
    shutil.rmtree(other / "checkpoints" / "finetune-00000012")
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("records.json", "images"):
        (path.parent / name).rename(elsewhere / name)
    train(load_run(moved, [f"data_root={elsewhere}"]))
    assert losses(other) == lines


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit"])
def test_bf16_masters_resume_bit_for_bit(tiny_run, losses, monkeypatch, rule):
    monkeypatch.setattr(bitsandbytes, "SMALLEST", 1024)  # bitsandbytes' own is larger than any weight of this model
    path = tiny_run(engine__dtype="bfloat16", stages__finetune__optim={"lr": 3e-3, "type": rule})
    train(load_run(path))
    run = path.parent / "run"
    lines = losses(run)
    with safe_open(run / "checkpoints" / "finetune-00000012" / "optimizer.safetensors", "pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    assert ("U8" in kinds) == (rule == "adamw8bit")
    shutil.rmtree(run / "checkpoints" / "finetune-00000012")
    train(load_run(path))
    assert losses(run) == lines
    assert io.load_model(run / "final")[0].dtype == torch.bfloat16


def test_a_configuration_from_before_a_key_existed_resumes_with_its_default(tiny_run, losses):
    path = tiny_run(engine__dtype="bfloat16")
    short = ["stages.pretrain.max_steps=1", "stages.finetune.max_steps=3", "checkpoint.every_steps=1"]
    train(load_run(path, short))
    run = path.parent / "run"
    lines = losses(run)
    newest = max(p for p in (run / "checkpoints").iterdir() if p.is_dir())
    shutil.rmtree(newest)
    for folder in (p for p in (run / "checkpoints").iterdir() if p.is_dir()):
        state = json.loads((folder / "state.json").read_text())
        for entry in state["config"]["stages"]:
            del entry["optim"]["type"], entry["optim"]["z_loss"]
        del state["checksums"]
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"stages\.finetune\.optim\.type: checkpoint 'adamw', now 'adamw8bit'"):
        train(load_run(path, [*short, "stages.finetune.optim.type=adamw8bit"]))
    train(load_run(path, short))
    assert losses(run) == lines


def test_a_checkpoint_of_another_architecture_is_refused(whole, monkeypatch):
    path, run, _, _ = whole
    shutil.rmtree(run / "checkpoints" / "finetune-00000012")
    monkeypatch.setattr(resume, "differences", lambda *_: [])
    with pytest.raises(CheckpointError, match="another architecture"):
        train(load_run(path, ["model.connector.options={depth: 3}"]))


def test_a_full_disk_ends_the_run_and_loses_nothing(tiny_run, losses, whole, monkeypatch, caplog):
    path, _, lines, _ = whole
    path = tiny_run(output_dir=str(path.parent / "full"))
    run, write, saves = path.parent / "full", saving.write_tensors, []

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    def failing(path, items, **settings):
        saves.append(1)
        if "00000010" in str(path) and "optimizer" in path.name:
            items = [*items, LazyTensor("one too many", (1,), torch.float32, full)]
        return write(path, items, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", failing)
        assert cli.main([str(path)]) == 1
    message = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"][-1]
    assert "No space left on device" in message and "finetune-00000007 is intact" in message
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert cli.main([str(path)]) == 0
    assert losses(run) == lines and saves


def test_divergence_stops_before_a_checkpoint_is_spoilt(tiny_run):
    path = tiny_run(stages__pretrain__optim__lr=1e30, stages__pretrain__optim__clip_norm=0.0)
    with pytest.raises(
        UserError, match=r"step \d+ \(pretrain\): loss .*training diverged.*stages\.pretrain\.optim\.lr"
    ):
        train(load_run(path))
    for file in (path.parent / "run").glob("checkpoints/*/model.safetensors"):
        with checkpoint.open_tensors(file) as tensors:
            assert all(torch.isfinite(t).all() for t in tensors.values())


def test_loss_does_not_depend_on_packing_or_accumulation(tiny_run, losses):
    """The same 40 samples in one step: one big pack, or many small ones."""
    means = []
    for tokens, packs in ((1800, 2), (400, 8), (200, 16)):
        path = tiny_run(
            stages__pretrain__max_steps=None,
            stages__pretrain__batch={"tokens": tokens, "packs_per_step": packs, "max_segments": 64, "max_images": 64},
        )
        config = load_run(path, [f"output_dir={path.parent / str(tokens)}"])
        summary = train(dataclasses.replace(config, stages=config.stages[:1]))
        assert summary["samples"] == 40
        entry = json.loads((path.parent / str(tokens) / "metrics.jsonl").read_text())
        means.append((entry["loss"], entry["grad_norm"]))
    for loss, norm in means[1:]:
        assert math.isclose(loss, means[0][0], rel_tol=1e-5) and math.isclose(norm, means[0][1], rel_tol=1e-4)


@pytest.mark.parametrize("how", [pytest.param("true", marks=pytest.mark.no_cover), "regional"])
def test_compiled_training_equals_eager(tiny_run, losses, whole, monkeypatch, how):
    """One graph for each number of images, none twice, over both stages; aot_eager spares Inductor's minutes."""
    path, _, lines, _ = whole
    monkeypatch.setattr(compiling, "CompiledForward", functools.partial(CompiledForward, backend="aot_eager"))
    overrides = [f"engine.compile={how}", f"output_dir={path.parent / 'compiled'}"]
    summary = train(load_run(path, overrides))
    assert summary["recompiles"] == 0 and summary["compile_seconds"] > 0 and summary["compiled_graphs"] >= 2
    compiled = losses(path.parent / "compiled")
    for (*_, loss), (*_, eager) in zip(compiled, lines, strict=True):
        assert math.isclose(loss, eager, rel_tol=1e-4)
    shutil.rmtree(path.parent / "compiled" / "checkpoints" / "finetune-00000012")
    assert train(load_run(path, overrides))["recompiles"] == 0
    assert losses(path.parent / "compiled") == compiled


def test_a_stage_without_supervision_is_refused(tiny_run, monkeypatch):
    path = tiny_run()
    report = prepare.PackedDataset

    def nothing(*args, **kwargs):
        dataset = report(*args, **kwargs)
        dataset.report.supervised_tokens = 0
        return dataset

    monkeypatch.setattr(prepare, "PackedDataset", nothing)
    with pytest.raises(UserError, match=r"stages\.finetune\.data: no sample of .* has a supervised token"):
        train(load_run(path))


def test_skipped_and_unsupervised_records_are_reported(tiny_run, caplog):
    path = tiny_run(
        stages__pretrain__data__on_bad_image="skip",
        stages__finetune__data__on_bad_image="skip",
        engine__gradient_checkpointing=True,
        engine__workers=1,
    )
    (path.parent / "images" / "0.png").write_bytes(b"no image")
    summary = train(load_run(path, ["stages.finetune.max_steps=20", "stages.finetune.data.augment.hflip=0.5"]))
    assert summary["skipped"] >= 1 and "0.png" in summary["skipped_records"][0]
    assert any("records skipped" in r.getMessage() for r in caplog.records)


def test_torchrun_with_the_torch_engine_is_refused(tiny_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"but 2 were started; set engine.type=ddp, fsdp or deepspeed"):
        train(load_run(tiny_run()))


def test_cuda_where_there_is_none(tiny_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        train(load_run(tiny_run(), ["engine.device=cuda"]))


def test_a_checkpoint_of_a_stage_that_is_gone(whole):
    path, run, _, _ = whole
    state_file = run / "checkpoints" / "finetune-00000012" / "state.json"
    state = json.loads(state_file.read_text())
    state["stage_index"] = 5
    del state["checksums"]
    state_file.write_text(json.dumps(state))
    (state_file.parent / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"belongs to stage 6, .*, but the configuration has 2; put the stage back"):
        train(load_run(path))


def test_label_smoothing_and_z_loss_reach_the_loss_of_their_stage(tiny_run, losses):
    path = tiny_run()
    first = {}
    for name, override in (("plain", []), ("smooth", ["label_smoothing=0.5"]), ("z", ["z_loss=1.0"])):
        keys = [f"stages.finetune.optim.{o}" for o in override]
        folder = path.parent / name
        short = ["stages.pretrain.max_steps=1", "stages.finetune.max_steps=1", f"output_dir={folder}"]
        train(load_run(path, [*short, *keys]))
        first[name] = [loss for _, _, loss in losses(folder)]
    assert first["plain"][0] == first["smooth"][0] == first["z"][0]  # the stage before keeps its own
    assert first["smooth"][1] > first["plain"][1] - 1
    assert first["smooth"][1] != first["plain"][1] and first["z"][1] > first["plain"][1] + 10  # ln(400)² = 36


def test_auto_is_decided_once_a_stage_and_kept_by_a_resumed_run(tiny_run, losses, monkeypatch, tmp_path):
    answers = []
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stage, "repays", lambda steps, **facts: answers.append((steps, facts)) or False)
    path = tiny_run(engine__compile="auto", checkpoint__keep=9)
    train(load_run(path))
    run = path.parent / "run"
    whole = losses(run)
    assert [steps for steps, _ in answers] == [4, 8] and all(facts["flops"] > 1e6 for _, facts in answers)
    assert not any(facts["measured"] for _, facts in answers)
    shutil.rmtree(run / "checkpoints" / "finetune-00000012")
    train(load_run(path))
    assert losses(run) == whole and len(answers) == 2
    train(load_run(path, [f"output_dir={path.parent / 'other'}"]))
    assert answers[3][1]["measured"]["eager_s"] > 0  # of the 8 steps of that stage before

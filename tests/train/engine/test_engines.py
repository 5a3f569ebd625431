"""ddp and fsdp in two processes over gloo: the losses and weights of one process, and resumption by another engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.convert.test_consolidate import assert_same_folder
from tests.train.engine.test_deepspeed_engine import assert_same_adapter, assert_same_training
from tests.train.processes import Ranks, fork_server
from tinyllava_fast.config.load import load_run
from tinyllava_fast.convert.consolidate import consolidate
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.loop import train

LORA = {"tune": "lora", "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj"]}}
PARTS = {"llm": "full", "vision": "full", "connector": "full"}


def take_images(records: Path, left: int) -> None:
    """Make text of all records but the first ``left`` of a file."""
    read = json.loads(records.read_text())
    for record in read[left:]:
        record.pop("image", None)
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>\n", "")
    records.write_text(json.dumps(read))


RECIPES = {
    "full": {name: {"tune": "full"} for name in PARTS},
    "frozen tower": {"vision": {"tune": "frozen"}},
    "connector": {"llm": {"tune": "frozen"}},
    "lora": {"llm": LORA, "vision": LORA, "connector": {"tune": "full"}},
}
CHECKPOINTS = {"every_steps": 4, "keep": 9}


@pytest.fixture(scope="module")
def server():
    return fork_server()


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(server, tiny_run, tmp_path, name):
    recipe = RECIPES[name]
    path = tiny_run(
        stages__pretrain__recipe=recipe,
        stages__finetune__recipe=recipe,
        stages__pretrain__batch__packs_per_step=4,
        checkpoint=CHECKPOINTS,
    )
    one = path.parent / "one"
    train(load_run(path, [f"output_dir={one}"]))
    for engine in ("ddp", "fsdp"):
        run = path.parent / engine
        arguments = [str(path), f"output_dir={run}", f"engine.type={engine}"]
        with Ranks(server, tmp_path / "said", arguments) as ranks:
            assert ranks.wait() == [0, 0], ranks.said(0)
        assert_same_training(run, one)
        if name == "lora":
            assert_same_adapter(run, one)
        consolidate(run, tmp_path / f"from-{engine}")  # rows and shares, put together, are what was gathered
        assert_same_folder(tmp_path / f"from-{engine}", run / "final")


def test_each_engine_goes_on_from_the_checkpoint_of_another(server, tiny_run, tmp_path):
    path = tiny_run(
        stages__pretrain__batch__packs_per_step=4, stages__finetune__batch__packs_per_step=4, checkpoint=CHECKPOINTS
    )
    one, moved = path.parent / "one", path.parent / "moved"
    train(load_run(path, [f"output_dir={one}"]))
    shutil.copytree(one, moved)

    def go_on(engine: str, count: int, after: int) -> None:
        for folder in (moved / "checkpoints").glob("*-*"):
            if int(folder.name[-8:]) > after:
                shutil.rmtree(folder)
        changes = [f"output_dir={moved}", f"engine.type={engine}"]
        if count == 1:
            train(load_run(path, changes))
        else:
            with Ranks(server, tmp_path / "said", [str(path), *changes], count) as ranks:
                assert ranks.wait() == [0] * count, ranks.said(0)
                assert f"-{after:08d}" in ranks.said(0)
        assert_same_training(moved, one)

    go_on("fsdp", 2, after=8)  # from a checkpoint of torch
    go_on("fsdp", 2, after=4)  # the whole stage, for the next two
    go_on("ddp", 4, after=8)
    go_on("fsdp", 4, after=8)  # some weights have fewer rows than there are processes
    go_on("torch", 1, after=8)


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_in_other_numbers_of_processes(server, tiny_run, tmp_path):
    """fsdp in four, ZeRO-2 in two, torch in one, ddp in three; saved in the background, consolidated on the way."""
    pytest.importorskip("deepspeed")
    packs = {f"stages__{stage}__batch__packs_per_step": 12 for stage in ("pretrain", "finetune")}
    path = tiny_run(**packs, checkpoint={"every_steps": 2, "keep": 9, "asynchronous": True})
    one, run = path.parent / "one", path.parent / "run"
    train(load_run(path, [f"output_dir={one}"]))
    last = 0
    for change, count, steps in (
        ("{type: fsdp}", 4, 2),
        ("{type: deepspeed, zero_stage: 2}", 2, 4),
        ("{type: torch}", 1, 6),
        ("{type: ddp}", 3, 8),
    ):
        kind = change.split()[1].strip(",}")
        arguments = [str(path), f"engine.type={kind}", *(["engine.zero_stage=2"] if kind == "deepspeed" else [])]
        with Ranks(server, tmp_path / kind, arguments, count) as ranks:
            assert ranks.wait() == [0] * count, ranks.said(0)
            assert not last or f"finetune-{last:08d}" in ranks.said(0)
        last = 4 + steps
        for folder in (run / "checkpoints").glob("finetune-*"):
            if int(folder.name[-8:]) > last:
                shutil.rmtree(folder)
        newest = run / "checkpoints" / f"finetune-{last:08d}"
        assert (newest / "model-1.safetensors").is_file() == (count > 1)
        if last < 12:
            (run / "checkpoints" / "latest").write_text(newest.name)
        assert_same_training(run, one)
    consolidate(newest, tmp_path / "model")
    found, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "model", run / "final"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_process_may_have_no_image_in_a_step(server, tiny_run, tmp_path, engine):
    """One record a pack; then most records are text alone, so whole steps have no image and the tower moves on."""
    path = tiny_run(
        stages__pretrain__batch__max_segments=1, stages__finetune__batch__max_segments=1, checkpoint=CHECKPOINTS
    )
    take_images(path.parent / "records.json", left=8)
    train(load_run(path, [f"output_dir={path.parent / 'one'}"]))
    with Ranks(server, tmp_path / "said", [str(path), f"engine.type={engine}"]) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    assert_same_training(path.parent / "run", path.parent / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "compile_what"), [("ddp", "true"), ("ddp", "regional"), ("fsdp", "regional")])
def test_several_processes_compile(server, tiny_run, tmp_path, engine, compile_what):
    path = tiny_run(checkpoint=CHECKPOINTS)
    train(load_run(path, [f"output_dir={path.parent / 'one'}"]))
    with Ranks(
        server, tmp_path / "said", [str(path), f"engine.type={engine}", f"engine.compile={compile_what}"]
    ) as ranks:
        assert ranks.wait(400) == [0, 0], ranks.said(0)
    assert_same_training(path.parent / "run", path.parent / "one")
    summary = json.loads((path.parent / "run" / "summary.json").read_text())
    assert summary["compiled_graphs"] > 0 and summary["recompiles"] == 0


def test_bfloat16_under_fsdp_keeps_float32_masters_and_resumes_exactly(server, tiny_run, tmp_path, losses):
    path = tiny_run(engine__type="fsdp", engine__dtype="bfloat16", checkpoint=CHECKPOINTS)
    whole, run = path.parent / "whole", path.parent / "run"
    with Ranks(server, tmp_path / "said", [str(path), f"output_dir={whole}"]) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "finetune-00000012")
    with Ranks(server, tmp_path / "said", [str(path)]) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    assert losses(run) == losses(whole)
    final = [folder / "final" / "model.safetensors" for folder in (run, whole)]
    assert final[0].read_bytes() == final[1].read_bytes()
    one = path.parent / "one"
    train(load_run(path, [f"output_dir={one}", "engine.type=torch"]))
    for (_, _, found), (_, _, expected) in zip(losses(run), losses(one), strict=True):
        assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("checkpointing", ["true", "selective"])
def test_fsdp_recomputes_layers(server, tiny_run, tmp_path, checkpointing):
    path = tiny_run(engine__gradient_checkpointing=checkpointing == "true" or checkpointing, checkpoint=CHECKPOINTS)
    train(load_run(path, [f"output_dir={path.parent / 'one'}"]))
    with Ranks(server, tmp_path / "said", [str(path), "engine.type=fsdp"]) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
    assert_same_training(path.parent / "run", path.parent / "one")


REFUSED = {
    "zero 3 compiled": (
        "engine={type: deepspeed, zero_stage: 3, compile: true}",
        "engine.compile: True: ZeRO-3 gathers",
    ),
    "zero 3 layers": ("engine={type: deepspeed, zero_stage: 3, compile: regional}", "engine.compile: regional: ZeRO-3"),
    "fsdp compiled": ("engine={type: fsdp, compile: true}", "set compile=regional, or engine.type=ddp"),
    "fsdp features": ("stages.pretrain.data.feature_cache=1", "ZeRO 3 and fsdp shard the tower"),
    "fsdp 8 bits": ("stages.pretrain.optim.type=adamw8bit", "optim.type: adamw8bit with engine.type: fsdp"),
    "fsdp qlora": (
        "stages.finetune.recipe.llm={tune: qlora, quant: int8, lora: {r: 2}}",
        "stages.finetune.recipe.llm.tune: qlora with engine.type: fsdp",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_engine_cannot_do_is_refused_by_name(tiny_run, monkeypatch, name):
    override, said = REFUSED[name]
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(variable, "")  # restored afterwards
        monkeypatch.delenv(variable)
    path = tiny_run(engine__type="fsdp")
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        train(load_run(path, [override]))
    assert not (path.parent / "run" / "metrics.jsonl").exists()

"""Every optimizer of the registry, and QLoRA, under every engine: it trains as in one process or is refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.train.matrix import train_all
from tests.train.processes import Ranks, fork_server
from tests.train.soak import losses
from tinyllava_fast.config.schema import EngineConfig, OptimConfig, RecipeConfig, TuneConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.recipes.base import check_engine
from tinyllava_fast.train.loop import start
from tinyllava_fast.train.optimizers.base import OPTIMIZERS, check_optimizer

WHOLE = {
    "torch": EngineConfig(type="torch"),
    "ddp": EngineConfig(type="ddp"),
    "zero0": EngineConfig(type="deepspeed", zero_stage=0),
}
SHARDED = {
    "fsdp": EngineConfig(type="fsdp"),
    **{f"zero{stage}": EngineConfig(type="deepspeed", zero_stage=stage) for stage in (1, 2, 3)},
}
ENGINES = WHOLE | SHARDED
CPU = torch.device("cpu")
SEVERAL = {
    **{name: [f"optim.type={name}"] for name in ("adamw8bit", "lion", "lion8bit", "muon")},
    "qlora": ["recipe.llm={tune: qlora, quant: int8, lora: {r: 2, dropout: 0.0}}"],
}
"""What trains in several processes with whole weights, and the changes of a stage for it."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_an_optimizer_works_or_is_refused_by_name(optimizer, engine):
    pytest.importorskip("bitsandbytes")
    found, where = OPTIMIZERS.get(optimizer), "stages.a.optim.type"
    paged = "paged" in optimizer
    if optimizer == "adamw" or (engine in WHOLE and not paged):
        check_optimizer(OptimConfig(type=optimizer), ENGINES[engine], CPU, "stages.a")
        assert optimizer == "adamw" or optimizer in SEVERAL
        return
    key = "engine.type: fsdp" if engine == "fsdp" else f"engine.zero_stage: {engine[-1]}"
    said = f"{where}: {optimizer} on a CPU, .*set type: {getattr(found, 'unpaged', '')}"
    if engine in SHARDED:
        said = f"{where}: {optimizer} with {key}, .*set (engine.type: ddp|zero_stage: 0), or type: adamw"
    with pytest.raises(UserError, match=said.replace(".t", r"\.t")):
        check_optimizer(OptimConfig(type=optimizer), ENGINES[engine], CPU, "stages.a")


@pytest.mark.parametrize("engine", ENGINES)
def test_qlora_works_or_is_refused_by_name(engine):
    recipe = RecipeConfig(llm=TuneConfig(tune="qlora"))
    if ENGINES[engine].sharding < 3:
        check_engine(recipe, ENGINES[engine], "stages.a")
        return
    with pytest.raises(UserError, match=r"stages\.a\.recipe\.llm\.tune: qlora with engine\.(type: fsdp|zero_stage: 3)"):
        check_engine(recipe, ENGINES[engine], "stages.a")


def test_a_refusal_comes_before_anything_is_read(tiny_run, monkeypatch):
    from tinyllava_fast.config.load import load_run

    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(variable, "")  # restored afterwards
        monkeypatch.delenv(variable)
    path = tiny_run(engine__type="fsdp", stages__finetune__optim={"type": "muon"})
    (path.parent / "records.json").unlink()
    with pytest.raises(UserError, match=r"stages\.finetune\.optim\.type: muon with engine\.type: fsdp"):
        start(load_run(path))


@pytest.mark.slow
def test_two_processes_train_as_one_with_every_optimizer_and_qlora(tiny_run, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = tiny_run(loggers=[], checkpoint__every_steps=0, stages__pretrain__max_steps=1)
    stage = "stages.finetune."
    runs = [(name.replace(" ", "-"), [stage + change for change in changes]) for name, changes in SEVERAL.items()]
    for engine, count in (("torch", 1), ("ddp", 2)):
        each = [(f"{engine}-{name}", [f"engine.type={engine}", *changes]) for name, changes in runs]
        work = partial(train_all, path, each)
        with Ranks(fork_server(), tmp_path / engine, [str(path)], count, dict.fromkeys(range(count), work)) as ranks:
            assert ranks.wait() == [0] * count, ranks.said(0)
    for name, _ in runs:
        found, expected = (losses(path.parent / f"{engine}-{name}") for engine in ("ddp", "torch"))
        assert found == pytest.approx(expected, abs=1e-4) and len(found) == 9, name

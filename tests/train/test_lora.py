"""Whole runs with LoRA and QLoRA: stages that continue or merge, bit-exact resumes, and folders that reload."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import LLAMA
from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import adapter, io
from tinyllava_fast.train.loop import train

SETTINGS = {"r": 4, "alpha": 8, "dropout": 0.1}
LORA = {"tune": "lora", "lora": SETTINGS}
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 64}  # nf4 on a CPU needs multiples of 64


def recipe(llm: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"llm": llm, "connector": {"tune": "full", "lr": 1e-3}, **more}


RECIPES = {
    "lora": recipe(LORA, vision={"tune": "lora", "lora": {**SETTINGS, "r": 2, "target_modules": ["fc1"]}}),
    "partial": recipe(LORA, vision={"tune": "partial", "from_layer": 0}),
    "dora": recipe({"tune": "lora", "lora": {**SETTINGS, "dora": True, "rslora": True, "bias": "all"}}),
    "nf4": recipe({"tune": "qlora", "lora": SETTINGS}),
    "int8": recipe({"tune": "qlora", "quant": "int8", "lora": SETTINGS}),
}


CASES = [("lora", "float32"), ("partial", "bfloat16"), ("dora", "bfloat16"), ("nf4", "bfloat16"), ("int8", "float32")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_resuming_repeats_the_run_bit_for_bit(tiny_run, losses, name, dtype):
    path = tiny_run(model__llm__config=WIDE, stages__finetune__recipe=RECIPES[name], engine__dtype=dtype)
    config = load_run(path)
    train(config)
    run = path.parent / "run"
    lines, final = losses(run), {f: (run / "final" / f).read_bytes() for f in WEIGHTS}
    assert lines[-1][2] < lines[4][2] - 0.1
    shutil.rmtree(run / "checkpoints" / "finetune-00000012")  # goes on from step 10, in the middle of the stage
    train(config)
    assert losses(run) == lines
    assert {f: (run / "final" / f).read_bytes() for f in WEIGHTS} == final


def without_dropout(lmm):
    """As in training otherwise: in evaluation bitsandbytes' int8 layers round their inputs as well."""
    for module in lmm.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return lmm


WEIGHTS = ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "config.json")


@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("int8", "bfloat16")])
def test_the_folder_computes_what_was_trained(tiny_run, monkeypatch, name, dtype):
    """The live reload equals the model at the end of training; float32 merging is as close as rounding allows."""
    from tinyllava_fast.train import loop

    trained = []
    save = io.save_model
    monkeypatch.setattr(loop.io, "save_model", lambda lmm, *a, **k: (trained.append(lmm), save(lmm, *a, **k))[1])
    seen = []
    pack = Loader.__iter__
    monkeypatch.setattr(Loader, "__iter__", lambda self: map(lambda b: (seen.append(b), b)[1], pack(self)))
    path = tiny_run(model__llm__config=WIDE, stages__finetune__recipe=RECIPES[name], engine__dtype=dtype)
    train(load_run(path))
    final, batch = path.parent / "run" / "final", seen[-1].to("cpu").tensors()
    assert json.loads((final / "config.json").read_text())["has_lora"] is True
    assert not any(
        part in k for k in load_file(final / "model.safetensors") for part in ("base_layer", "lora_", "absmax", "SCB")
    )
    with torch.no_grad():
        loss = without_dropout(trained[-1])(**batch)
        live, merged = (io.load_model(final, merge_adapter=flag)[0](**batch) for flag in (False, True))
    if name == "int8":  # trained by peft's forward, reloaded into lora_linear: another order of sums
        assert math.isclose(live, loss, rel_tol=1e-6 if dtype == "float32" else 2e-2)
    else:
        assert torch.equal(live, loss)
    assert math.isclose(merged, loss, rel_tol=1e-6 if dtype == "float32" else 2e-2)


def test_only_the_recipe_trains_and_the_next_stage_goes_on(tiny_run, caplog):
    path = tiny_run(stages__pretrain__recipe=RECIPES["lora"], stages__finetune__recipe=RECIPES["lora"])
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        train(load_run(path))
    assert any("going on with the adapter of the model" in m for m in caplog.messages)
    run = path.parent / "run"
    first, last = (load_file(run / stage / "model.safetensors") for stage in ("pretrain", "final"))
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]) != name.startswith("connector."), name
    first, last = (load_file(run / stage / "adapter" / "adapter_model.safetensors") for stage in ("pretrain", "final"))
    assert first.keys() == last.keys() and not any(torch.equal(t, last[k]) for k, t in first.items())
    assert {t.dtype for t in last.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("following", "slack", "reason"),
    [
        ({"tune": "qlora", "lora": {**SETTINGS, "r": 6}}, 0.02, "the recipe asks for {'r': 6,"),
        ({"tune": "full"}, 1e-6, "the recipe has no lora or qlora component"),
    ],
    ids=["qlora", "full"],
)
def test_another_recipe_merges_first(tiny_run, caplog, following, slack, reason):
    path = tiny_run(
        model__llm__config=WIDE,
        stages__pretrain__recipe=recipe(LORA),
        stages__finetune__recipe={"llm": following},
        stages__finetune__max_steps=1,
        stages__finetune__optim={"lr": 1e-9},
    )
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        train(load_run(path))
    assert any("merging the adapter of the model" in m and reason in m for m in caplog.messages)
    run = path.parent / "run"
    merged, final = io.load_model(run / "pretrain")[0].state_dict(), io.load_model(run / "final")[0].state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=slack, msg=lambda m, n=name: f"{n}: {m}")


def test_qlora_goes_on_with_its_adapter(tiny_run, caplog):
    """int8 values requantize exactly: nothing is lost between the stages."""
    path = tiny_run(
        stages__pretrain__recipe=RECIPES["int8"],
        stages__finetune__recipe=RECIPES["int8"],
        stages__finetune__max_steps=1,
        stages__finetune__optim={"lr": 1e-9},
    )
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        train(load_run(path, ["stages.finetune.recipe.connector.lr=1e-9"]))
    assert any("going on with the adapter" in m for m in caplog.messages)
    run = path.parent / "run"
    first, last = (io.load_model(run / stage)[0].state_dict() for stage in ("pretrain", "final"))
    for name, tensor in first.items():
        torch.testing.assert_close(last[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_from_a_folder_with_an_adapter(tiny_run, caplog):
    path = tiny_run(stages__finetune__recipe=RECIPES["lora"])
    train(load_run(path))
    model = {"path": str(path.parent / "run" / "final")}
    again = tiny_run(model=model, output_dir=str(path.parent / "again"), stages__pretrain__recipe=RECIPES["lora"])
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        train(load_run(again, ["stages.finetune.recipe={llm: {tune: frozen}}"]))
    text = "\n".join(caplog.messages)
    assert text.index("going on with the adapter") < text.index("merging the adapter")
    final = io.load_model(path.parent / "again" / "final", merge_adapter=False)[0]
    assert not final.config.has_lora and not list(adapter.layers(final))


def test_what_an_engine_cannot_train_stops_before_anything_is_written(tiny_run):
    path = tiny_run(stages__finetune__recipe=RECIPES["dora"])
    with pytest.raises(UserError, match=r"stages\.finetune\.recipe\.llm\.lora\.dora: .*set engine\.compile or dora"):
        train(load_run(path, ["engine.compile=true"]))
    with pytest.raises(UserError, match=r"stages\.finetune\.recipe\.llm\.tune: qlora with engine\.zero_stage: 3"):
        train(load_run(tiny_run(stages__finetune__recipe=RECIPES["nf4"]), ["engine={type: deepspeed, zero_stage: 3}"]))
    assert not (path.parent / "run").exists()

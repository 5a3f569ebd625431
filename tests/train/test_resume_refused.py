"""Changes between a checkpoint and its continuation that are refused: each with its reason, and ways that work."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.train.test_resume import EVERY, back_to, run_cli
from tinyllava_fast.config.load import load_run, to_dict
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.train import resume
from tinyllava_fast.train.checkpoint import TrainState
from tinyllava_fast.train.loop import train

REFUSED = {
    "seed": (3, "it decided the first weights"),
    "engine.dtype": ("bfloat16", "kept in it"),
    "model.connector.options": ({"depth": 3}, "the weights of the checkpoint"),
    "stages.finetune.batch.tokens": (120, "position in the data"),
    "stages.finetune.batch.max_images": (3, "position in the data"),
    "stages.finetune.data.template": ("phi", "position in the data"),
    "stages.finetune.recipe.llm.tune": ("frozen", "optimizer's state belongs"),
    "stages.finetune.optim.type": ("adamw8bit", "of that rule"),
    "stages.finetune.optim.z_loss": (1e-4, "mean different things"),
    "stages.pretrain.optim.lr": (1e-4, "the stage is over"),
    "stages.pretrain.name": ("first", "begun under that name"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_decided_the_weights_or_the_packs_is_refused_with_a_reason(tiny_run, key):
    config = to_dict(load_run(tiny_run()))
    changed = json.loads(json.dumps(config))
    node = changed
    *parents, last = key.split(".")
    for part in parents:
        node = next(s for s in node if s["name"] == part) if isinstance(node, list) else node[part]
    before = node[last]
    node[last], why = REFUSED[key]
    state = TrainState(stage="finetune", stage_index=1, stage_step=3, stage_steps=8)
    found = resume.differences(config, changed, state)
    assert found and all(why in change.why_not for change in found)
    assert found[0].key.startswith(key) and (found[0].old == before or key.endswith("options"))


def test_a_refusal_lists_every_key_and_a_way_that_works(tiny_run, losses):
    path = tiny_run()
    run = path.parent / "run"
    assert run_cli(path) == 0
    back_to(run, "finetune-00000007")
    changed = ["stages.finetune.batch.tokens=120", "seed=3", "log_every=7", "stages.finetune.optim.lr=1e-4"]
    with pytest.raises(CheckpointError) as caught:
        train(load_run(path, [*EVERY, *changed]))
    refused, _, free = str(caught.value).partition("What may change:")
    assert "stages.finetune.batch.tokens: checkpoint 96, now 120 (it decides the packs" in refused
    assert "seed: checkpoint 0, now 3" in refused and "log_every" not in refused
    assert "log_every: checkpoint 1, now 7" in free and "optim.lr: checkpoint 0.003, now 0.0001" in free
    assert "another output_dir, or with --resume never" in free
    assert f"the stages from 'finetune' on alone, model.path: {run / 'pretrain'} and another output_dir" in free
    config = yaml.safe_load(path.read_text())
    alone = {**config, "stages": config["stages"][1:], "model": {"path": str(run / "pretrain")}}
    path.write_text(yaml.safe_dump({**alone, "output_dir": str(path.parent / "other")}))
    assert run_cli(path, *changed) == 0
    assert not (run / "metrics.jsonl").read_bytes().count(b"\n") < 7  # the old run is as it was


def test_a_key_that_is_gone_is_refused_by_its_name():
    old = resume._completed({"output_dir": "x", "gone": 1})
    found = resume.differences(old, {"output_dir": "x"}, TrainState())
    assert ("gone", 1, None) in [(c.key, c.old, c.new) for c in found if c.why_not]

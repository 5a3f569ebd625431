"""DeepSpeed's JSON, and a user's file merged into it."""

from __future__ import annotations

import json

import pytest

from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.engine.deepspeed_json import check_keys, deepspeed_config

BASE = {"clip_norm": 0.5, "micro_batches": 3, "cuda": False, "zero_stage": 3, "offload": False, "bf16": True}


def test_json_is_generated_from_the_settings():
    config = deepspeed_config(**BASE | {"offload": True})
    assert config["gradient_accumulation_steps"] == 3 and config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True} and config["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = config["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"]["device"] == "cpu"
    assert zero["stage3_param_persistence_threshold"] > 0
    plain = deepspeed_config(**BASE | {"zero_stage": 2, "bf16": False})
    assert "bf16" not in plain and "offload_optimizer" not in plain["zero_optimization"]
    json.dumps(config)


@pytest.fixture
def merged(tmp_path):
    def merge(theirs: object, **changes: object) -> dict:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(theirs))
        return deepspeed_config(**BASE | changes, file=str(file))

    return merge


def test_a_file_is_merged_into_it(merged):
    """As transformers' users have them: what the run says is "auto" or the same."""
    param = {"device": "nvme", "nvme_path": "/local", "buffer_count": 4}
    config = merged(
        {
            "train_batch_size": "auto",
            "gradient_clipping": 0.5,
            "fp16": {"enabled": False, "loss_scale_window": 1000},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "offload_param": param, "stage3_max_live_parameters": 1e8},
            "aio": {"queue_depth": 8},
            "steps_per_print": 5,
        }
    )
    assert config == deepspeed_config(**BASE) | {
        "zero_optimization": deepspeed_config(**BASE)["zero_optimization"]
        | {"offload_param": param, "stage3_max_live_parameters": 1e8},
        "aio": {"queue_depth": 8},
        "steps_per_print": 5,
    }
    moments = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}}
    assert merged(moments, offload=True)["zero_optimization"]["offload_optimizer"] == {
        "device": "nvme", "nvme_path": "/local", "pin_memory": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            {"gradient_clipping": 1.0},
            "gradient_clipping: 1.0, but the run says 0.5; leave it out here and set optim.clip_norm",
        ),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2, but the run says 3; .* engine.zero_stage"),
        ({"optimizer": {"type": "AdamW", "params": {}}}, "optimizer: .* but the run does without; .* set optim"),
        ({"fp16": {"enabled": True}}, "fp16: .* engine.dtype"),
        ({"train_batch_size": 32}, "train_batch_size: 32, but the run does without; .* batch.packs_per_step"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device: .* engine.offload",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "activation_checkpointing: .* engine.gradient_checkpointing",
        ),
        ([1], "is no JSON object of DeepSpeed's settings"),
    ],
)
def test_what_contradicts_the_run_is_refused_with_both_keys(theirs, said, merged):
    with pytest.raises(UserError, match=r"ds\.json: " + said):
        merged(theirs)


def test_weights_are_offloaded_where_they_are_sharded_alone(merged):
    theirs = {"zero_optimization": {"offload_param": {"device": "cpu"}}}
    with pytest.raises(UserError, match=r"offload_param: .* zero_stage: 2, .* set engine\.zero_stage: 3"):
        merged(theirs, zero_stage=2)


def test_a_file_is_looked_at_before_anything_is_read(tmp_path):
    file = tmp_path / "ds.json"
    with pytest.raises(UserError, match=r"is for engine\.type=deepspeed; got fsdp, which does not read it"):
        check_keys(EngineConfig(type="fsdp", deepspeed=str(file)))
    with pytest.raises(UserError, match=r"ds\.json"):
        check_keys(EngineConfig(type="deepspeed", deepspeed=str(file)))
    file.write_text('{"zero_optimization": {"stage": 1}}')
    with pytest.raises(UserError, match=r"zero_optimization\.stage: 1, but the run says 2"):
        check_keys(EngineConfig(type="deepspeed", deepspeed=str(file)))
    check_keys(EngineConfig(type="deepspeed", zero_stage=1, deepspeed=str(file)))


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"type": "ddp", "zero_stage": 3}, "zero_stage: 3 is for .* got ddp, .* or set zero_stage=2"),
        ({"type": "fsdp", "offload": True}, "offload: true is for .* got fsdp, .* or set offload=false"),
        ({"type": "torch", "deepspeed": "ds.json"}, r"deepspeed: 'ds\.json' is for .* got torch, .* deepspeed=null"),
        ({"type": "deepspeed", "zero_stage": 0, "deepspeed": "ds.json"}, r"deepspeed: 'ds\.json' with zero_stage: 0"),
        (
            {"type": "deepspeed", "zero_stage": 0, "offload": True},
            "offload: true with zero_stage: 0, .* leave offload out",
        ),
    ],
)
def test_a_key_that_the_engine_does_not_read_is_refused(engine, said):
    with pytest.raises(UserError, match=rf"engine\.{said}"):
        check_keys(EngineConfig(**engine))

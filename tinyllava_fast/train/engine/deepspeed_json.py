"""DeepSpeed's JSON: made from the run's settings, and a file of the user's own merged into it.

Keys: https://www.deepspeed.ai/docs/config-json. What the run says in its own keys is said there alone: a file that says
otherwise is refused. "auto" is what transformers' users write for it.
"""

from __future__ import annotations

from pathlib import Path

from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.fields import read_json, shown

Json = dict[str, object]

PERSISTENT_NUMEL = 10_000
"""ZeRO-3 keeps weights below this size whole: norms and biases, not worth a gather."""
_SAID_BY = {
    "activation_checkpointing": "engine.gradient_checkpointing",
    "amp": "engine.dtype",
    "bf16": "engine.dtype",
    "communication_data_type": "engine.dtype",
    "data_types": "engine.dtype",
    "fp16": "engine.dtype",
    "gradient_accumulation_steps": "batch.packs_per_step and the number of processes",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "torch_autocast": "engine.dtype",
    "train_batch_size": "batch.packs_per_step",
    "train_micro_batch_size_per_gpu": "batch.packs_per_step: a pack is one of these",
    "zero_force_ds_cpu_optimizer": "optim",
    "zero_optimization.offload_optimizer.device": "engine.offload, unless it is nvme",
    "zero_optimization.stage": "engine.zero_stage",
}
"""The run's keys for what a file must not say otherwise."""
_OF_A_STAGE = ("gradient_accumulation_steps", "gradient_clipping")
"""Known only once a stage begins."""


def deepspeed_config(
    *,
    zero_stage: int,
    offload: bool,
    micro_batches: int,
    clip_norm: float,
    bf16: bool,
    cuda: bool,
    file: str | None = None,
) -> Json:
    """Return DeepSpeed's JSON. micro_batches: packs of one process in one optimizer step. file: of the user's.

    UserError for a file that contradicts the run, naming both keys.
    """
    zero: Json = {"stage": zero_stage, "contiguous_gradients": True, "overlap_comm": cuda}
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMEL
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    config: Json = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        # torch's AdamW updates on the CPU too, without compiling DeepSpeed's own at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config if file is None else _merged(config, _read(file), file, "")


def check_keys(config: EngineConfig) -> None:
    """Raise UserError for a key of DeepSpeed's that this engine does not read, and for a file that it cannot use."""
    stage = 0 if config.type != "deepspeed" else config.zero_stage
    for key in ("zero_stage", "offload", "deepspeed"):
        value, default = getattr(config, key), getattr(EngineConfig(), key)
        if value == default or stage > 0:
            continue
        if config.type != "deepspeed":
            raise UserError(
                f"engine.{key}: {shown(value)} is for engine.type=deepspeed; got {config.type}, which does not read "
                f"it; leave it out, or set {key}={shown(default)}"
            )
        if key != "zero_stage":
            raise UserError(
                f"engine.{key}: {shown(value)} with zero_stage: 0, which is ddp, without DeepSpeed; set zero_stage to "
                f"1, 2 or 3, or leave {key} out"
            )
    if config.deepspeed is None:
        return
    known = deepspeed_config(
        zero_stage=config.zero_stage,
        offload=config.offload,
        micro_batches=1,
        clip_norm=0.0,
        bf16=config.dtype == "bfloat16",
        cuda=False,
    )
    theirs = {key: value for key, value in _read(config.deepspeed).items() if key not in _OF_A_STAGE}
    _merged(known, theirs, config.deepspeed, "")


def _read(file: str) -> Json:
    values = read_json(Path(file), UserError)
    if not isinstance(values, dict):
        raise UserError(f"{file}: is no JSON object of DeepSpeed's settings; got {shown(values)}")
    return values


def _merged(ours: Json, theirs: Json, file: str, above: str) -> Json:
    """Return our settings with those of a file. above: the dotted path of both, with a dot behind it."""
    merged = dict(ours)
    for key, value in theirs.items():
        name, mine = f"{above}{key}", ours.get(key)
        if value == "auto" or _is_off(value):
            continue
        if name == "zero_optimization.offload_param" and ours["stage"] != 3:
            raise UserError(
                f"{file}: {name}: {shown(value)}, but the run says zero_stage: {ours['stage']}, which keeps weights "
                "whole, where they compute; leave it out here, or set engine.zero_stage: 3"
            )
        if name in _SAID_BY and not (name.endswith("offload_optimizer.device") and value == "nvme"):
            if value != mine:
                raise _contradiction(file, name, value, mine)
        elif isinstance(value, dict):
            merged[key] = _merged(mine if isinstance(mine, dict) else {}, value, file, f"{name}.")
        else:
            merged[key] = value
    return merged


def _is_off(value: object) -> bool:
    """Return whether a section says no more than that something is not used."""
    return isinstance(value, dict) and value.get("enabled") is False


def _contradiction(file: str, name: str, value: object, mine: object) -> UserError:
    said = f"the run says {shown(mine)}" if mine is not None else "the run does without"
    return UserError(f"{file}: {name}: {shown(value)}, but {said}; leave it out here and set {_SAID_BY[name]}")

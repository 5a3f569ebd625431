"""The calculator of memory: what an engine shares, and its estimates against measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinyllava_fast.config.load import load_run
from tinyllava_fast.models.build import build_model
from tinyllava_fast.train.engine.launch import Process
from tinyllava_fast.train.memory import kept_bytes, learning_skeleton, token_bytes, update_bytes, without_values

TinyRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("engine", "shared"),
    [
        (["ddp"], []),
        (["deepspeed", "engine.zero_stage=1"], ["masters and moments"]),
        (["deepspeed", "engine.zero_stage=2"], ["masters and moments", "gradients"]),
        (["fsdp"], ["masters and moments", "gradients", "weights"]),
    ],
    ids=["ddp", "zero1", "zero2", "fsdp"],
)
def test_what_an_engine_shares_counts_once_over_all_processes(
    engine: list[str], shared: list[str], tiny_run: TinyRun
) -> None:
    config = load_run(tiny_run(), [f"engine.type={engine[0]}", *engine[1:]])
    model = build_model(config.model, seed=0)
    stage = config.stages[-1]
    skeleton = learning_skeleton(model, stage, config.engine)
    cpu = torch.device("cpu")
    alone, four = (kept_bytes(skeleton, stage, config.engine, Process(0, count, cpu)) for count in (1, 4))
    assert {name for name in alone if four[name] < alone[name]} == set(shared)
    assert all(four[name] == alone[name] // 4 for name in shared)


@pytest.mark.parametrize(
    ("engine", "bytes_"),
    [
        (["deepspeed", "engine.zero_stage=2", "engine.dtype=bfloat16"], 4),
        (["deepspeed", "engine.zero_stage=2", "engine.dtype=float32"], 0),
        (["deepspeed", "engine.zero_stage=0", "engine.dtype=bfloat16"], 0),
        (["fsdp", "engine.dtype=bfloat16"], 0),
    ],
    ids=["zero2", "float32", "zero0", "fsdp"],
)
def test_what_an_update_holds_beside_the_masters(engine: list[str], bytes_: int, tiny_run: TinyRun) -> None:
    config = load_run(tiny_run(), [f"engine.type={engine[0]}", *engine[1:]])
    skeleton = learning_skeleton(build_model(config.model, seed=0), config.stages[-1], config.engine)
    learnt = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    assert update_bytes(skeleton, config.engine, Process(0, 2, torch.device("cpu"))) == bytes_ * learnt // 2


def test_a_copy_without_values_takes_no_memory_and_leaves_the_model(tiny_run: TinyRun) -> None:
    model = build_model(load_run(tiny_run()).model, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    skeleton = without_values(model)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("checkpointing", "file"), [(False, "fit_tinyllama"), (True, "fit_tinyllama_lora16")])
def test_the_estimate_of_a_token_is_near_what_was_measured(checkpointing: bool, file: str, tiny_run: TinyRun) -> None:
    """bench/results: the slope of the peak of a 1.1 B model over its tokens, in bytes."""
    measured = json.loads((ROOT / "bench" / "results" / f"{file}_2core_zen5.json").read_text())["bytes_per_token"]
    stage = load_run(tiny_run()).stages[1]
    engine = load_run(tiny_run(), ["engine.dtype=bfloat16", f"engine.gradient_checkpointing={checkpointing}"]).engine
    shape = load_run(ROOT / "bench" / "workloads" / "tinyllama_1b.yaml", [f"output_dir={tiny_run().parent}"]).model.llm
    from types import SimpleNamespace

    text = SimpleNamespace(**shape.config)
    config = SimpleNamespace(get_text_config=lambda: text)
    model = SimpleNamespace(
        llm=SimpleNamespace(config=config),
        hidden_size=text.hidden_size,
        num_kv_heads=[text.num_key_value_heads],
        head_dim=text.hidden_size // text.num_attention_heads,
        num_layers=text.num_hidden_layers,
    )
    assert token_bytes(model, stage, engine) == pytest.approx(measured, rel=0.1)  # type: ignore[arg-type]

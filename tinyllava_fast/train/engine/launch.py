"""The process: its rank, device and threads; and the engine that the configuration asks for."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from tinyllava_fast import group, slurm
from tinyllava_fast.config.schema import EngineConfig, OptimConfig
from tinyllava_fast.data.workers import STOP_SIGNALS, exit_code
from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import own_gpu, torchrun_number
from tinyllava_fast.log import log
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import ParameterGroup
from tinyllava_fast.train.attempts import launching
from tinyllava_fast.train.engine.base import TrainingEngine
from tinyllava_fast.train.engine.deepspeed_json import check_keys
from tinyllava_fast.train.engine.torch_engine import DataParallelEngine, TorchEngine
from tinyllava_fast.train.optim import lower

_STOPS = {number: exit_code(number) for number in (*STOP_SIGNALS, signal.SIGQUIT)}
"""Signals that end a run, and its exit code then."""
_PATIENCE = timedelta(hours=6)  # for what rank 0 does alone, as the benchmarks of a validation; deaths are seen at once


@dataclass(frozen=True)
class Process:
    """One of ``world_size`` processes."""

    rank: int
    world_size: int
    device: torch.device


def _own_threads(local_size: int) -> int:
    """Return OMP_NUM_THREADS, which a user sets on a shared machine; 0 without it, or where torchrun has set it."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if local_size == 1 and text.isascii() and text.isdigit() else 0


def start_process(config: EngineConfig) -> Process:
    """Read torchrun's environment or srun's, choose device and threads and, unless the type is torch, join the others.

    Raises UserError for a device that is not there, for several processes under engine.type torch, and for what the
    engine cannot compile.
    """
    slurm.adopt()
    if "LOCAL_SIZE" in os.environ:  # what DeepSpeed's launcher says instead
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    env = {k: torchrun_number(k, d) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))}
    local_size = torchrun_number("LOCAL_WORLD_SIZE", 1)
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise UserError(f"engine.device: {kind!r}; known: auto, cpu, cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device: cuda, but torch sees no CUDA device; set engine.device=cpu or auto")
    check_dtype(config, kind)
    _check_compile(config)
    check_keys(config)
    if config.cuda_graphs:
        _check_cuda_graphs(config, kind)
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", own_gpu(env["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(config.threads or _own_threads(local_size) or slurm.own_cores(local_size))
    process = Process(env["RANK"], env["WORLD_SIZE"], device)
    check_processes(config, process.world_size)
    if config.type != "torch":
        _join(process, config.silence_timeout)
        if (command := slurm.own_command()) is not None:
            slurm.check_commands(group.gather(command))
    return process


def check_processes(config: EngineConfig, count: int) -> None:
    """Raise UserError if this engine cannot run in so many processes."""
    if config.type == "torch" and count > 1:
        raise UserError(
            f"engine.type: torch runs one process, but {count} were started; set engine.type=ddp, fsdp or deepspeed"
            + slurm.remedy()
        )


def start_processes(count: int, restarts: int, argv: Sequence[str]) -> int:
    """Run tlf-train with these arguments in so many processes of this machine; return the exit code.

    restarts: times that all are started again after one has died. Not after a refusal (exit code 2), which each attempt
    would repeat, nor after a signal that asks to stop, to this process or to one of them. torchrun's own restarts know
    no such difference, so each attempt is a launch of its own.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # torchrun would set 1 and warn; each process settles its threads itself.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // count, 1)))
    # torchrun kills what has not ended 30 s after its signal: too soon for a step and a checkpoint of a large model.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    # torchrun would leave SIGUSR1 to end this process alone. A variable, since torch 2.9 knows no such flag.
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in _STOPS)
    settings = ["--standalone", f"--nproc-per-node={count}", "--max-restarts=0", "-m", "tinyllava_fast.train.cli"]
    code = 0
    try:
        with launching() as attempts:
            for number in range(restarts + 1):
                if number:
                    log.warning("the processes ended with exit code %d; restart %d of %d", code, number, restarts)
                attempts.begin(number)
                code = _attempt([*settings, *argv])
                if attempts.refused:
                    return 2
                if code in (0, 2, *_STOPS.values()):
                    break
    except SignalException as stop:
        return _STOPS[signal.Signals(stop.sigval)]
    return code


def _attempt(arguments: list[str]) -> int:
    """Run torchrun once. Return the exit code of the processes.

    Of several: 2 of one that refused, that of one that was told to stop, else that of the first that failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        codes = {failure.exitcode for failure in error.failures.values()}
        for end in (2, *_STOPS.values()):
            if end in codes:
                return end
        return code if code > 0 else 128 - code
    return 0


def never_compiles(config: EngineConfig) -> str:
    """Return why this engine cannot compile the whole model, or, for ZeRO-3, anything; "" if it can."""
    if config.type == "deepspeed" and config.zero_stage == 3:
        return "ZeRO-3 gathers weights in hooks that torch cannot trace; set engine.zero_stage=2, or compile=false"
    if config.type == "fsdp":
        return "fsdp gathers weights in hooks around each layer; set compile=regional, or engine.type=ddp"
    return ""


def check_dtype(config: EngineConfig, kind: str) -> None:
    """Raise UserError for float16 on a device or an engine that does not train in it. kind: cpu or cuda."""
    if config.dtype != "float16":
        return
    if kind == "cpu":
        raise UserError(
            "engine.dtype: float16 on a CPU, which has no fast float16 to gain by; set bfloat16 or float32, or train "
            "on a GPU"
        )
    if config.type == "deepspeed" and config.sharding:
        raise UserError(
            "engine.dtype: float16 with engine.type: deepspeed, whose scaling of the loss is its own; set engine.type: "
            "ddp or fsdp, or dtype: bfloat16"
        )


def _check_compile(config: EngineConfig) -> None:
    reason = never_compiles(config)
    regional = config.compile == "regional" and config.type == "fsdp"
    if reason and config.compile in (True, "regional") and not regional:
        raise UserError(f"engine.compile: {config.compile}: {reason}")


def _check_cuda_graphs(config: EngineConfig, kind: str) -> None:
    if kind != "cuda":
        raise UserError("engine.cuda_graphs: the device is a CPU, which has none; set it to false")
    if config.compile not in (True, "auto"):
        raise UserError(f"engine.cuda_graphs with engine.compile: {config.compile}; set compile to true or auto")
    if config.sharding:
        raise UserError(
            "engine.cuda_graphs: sharded weights and gradients move in memory; set engine.zero_stage: 0, or type: ddp"
        )


def build_engine(
    process: Process,
    config: EngineConfig,
    optim: OptimConfig,
    model: LMM,
    groups: list[ParameterGroup],
    *,
    micro_batches: int,
) -> TrainingEngine:
    """Return the engine of engine.type around a model in float32 whose recipe is applied.

    Its weights become engine.dtype. optim: type, options, betas, eps and clip_norm are read. micro_batches: packs that
    one process takes in one optimizer step.
    """
    masters = lower(model, getattr(torch, config.dtype))
    if config.type == "fsdp":
        from tinyllava_fast.train.engine.fsdp_engine import FSDPEngine

        return FSDPEngine(
            *(model, groups, optim),
            device=process.device,
            masters=masters,
            rank=process.rank,
            world_size=process.world_size,
        )
    if not config.sharding:
        return (TorchEngine if config.type == "torch" else DataParallelEngine)(
            *(model, groups, optim),
            device=process.device,
            masters=masters,
            cuda_graphs=config.cuda_graphs,
            rank=process.rank,
            world_size=process.world_size,
        )
    from tinyllava_fast.train.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        *(model, groups, optim),
        device=process.device,
        masters=masters,
        zero_stage=config.zero_stage,
        offload=config.offload,
        micro_batches=micro_batches,
        file=config.deepspeed,
    )


def _join(process: Process, silence: float) -> None:
    """Join the process group; without torchrun, one of a single process. silence: see group.join."""
    if "MASTER_ADDR" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if process.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    group.join("gloo" if process.device.type == "cpu" else "nccl", timeout=_PATIENCE, silence=silence)

"""`tlf-bench plan-check`: the plan against measurement, with processes of this machine over gloo.

First the constants: 1, 2 and 4 processes train side by side without a word to one another, on a model of half the
depth, and time collectives. They are what `tlf-bench plan --gpu cpu` goes by. Then each engine trains the whole model,
and its step, its peak of memory and, with ``--network``, its bytes on the wire are held against `bench.plan.predict`.
``--network MBIT`` puts every process into a network namespace of its own, whose link sends at most so much; the
constants are then those of the file that plan.yaml names. ``--from FILE`` measures nothing: it plans again, by the code
of today, for what such a file holds as measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from tinyllava_fast.bench import cluster, machine, netns, plan, report
from tinyllava_fast.bench.plan_worker import Answer, Task, work
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import PlanCheckSettings
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import EngineConfig, RunConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models.build import build_model

WORKLOAD = Path(__file__).parent / "workloads" / "plan_check.yaml"
LAYERS = "model.llm.config.num_hidden_layers"
PATIENCE_S = 300
PRELOADED = ["tinyllava_fast.bench.plan_worker", "tinyllava_fast.train.engine.fsdp_engine", "deepspeed"]
"""Imported once, before the processes are forked; each one's memory counts all of it."""


def benchmark(settings: PlanCheckSettings) -> Report:
    """Return {constants, rows, machine, settings}.

    rows: {engine, processes, mbit, measured, predicted, off}, each of the three with step_s, peak_bytes and, on a
    limited network, wire_bytes; off: how far the prediction is from the measurement, relative to it. A time is that of
    the fastest step, which other work has disturbed least; steps_s has all. load: of the machine before and after.
    """
    if settings.source is not None:
        return planned_again(settings.source)
    run = load_run(WORKLOAD, list(settings.shrunk))
    facts = {"machine": machine.describe("cpu"), "settings": asdict(settings)}
    load = [os.getloadavg()[0]]
    constants = _constants_of_file() if settings.network else calibrate(run, settings)
    device = cluster.measured_cpu({"constants": constants, **facts})
    cases = [
        (name, count, mbit)
        for mbit in settings.network or (0,)
        for count in settings.processes
        for name in settings.engines
        if count == 2 or plan.ENGINES[name].type != "deepspeed" or settings.deepspeed
    ]
    pack = _pack(run, settings.lengths)
    rows = [
        _row(run, pack, device, settings, name, count, mbit)
        for name, count, mbit in progress(cases, "engines to measure")
    ]
    load.append(os.getloadavg()[0])
    return {"constants": constants, "rows": rows, **facts, "load": load}


def planned_again(file: Path) -> Report:
    """Return the report of a file with new predictions, and ``planned_again``; what was measured stays as it is."""
    try:
        result: Report = json.loads(file.read_text(encoding="utf-8"))
        settings, rows = result["settings"], result["rows"]
        constants = _constants_of_file() if settings["network"] else result["constants"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--from {file}: not a report of `tlf-bench plan-check --json` ({type(error).__name__}: {error})"
        ) from None
    device = cluster.measured_cpu({**result, "constants": constants})
    pack = _pack(load_run(WORKLOAD, settings["shrunk"]), settings["lengths"])
    new = [
        _beside(pack, device, row["engine"], row["processes"], row["mbit"], row["measured"])
        for row in progress(rows, "engines to plan again")
    ]
    return {**result, "constants": constants, "rows": new, "planned_again": True}


def _constants_of_file() -> Report:
    name = cluster.table()["devices"]["cpu"]["measured"]
    found: Report = json.loads((cluster.HERE / "results" / name).read_text(encoding="utf-8"))["constants"]
    return found


def _pack(run: RunConfig, lengths: Sequence[int]) -> plan.Work:
    """Return the work of the pack that each process trains (plan_worker.synthetic_pack)."""
    model = build_model(run.model, seed=0)
    return plan.pack_work(model, run.stages[0], lengths, len(lengths), sum(lengths) // 5, dtype="bfloat16")


def calibrate(run: RunConfig, settings: PlanCheckSettings) -> Report:
    """Return the constants of a CPU, as `cluster.measured_cpu` reads them."""
    depth = int(run.model.llm.config["num_hidden_layers"]) // 2
    half = load_run(WORKLOAD, [*settings.shrunk, f"{LAYERS}={depth}"])
    counts = (1, *settings.processes)
    found = {
        count: _start(half, EngineConfig(), count, settings, alone=True)
        for count in progress(counts, "numbers of processes side by side")
    }
    pack = _pack(half, settings.lengths)
    passes = {count: _slowest(answers, "passes") for count, answers in found.items()}
    updates = {count: _slowest(answers, "updates") for count, answers in found.items()}
    peak = found[1][0]["gemm_flops_per_s"]
    return {
        "gemm_flops_per_s": peak,
        "mfu": pack.flops / passes[1] / peak,
        "update_bytes_per_s": pack.learnt * plan.update_bytes(pack) / updates[1],
        "process_bytes": max(answer["process_bytes"] for answers in found.values() for answer in answers),
        "hop_seconds": 1e-4,  # assumed, between nodes of such machines
        "slowdown": {str(count): passes[count] / passes[1] for count in counts},
        "update_slowdown": {str(count): updates[count] / updates[1] for count in counts},
        "collectives": {str(count): found[count][0]["collectives"] for count in settings.processes},
    }


def _row(
    run: RunConfig,
    pack: plan.Work,
    device: cluster.Device,
    settings: PlanCheckSettings,
    name: str,
    count: int,
    mbit: int,
) -> Report:
    engine = replace(plan.ENGINES[name], device="cpu")
    answers = _start(run, engine, count, settings, mbit=mbit)
    steps = [sum(times) for times in zip(answers[0]["passes"], answers[0]["updates"], strict=True)]
    measured: Report = {
        "step_s": min(steps),
        "steps_s": steps,
        "passes_s": answers[0]["passes"],
        "peak_bytes": max(answer["peak_rss_bytes"] for answer in answers),
    }
    if mbit:
        measured["wire_bytes"] = statistics.mean(answer["sent_bytes"] for answer in answers)
    return _beside(pack, device, name, count, mbit, measured)


def _beside(pack: plan.Work, device: cluster.Device, name: str, count: int, mbit: int, measured: Report) -> Report:
    """Return a row: what was measured, and what is planned."""
    engine = replace(plan.ENGINES[name], device="cpu")
    if mbit:  # a node for each process, which share this machine's cores all the same
        share = {1: device.slowdowns(count)}
        device = replace(device, per_node=1, node_bytes=mbit * 1e6 / 8, slowdown=share)
    told = plan.predict(pack, device, engine, count, 1)
    predicted: Report = {"step_s": told["step_s"], "peak_bytes": told["need"], "wire_bytes": told["wire_bytes"]}
    predicted |= {"seconds": told["seconds"], "memory": told["memory"]}
    off = {key: predicted[key] / measured[key] - 1 for key in ("step_s", "peak_bytes", "wire_bytes") if key in measured}
    log.info(
        "%s x %d: %.2f s a step, planned %.2f s; %.2f GiB, planned %.2f GiB",
        *(name, count, measured["step_s"], predicted["step_s"]),
        *(measured["peak_bytes"] / 2**30, predicted["peak_bytes"] / 2**30),
    )
    return {
        "engine": name, "processes": count, "mbit": mbit, "measured": measured, "predicted": predicted, "off": off,
    }  # fmt: skip


def _start(
    run: RunConfig,
    engine: EngineConfig,
    count: int,
    settings: PlanCheckSettings,
    *,
    alone: bool = False,
    mbit: int = 0,
) -> list[Answer]:
    """Run so many processes and return their answers in the order of ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ExitStack() as stack:
        spaces = stack.enter_context(netns.namespaces(count, mbit)) if mbit else [""] * count
        shared = {
            "MASTER_ADDR": netns.address(0) if mbit else "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "1",
        }
        if mbit:
            shared["GLOO_SOCKET_IFNAME"] = netns.DEVICE
        ends = []
        for rank, space in enumerate(spaces):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            task = Task(run, engine, settings.lengths, settings.steps, environment, alone, space)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(task, theirs))
            process.start()
            theirs.close()
            stack.callback(_end, process)
            ends.append(ours)
        return [_answer(end, rank) for rank, end in enumerate(ends)]


def _answer(end: multiprocessing.connection.Connection, rank: int) -> Answer:
    if not end.poll(PATIENCE_S):
        raise UserError(f"plan-check: process {rank} has said nothing for {PATIENCE_S} s; is this machine busy?")
    try:
        found: Answer | str = end.recv()
    except EOFError:
        found = "it was killed, for want of memory perhaps"
    if isinstance(found, str):
        raise UserError(f"plan-check: process {rank}: {found}")
    return found


def _end(process: multiprocessing.process.BaseProcess) -> None:
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _slowest(answers: Sequence[Answer], key: Literal["passes", "updates"]) -> float:
    """Return the seconds of the least disturbed step, of the slowest process."""
    return max(min(answer[key]) for answer in answers)


def show(result: Report) -> None:
    """Print measurement and prediction side by side."""
    columns = {
        "engine": "{engine}",
        "processes": "{processes}",
        "Mbit/s": "{link}",
        "step": "{measured[step_s]:time}",
        "predicted": "{predicted[step_s]:time}",
        "off": "{off[step_s]:+.0%}",
        "peak memory": "{measured[peak_bytes]:GiB}",
        "predicted ": "{predicted[peak_bytes]:GiB}",
        "off ": "{off[peak_bytes]:+.0%}",
        "sent a step": "{wire}",
        "predicted  ": "{predicted[wire_bytes]:B}",
    }
    rows = []
    for row in result["rows"]:
        wire = row["measured"].get("wire_bytes")
        link = f"{row['mbit']:,}" if row["mbit"] else "memory"
        rows.append({**row, "link": link, "wire": report.quantity(wire, "B") if wire else "-"})
    worst = {key: max(abs(row["off"][key]) for row in rows) for key in ("step_s", "peak_bytes")}
    title = report.fill("The plan is off by at most {step_s:.0%} in time and {peak_bytes:.0%} in memory", worst)
    report.table(title, columns, rows)

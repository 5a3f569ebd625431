"""tlf-bench: what this machine can do, and what this toolkit makes of it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tinyllava_fast.bench.gpu_settings import GpuSettings
from tinyllava_fast.bench.look_settings import LookSettings
from tinyllava_fast.bench.race_settings import RaceSettings
from tinyllava_fast.bench.settings import (
    SMOLLM2,
    TINYLLAMA_1B,
    FitSettings,
    InferSettings,
    OpsSettings,
    PackingSettings,
    ParitySettings,
    PlanCheckSettings,
    PlanSettings,
    RanksSettings,
    ScalingSettings,
    ServeSettings,
    Settings,
    StreamSettings,
    TrainSettings,
)
from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import path_argument

R = TypeVar("R", bound=Mapping[str, object])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tlf-bench COMMAND``; returns the exit code, 2 for a user's mistake."""
    args = _parser().parse_args(argv)
    setup_logging()
    # SIGTERM unwinds like an exception: worker processes and temporary folders must not outlive the command
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return args.run(args)
    except UserError as error:
        log.error("%s", error)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def _path(text: str) -> Path:
    return Path(path_argument(text))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tlf-bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
        settings: type[Settings] | None = None,
        workload: Path | None = None,
        workload_text: str = "SmolLM2-135M + SigLIP-B/16-224",
    ) -> argparse.ArgumentParser:
        """Add a command with its settings as flags, and with --config where it has a workload."""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=path_argument, metavar="FILE", help="also write the report there")
        if name not in ("triton", "plan", "gpu", "predict"):  # which measure nothing, or have --dry-run
            sub.add_argument(
                "--quick", action="store_true", help="tiny measurements that only show that the command works"
            )
        if workload is not None:
            text = f"workload YAML (default: {workload_text})"
            sub.add_argument("--config", type=_path, default=workload, help=text)
        if settings is not None:
            settings.add_to(sub)
        return sub

    def overrides(sub: argparse.ArgumentParser, example: str = "engine.threads=2") -> None:
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"e.g. {example}")

    def plot(sub: argparse.ArgumentParser, text: str) -> None:
        sub.add_argument("--plot", metavar="DIR", type=_path, help=text)

    machine = command("machine", _machine, "Measured GEMM peak per dtype, copy bandwidth, cores, versions.")
    machine.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")

    text = "Training step against transformers' Llava + HF Trainer, interleaved in one run."
    train = command("train", _train, text, TrainSettings, SMOLLM2)
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile ours")
    overrides(train)

    text = "Time and memory of our training step at growing numbers of tokens."
    scaling = command("scaling", _scaling, text, ScalingSettings, SMOLLM2)
    scaling.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the step")
    plot(scaling, "draw both against the tokens, as scaling.png")
    overrides(scaling)

    text = "The same steps by one process and by several on the same cores, and how long processes are idle."
    overrides(command("ranks", _ranks, text, RanksSettings, SMOLLM2))

    text = "Memory and time of a 1.1 B model's step by recipe, and what fits which GPU."
    fit = command("fit", _fit, text, FitSettings, TINYLLAMA_1B, "TinyLlama's shapes + SigLIP-so400m")
    fit.add_argument("--table", metavar="FILE", type=_path, help="also write the table there, as Markdown")
    overrides(fit, "engine.gradient_checkpointing=true")

    text = "Loss curves against a plain float32 loop, one sample at a time, and its noise from seed to seed."
    parity = command("parity", _parity, text, ParitySettings, SMOLLM2, "SmolLM2-135M; its last stage is trained")
    overrides(parity)

    text = "Answers a second and latency against transformers' generate, interleaved in one run."
    infer = command("infer", _infer, text, InferSettings, SMOLLM2)
    plot(infer, "draw rates and latencies, as infer.png")
    infer.add_argument("--threads", type=int, help="CPU threads of both sides (default: all cores)")

    text = "Ours against OpenVINO GenAI and llama.cpp on this CPU, in turns; each is installed in the cache folder."
    command("race", _race, text, RaceSettings, SMOLLM2)

    text = "tlf-serve under the load of many clients, against the engine alone."
    command("serve", _serve, text, ServeSettings, SMOLLM2)

    text = "Each op on real shapes: torch eager and compiled, the libraries that install, ours."
    ops = command("ops", _ops, text, OpsSettings)
    plot(ops, "run further sizes and draw time and memory against size")
    ops.add_argument(
        "--compare", metavar="FILE", help="compare with a file of --json; exit with 1 if a row has become slower"
    )
    ops.add_argument(
        "--compare-anyway", action="store_true", help="even if that file is of another machine, dtype or format"
    )
    ops.add_argument("--tune", action="store_true", help="on a GPU: measure and store launch settings")

    text = "What the maps of tlf-look are worth, on easy-VQA pictures whose shape has a known place."
    look = command("look", _look, text, LookSettings)
    look.add_argument("model", type=path_argument, help="model folder, e.g. runs/demo/final")

    text = "How full packs get, on lengths in the shape of LLaVA-1.5's instruction mix."
    command("packing", _packing, text, PackingSettings)

    text = "Memory, bytes over the wire and step time of each engine on 1 to 1,024 GPUs, predicted."
    plan = command("plan", _plan, text, PlanSettings)
    plot(plan, "draw the efficiency of each engine against the GPUs, as plan.png")

    text = "That plan against measurement: processes of this machine, also over links of limited speed."
    command("plan-check", _plan_check, text, PlanCheckSettings)
    text = "A million records through a stream: rate, memory from beginning to end, resumption."
    command("stream", _stream, text, StreamSettings)

    text = "Everything that needs a GPU, in minutes: kernels, parity, training, generation, tuning; one report."
    command("gpu", _gpu, text, GpuSettings)
    text = "Milliseconds that each kernel and step should take on each GPU, and what bounds it, reckoned."
    predict = command("predict", _predict, text)
    predict.add_argument("--page", metavar="FILE", type=_path, help="write the tables into this Markdown page")

    text = "Registers, spills, shared memory and tensor-core instructions of every Triton kernel; needs no GPU."
    triton = command("triton", _triton, text)
    triton.add_argument(
        "--arch", default="sm_80,sm_90", help="comma-separated, of sm_80, sm_90, sm_100 (default: the table's)"
    )
    triton.add_argument("--check", action="store_true", help="exit with 1 if a kernel falls behind the committed table")

    text = "Write the tables of the documentation from bench/results; run it in a checkout."
    docs = commands.add_parser("docs", help=text, description=text)
    docs.set_defaults(run=_docs)
    docs.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    return parser


def _tell(
    args: argparse.Namespace,
    result: R,
    show: Callable[[R], None],
    draw: Callable[[R, Path], list[Path]] | None = None,
) -> int:
    """Show the report, write it where --json says, and draw it where --plot says; returns the exit code."""
    from tinyllava_fast.bench import report

    show(result)
    report.write_json(result, args.json)
    if draw is not None and args.plot is not None:
        for path in draw(result, args.plot):
            log.info("wrote %s", path)
    return 0


def _machine(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import machine

    machine.check_device(args.device)
    return _tell(args, machine.measure(args.device, quick=args.quick), machine.show)


def _train(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import train

    return _tell(args, train.benchmark(args.config, _overrides(args), TrainSettings.read(args)), train.show)


def _scaling(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import plots, scaling

    result = scaling.benchmark(args.config, _overrides(args), ScalingSettings.read(args))
    return _tell(args, result, scaling.show, plots.draw_scaling)


def _ranks(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import ranks

    return _tell(args, ranks.benchmark(args.config, args.overrides, RanksSettings.read(args)), ranks.show)


def _fit(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import fit, report

    result = fit.benchmark(args.config, args.overrides, FitSettings.read(args))
    code = _tell(args, result, fit.show)
    report.write_text(fit.table(result), args.table, "--table")
    return code


def _parity(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import parity

    return _tell(args, parity.benchmark(args.config, args.overrides, ParitySettings.read(args)), parity.show)


def _race(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import race

    return _tell(args, race.benchmark(args.config, RaceSettings.read(args)), race.show)


def _serve(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import serve

    return _tell(args, serve.benchmark(args.config, ServeSettings.read(args)), serve.show)


def _overrides(args: argparse.Namespace) -> list[str]:
    """Return the configuration's keys that the command line sets."""
    chosen = [] if args.compile is None else [f"engine.compile={str(args.compile).lower()}"]
    return [*args.overrides, *chosen]


def _infer(args: argparse.Namespace) -> int:
    import torch

    from tinyllava_fast.bench import infer, plots

    if args.threads:
        torch.set_num_threads(args.threads)
    return _tell(args, infer.benchmark(args.config, InferSettings.read(args)), infer.show, plots.draw_infer)


def _ops(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import compare, machine, ops, plots

    settings = replace(OpsSettings.read(args), sweep=args.plot is not None)
    if args.tune:
        return _tune(args, settings)
    ops.check(settings)
    baseline = None
    if args.compare is not None:  # before minutes of measurement
        baseline = compare.read_baseline(args.compare, args.compare_anyway)
        if not args.compare_anyway:
            compare.check_same_machine(baseline, machine.describe(settings.device), settings.dtype, args.compare)
    result = ops.benchmark(settings)
    _tell(args, result, ops.show, plots.draw)
    if baseline is None:
        return 0
    entries = compare.compare(result, baseline)
    compare.show(entries, args.compare)
    return int(any(entry.get("slower") for entry in entries))


def _tune(args: argparse.Namespace, settings: OpsSettings) -> int:
    from tinyllava_fast.bench import tune

    if settings.ops not in ((), ("packed_attention",)):
        raise UserError(f"--tune --op {' '.join(settings.ops)}: only packed_attention has launch settings to tune")
    return _tell(args, tune.tune(), tune.show)


def _look(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import look

    return _tell(args, look.benchmark(args.model, LookSettings.read(args)), look.show)


def _packing(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import packing

    return _tell(args, packing.benchmark(PackingSettings.read(args)), packing.show)


def _plan(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import plan, plan_table, plots

    return _tell(args, plan.benchmark(PlanSettings.read(args)), plan_table.show, plots.draw_plan)


def _plan_check(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import plan_check

    return _tell(args, plan_check.benchmark(PlanCheckSettings.read(args)), plan_check.show)


def _stream(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import stream

    return _tell(args, stream.benchmark(StreamSettings.read(args)), stream.show)


def _gpu(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import gpu

    result = gpu.benchmark(GpuSettings.read(args))
    _tell(args, result, gpu.show)
    return int(any(step["problems"] or step["status"] != "done" for step in result["steps"]))


def _predict(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import predict

    result = predict.benchmark()
    code = _tell(args, result, predict.show)
    if args.page is not None:
        predict.write_page(result, args.page)
    return code


def _triton(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import triton_resources

    result = triton_resources.measure(args.arch.split(","))
    _tell(args, result, triton_resources.show)
    if not args.check:
        return 0
    table = triton_resources.read_table()
    wrong = triton_resources.problems(result, table) + triton_resources.missing(table)
    for sentence in wrong:
        log.error("%s", sentence)
    return 1 if wrong else 0


def _docs(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import pages

    changed = pages.update(Path.cwd(), check=args.check)
    for name in changed:
        log.info("%s: %s", name, "stale; tlf-bench docs writes it" if args.check else "written")
    return 1 if changed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())

"""tlf-bench: what this machine can do, and what this toolkit makes of it."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import path_argument


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

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=path_argument, metavar="FILE", help="also write the report there")
        sub.add_argument("--quick", action="store_true", help="tiny measurements that only show that the command works")
        return sub

    machine = command("machine", _machine, "Measured GEMM peak per dtype, copy bandwidth, cores, versions.")
    machine.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")

    train = command("train", _train, "Training step against transformers' Llava + HF Trainer, interleaved in one run.")
    train.add_argument("--config", type=_path, help="workload YAML (default: SmolLM2-135M + SigLIP-B/16-224)")
    train.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    train.add_argument("--steps", type=int, default=1, help="steps of each competitor in a round (default 1)")
    train.add_argument("--warmup", type=int, default=2, help="untimed first steps of each (default 2)")
    train.add_argument("--samples", type=int, default=8, help="samples a step (default 8)")
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile ours")
    train.add_argument(
        "--peer",
        action="append",
        metavar="WEIGHTS",
        help="how the peer keeps its weights: bf16, autocast, master, float32; repeat for several peers (default bf16)",
    )
    train.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="after the race, take the losses of the peer in float32 (default yes)",
    )
    train.add_argument(
        "--mode",
        default="finetune",
        help="finetune, finetune-cached (our tower's features cached), pretrain (connector only), pretrain-cached, "
        "lora (against peft's), qlora (nf4; against our lora and peft's)",
    )
    train.add_argument(
        "--lora-rank", type=int, default=128, help="rank in lora and qlora (default 128; alpha twice it)"
    )
    train.add_argument("--peer-checkpointing", action="store_true", help="the peer recomputes its activations")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. engine.threads=2")

    scaling = command("scaling", _scaling, "Time and memory of our training step at growing numbers of tokens.")
    scaling.add_argument("--config", type=_path, help="workload YAML (default: SmolLM2-135M + SigLIP-B/16-224)")
    scaling.add_argument("--samples", type=int, default=4, help="samples of the smallest step (default 4)")
    scaling.add_argument("--factor", type=int, action="append", help="size of a step in those; repeat (1, 2, 4)")
    scaling.add_argument("--steps", type=int, default=4, help="timed steps of each size (default 4)")
    scaling.add_argument("--warmup", type=int, default=2, help="untimed first steps of each size (default 2)")
    scaling.add_argument("--mode", default="finetune", help="as of train (default finetune)")
    scaling.add_argument("--lora-rank", type=int, default=128, help="rank in lora and qlora (default 128)")
    scaling.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the step")
    scaling.add_argument("--plot", metavar="DIR", type=_path, help="draw both against the tokens, as scaling.png")
    scaling.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. engine.threads=2")

    fit = command("fit", _fit, "Memory and time of a 1.1 B model's step by recipe, and what fits which GPU.")
    fit.add_argument("--config", type=_path, help="workload YAML (default: TinyLlama's shapes + SigLIP-so400m)")
    fit.add_argument("--recipe", action="append", help="only this row of the table; repeat for several")
    fit.add_argument("--samples", type=int, action="append", help="samples of a step; repeat (1, 3)")
    fit.add_argument("--steps", type=int, default=2, help="timed steps of each size (default 2)")
    fit.add_argument("--lora-rank", type=int, default=128, help="rank in lora and qlora (default 128)")
    fit.add_argument("--limit", type=float, default=0, help="GiB that a state may take (default: what is available)")
    fit.add_argument("--table", metavar="FILE", type=_path, help="also write the table there, as Markdown")
    fit.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. engine.gradient_checkpointing=true")

    text = "Loss curves against a plain float32 loop, one sample at a time, and its noise from seed to seed."
    parity = command("parity", _parity, text)
    parity.add_argument("--config", type=_path, help="its last stage is trained (default: SmolLM2-135M)")
    parity.add_argument("--steps", type=int, default=20, help="of each seed (default 20)")
    parity.add_argument("--samples", type=int, default=4, help="samples a step (default 4)")
    parity.add_argument("--seeds", type=int, default=3, help="seeds, from 0 on (default 3)")
    parity.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. engine.threads=2")

    infer = command(
        "infer", _infer, "Answers a second and latency against transformers' generate, interleaved in one run."
    )
    infer.add_argument("--config", type=_path, help="workload YAML (default: SmolLM2-135M + SigLIP-B/16-224)")
    infer.add_argument(
        "--questions", type=int, default=600, help="questions that ours answers in a round (default 600)"
    )
    infer.add_argument("--peer-questions", type=int, default=32, help="of them for the batched peer (default 32)")
    infer.add_argument("--single-questions", type=int, default=8, help="of them for the peer of batch 1 (default 8)")
    infer.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    infer.add_argument("--requests", type=int, default=10, help="single requests timed for latency (default 10)")
    infer.add_argument("--weights", help="of our language model: int8 or nf4 (default: dense, as --dtype)")
    infer.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32 (default bfloat16)")
    infer.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile our decode step (default: no)")
    infer.add_argument(
        "--agreement", action=argparse.BooleanOptionalAction, default=True, help="compare float32 answers too"
    )
    infer.add_argument("--plot", metavar="DIR", type=_path, help="draw rates and latencies, as infer.png")
    infer.add_argument("--threads", type=int, help="CPU threads of both sides (default: all cores)")

    text = "Each op on real shapes: torch eager and compiled, the libraries that install, ours."
    ops = command("ops", _ops, text)
    ops.add_argument("--op", action="append", help="only this op; may be repeated")
    ops.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32 (default bfloat16)")
    ops.add_argument("--rounds", type=int, default=9, help="most timed rounds of a row (default 9)")
    ops.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    ops.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="include candidates under torch.compile (default yes)",
    )
    ops.add_argument(
        "--plot", metavar="DIR", type=_path, help="run further sizes and draw time and memory against size"
    )
    ops.add_argument(
        "--compare", metavar="FILE", help="compare with a file of --json; exit with 1 if a row has become slower"
    )
    ops.add_argument(
        "--compare-anyway", action="store_true", help="even if that file is of another machine, dtype or format"
    )
    ops.add_argument("--tune", action="store_true", help="on a GPU: measure and store launch settings")

    packing = command(
        "packing", _packing, "How full packs get, on lengths in the shape of LLaVA-1.5's instruction mix."
    )
    packing.add_argument("--records", type=int, default=665_000, help="records of an epoch (default 665,000)")
    packing.add_argument("--text-only", type=float, default=0.06, help="share of records without image (default 0.06)")
    packing.add_argument("--longest", type=int, default=2048, help="tokens that a record is cut at (default 2048)")
    packing.add_argument("--tokens", type=int, action="append", help="budget of a pack; repeat (4096, 8448, 16384)")
    packing.add_argument("--image-tokens", type=int, action="append", help="of an image; repeat (196, 576, 729)")
    packing.add_argument("--lookahead", type=int, default=512, help="records the planner looks at (default 512)")
    packing.add_argument("--seed", type=int, default=0, help="of the lengths and their order (default 0)")

    text = "Registers, spills, shared memory and tensor-core instructions of every Triton kernel; needs no GPU."
    triton = commands.add_parser("triton", help=text, description=text)
    triton.set_defaults(run=_triton)
    triton.add_argument(
        "--arch", default="sm_80,sm_90", help="comma-separated, of sm_80, sm_90, sm_100 (default: the table's)"
    )
    triton.add_argument("--json", type=path_argument, metavar="FILE", help="also write the table there")
    triton.add_argument("--check", action="store_true", help="exit with 1 if a kernel falls behind the committed table")
    return parser


def _machine(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import machine, report

    machine.check_device(args.device)
    result = machine.measure(args.device, quick=args.quick)
    rows = [[k, str(v)] for k, v in result.items() if k not in ("gemm", "copy_bytes_per_s")]
    rows += [[f"GEMM {k}", report.quantity(v["flops_per_s"], "FLOP/s")] for k, v in result["gemm"].items()]
    rows.append(["copy", report.quantity(result["copy_bytes_per_s"], "B/s")])
    report.show("This machine", ["", "value"], rows)
    report.write_json(result, args.json)
    return 0


def _train(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import report, train

    settings = train.Settings(
        rounds=args.rounds,
        steps=args.steps,
        warmup=args.warmup,
        samples=args.samples,
        peers=tuple(args.peer or train.Settings.peers),
        mode=args.mode,
        peer_checkpointing=args.peer_checkpointing,
        lora_rank=args.lora_rank,
        reference=args.reference,
        quick=args.quick,
    )
    result = train.benchmark(args.config or train.WORKLOAD, _overrides(args), settings)
    train.show(result)
    report.write_json(result, args.json)
    return 0


def _scaling(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import plots, report, scaling, train

    settings = scaling.Settings(
        factors=tuple(args.factor or scaling.Settings.factors),
        samples=1 if args.quick else args.samples,
        steps=1 if args.quick else args.steps,
        warmup=1 if args.quick else args.warmup,
        mode=args.mode,
        lora_rank=args.lora_rank,
    )
    result = scaling.benchmark(args.config or train.WORKLOAD, _overrides(args), settings)
    scaling.show(result)
    report.write_json(result, args.json)
    if args.plot is not None:
        log.info("wrote %s", plots.draw_scaling(result, args.plot))
    return 0


def _fit(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import fit, report

    settings = fit.Settings(
        recipes=tuple(args.recipe or fit.RECIPES),
        samples=tuple(args.samples or fit.Settings.samples),
        steps=1 if args.quick else args.steps,
        lora_rank=args.lora_rank,
        limit=int(args.limit * 2**30),
    )
    result = fit.benchmark(args.config or fit.WORKLOAD, args.overrides, settings)
    fit.show(result)
    report.write_json(result, args.json)
    report.write_text(fit.table(result), args.table, "--table")
    return 0


def _parity(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import parity, report, train

    given = {"steps": 2, "samples": 2, "seeds": 2} if args.quick else {}
    names = [field.name for field in dataclasses.fields(parity.Settings)]
    settings = parity.Settings(**{name: getattr(args, name) for name in names} | given)
    result = parity.benchmark(args.config or train.WORKLOAD, args.overrides, settings)
    parity.show(result)
    report.write_json(result, args.json)
    return 0


def _overrides(args: argparse.Namespace) -> list[str]:
    """The configuration's keys that the command line sets."""
    chosen = [] if args.compile is None else [f"engine.compile={str(args.compile).lower()}"]
    return [*args.overrides, *chosen]


def _infer(args: argparse.Namespace) -> int:
    import torch

    from tinyllava_fast.bench import infer, plots, report

    if args.threads:
        torch.set_num_threads(args.threads)
    names = [field.name for field in dataclasses.fields(infer.Settings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    settings = infer.Settings(**given)
    result = infer.benchmark(args.config or infer.WORKLOAD, infer.quick(settings) if args.quick else settings)
    infer.show(result)
    if args.plot is not None:
        log.info("wrote %s", plots.draw_infer(result, args.plot))
    report.write_json(result, args.json)
    return 0


def _ops(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import compare, machine, ops, ops_table, plots, report

    if args.tune:
        return _tune(args)
    ops.check(args.op, args.dtype, args.device, args.rounds)
    baseline = None
    if args.compare is not None:  # before minutes of measurement
        baseline = compare.read_baseline(args.compare, args.compare_anyway)
        if not args.compare_anyway:
            compare.check_same_machine(baseline, machine.describe(args.device), args.dtype, args.compare)
    result = ops.benchmark(
        args.op,
        dtype=args.dtype,
        device=args.device,
        rounds=args.rounds,
        quick=args.quick,
        sweep=args.plot is not None,
        compile=args.compile,
    )
    ops_table.show(result)
    report.write_json(result, args.json)
    if args.plot is not None:
        for path in plots.draw(result, args.plot):
            log.info("wrote %s", path)
    if baseline is None:
        return 0
    entries = compare.compare(result, baseline)
    compare.show(entries, args.compare)
    return int(any(entry.get("slower") for entry in entries))


def _packing(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import packing, report

    settings = packing.Settings(
        records=args.records,
        text_only=args.text_only,
        longest=args.longest,
        budgets=tuple(args.tokens or packing.BUDGETS),
        image_tokens=tuple(args.image_tokens or packing.IMAGE_TOKENS),
        lookahead=args.lookahead,
        seed=args.seed,
    )
    result = packing.benchmark(packing.quick(settings) if args.quick else settings)
    packing.show(result)
    report.write_json(result, args.json)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import report, tune

    if args.op and args.op != ["packed_attention"]:
        raise UserError(f"--tune --op {' '.join(args.op)}: only packed_attention has launch settings to tune")
    result = tune.tune()
    tune.show(result)
    report.write_json(result, args.json)
    return 0


def _triton(args: argparse.Namespace) -> int:
    from tinyllava_fast.bench import report, triton_resources

    result = triton_resources.measure(args.arch.split(","))
    triton_resources.show(result)
    report.write_json(result, args.json)
    if not args.check:
        return 0
    table = triton_resources.read_table()
    wrong = triton_resources.problems(result, table) + triton_resources.missing(table)
    for sentence in wrong:
        log.error("%s", sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

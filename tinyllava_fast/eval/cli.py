"""tlf-eval: evaluate a model folder or a server on benchmarks, score answers that exist, compare two models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_fast.commands import INTERRUPTED, Parser
from tinyllava_fast.errors import LostError, SaidError, UserError, writing
from tinyllava_fast.infer.flags import (
    add_adapter_flag,
    add_model_flags,
    add_server_flags,
    positive,
    server_of,
    threads,
)
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import path_argument
from tinyllava_fast.plugins import load_plugins

ENDPOINT = "--endpoint"
EXAMPLES = """
  tlf-eval runs/demo/final --benchmarks easy_vqa --data data --explain 8
  tlf-eval runs/mine/final --benchmarks vqav2,gqa,textvqa,pope --data /path/to/eval
  tlf-eval runs/mine/final --benchmarks custom --data data --option custom.images=images
  tlf-eval --endpoint http://localhost:8000 --benchmarks pope --data /path/to/eval
  tlf-eval --benchmarks all --data /path/to/eval --dry-run
  tlf-eval --benchmarks pope --data /path/to/eval --score-only answers.jsonl
  tlf-eval --compare runs/a/eval/gqa runs/b/eval/gqa
"""


def parser() -> argparse.ArgumentParser:
    """The command line of tlf-eval."""
    p = Parser(
        prog="tlf-eval",
        description=__doc__,
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", nargs="?", type=path_argument, help="model folder, e.g. runs/demo/final")
    p.add_argument("--benchmarks", metavar="NAMES", help="comma list of registered benchmarks, or all")
    p.add_argument("--data", type=path_argument, metavar="DIR", help="folder of all benchmarks, or of the only one")
    p.add_argument(
        "--output",
        type=path_argument,
        metavar="DIR",
        help="results folder (default: eval beside the model folder; of a server eval-MODEL here)",
    )
    p.add_argument(
        "--option", action="append", default=[], metavar="BENCHMARK.OPTION=VALUE", help="e.g. textvqa.ocr=false"
    )
    p.add_argument("--limit", type=positive, metavar="N", help="ask only the first N questions of each")
    p.add_argument(
        "--explain", type=positive, metavar="N", help="also look inside N right and N wrong answers, in the report"
    )
    p.add_argument("--blind", action="store_true", help="control: replace every image by a blank one")
    p.add_argument(
        "--missing-images",
        choices=("error", "empty"),
        default="error",
        help="empty: score questions about images that are not there as empty answers (default: error)",
    )
    other = p.add_mutually_exclusive_group()
    other.add_argument("--dry-run", action="store_true", help="check files, counts and first prompts; load no model")
    other.add_argument(
        "--score-only", type=path_argument, metavar="FILE", help="score an answers file, ours, LLaVA's or TinyLLaVA's"
    )
    other.add_argument(
        "--compare",
        nargs=2,
        type=path_argument,
        metavar=("A", "B"),
        help="two results folders or answer files of one benchmark, paired",
    )
    p.add_argument(
        "--allow-different",
        action="store_true",
        help="with --compare: pair questions even where their prompts, pictures or right answers differ",
    )
    group = add_server_flags(p, ENDPOINT)
    group.add_argument("--concurrency", type=positive, default=8, metavar="N", help="requests in flight (default: 8)")
    add_model_flags(p)
    add_adapter_flag(p)
    p.add_argument("--batch-tokens", type=positive, default=16384, metavar="N", help="tokens in flight (memory)")
    p.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: all cores)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-eval.

    Returns 0, 2 after printing what is wrong with the input, 1 if another process has died, 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    args = parser().parse_args(argv)
    setup_logging()
    try:
        load_plugins(args.plugin)
        if args.explain and (args.compare or _is_free(args)):
            raise UserError("--explain looks into the model, which --dry-run, --score-only and --compare do not open")
        said = _compare(args) if args.compare else _without_model(args) if _is_free(args) else _evaluate(args)
    except UserError as error:
        log.error("%s", error)
        return 2
    except LostError as error:
        log.error("%s", error)
        return 1
    except SaidError as error:
        return error.exit_code
    except KeyboardInterrupt:
        log.error("stopped; the answers so far are kept: the same command goes on with the others")
        return INTERRUPTED
    if said:
        sys.stdout.write(said + "\n")
    return 0


def _is_free(args: argparse.Namespace) -> bool:
    return bool(args.dry_run or args.score_only)


def _evaluate(args: argparse.Namespace) -> str:
    from tinyllava_fast.eval.options import chosen
    from tinyllava_fast.eval.results import table

    if not (args.model or args.server):
        raise UserError(
            f"give a model folder, or --dry-run, --score-only or --compare, which need none, or a server by {ENDPOINT}"
        )
    _need(args, "benchmarks")
    names = chosen(args.benchmarks)
    _need(args, "data")
    import torch

    from tinyllava_fast.eval.endpoint import EndpointModel
    from tinyllava_fast.eval.report import write_scores
    from tinyllava_fast.eval.runner import default_output, evaluate

    if args.threads:
        torch.set_num_threads(args.threads)
    endpoint = server_of(args, ENDPOINT, also={"--explain": args.explain})
    if args.explain and args.blind:
        raise UserError("--explain looks at pictures, and --blind shows none; leave one of them out")
    model = args.model if endpoint is None else EndpointModel(endpoint, args.concurrency)
    output = Path(args.output) if args.output else default_output(model, args.blind)
    results = evaluate(
        model,
        names,
        args.data,
        output,
        options=args.option,
        blind=args.blind,
        limit=args.limit,
        missing_images=args.missing_images,
        dtype=args.dtype,
        weights=args.weights,
        device=args.device,
        adapter=args.adapter,
        speculate=args.speculate,
        batch_tokens=args.batch_tokens,
        threads=args.threads or torch.get_num_threads(),
        plugins=args.plugin,
    )
    if not results:
        return ""
    if args.explain:
        with writing(output):
            write_scores(output, list(results))  # looks take long and may fail; the scores are there before
        _explain(args, output, list(results))
    with writing(output):
        report = write_scores(output, list(results))
    log.info("results: %s, %s", output / "results.json", report)
    return table(results.values())


def _explain(args: argparse.Namespace, output: Path, names: Sequence[str]) -> None:
    from tinyllava_fast.eval.explain import explain
    from tinyllava_fast.eval.options import build
    from tinyllava_fast.look.assistant import Assistant

    assistant = Assistant.from_pretrained(
        args.model, dtype=args.dtype, device=args.device, adapter=args.adapter, prepare=False
    )
    for benchmark in build(names, args.option):
        explain(assistant, output / benchmark.name, args.explain, max_new_tokens=benchmark.max_new_tokens)


def _without_model(args: argparse.Namespace) -> str:
    from tinyllava_fast.eval.official import experiment_name, read_answers
    from tinyllava_fast.eval.options import build, chosen, describe
    from tinyllava_fast.eval.plan import make_plans
    from tinyllava_fast.eval.results import conclude, score_only, table
    from tinyllava_fast.eval.types import AnswerRecord, Facts

    _need(args, "benchmarks")
    benchmarks = build(chosen(args.benchmarks), args.option)
    _need(args, "data")
    plans = make_plans(
        benchmarks, args.data, limit=args.limit, missing_images="ignore" if args.score_only else args.missing_images
    )
    if args.dry_run:
        return "\n".join(plan.report() for plan in plans)
    if len(plans) != 1:
        raise UserError("--score-only takes the answers of one benchmark; give one name in --benchmarks")
    path, plan = Path(args.score_only), plans[0]
    answers = read_answers(path, plan.benchmark, plan.everything)
    records: dict[str, AnswerRecord] = {key: {"answer": text} for key, text in answers.items()}
    facts: Facts = {"answers": str(path), "options": describe(plan.benchmark)}
    if args.output:
        return table([conclude(plan, records, facts, Path(args.output) / plan.name, experiment_name(path.stem))])
    return table([score_only(plan, records, facts)])


def _compare(args: argparse.Namespace) -> str:
    from tinyllava_fast.eval.compare import compare
    from tinyllava_fast.eval.options import build, chosen
    from tinyllava_fast.eval.plan import make_plans

    plan = None
    if args.benchmarks and args.data:
        plans = make_plans(build(chosen(args.benchmarks), args.option), args.data, missing_images="ignore")
        if len(plans) != 1:
            raise UserError("--compare takes one benchmark; give one name in --benchmarks")
        plan = plans[0]
    a, b = map(Path, args.compare)
    return str(compare(a, b, plan, allow_different=args.allow_different))


def _need(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; tlf-eval --help shows examples")


if __name__ == "__main__":
    sys.exit(main())

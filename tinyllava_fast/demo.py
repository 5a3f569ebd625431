"""The demo: easy-VQA from nothing to a report. ``python -m tinyllava_fast.demo [--config FILE] [--fresh]``.

Prepares the data, trains, evaluates on all test questions, evaluates once more on blank images, and writes the report.
What is done already is not done again: a killed demo goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log, setup_logging

DATA = Path("data/easy_vqa")
BENCHMARK = "easy_vqa"
NOTE = (
    "Captions for the first stage (“a red circle”) were generated from the answers to the training questions; "
    "finetuning and the test use easy-VQA's own questions. No test image is trained on."
)


def parser() -> argparse.ArgumentParser:
    """Return the command line of the demo."""
    p = Parser(prog="python -m tinyllava_fast.demo", description=__doc__)
    p.add_argument("--config", default="configs/demo.yaml", metavar="FILE", help="run configuration")
    p.add_argument("--data", default=str(DATA), metavar="DIR", help="where easy-VQA is, or is written to")
    p.add_argument("--fresh", action="store_true", help="train and evaluate again even if that is done")
    p.add_argument("--limit", type=int, metavar="N", help="ask only the first N test questions")
    p.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the run configuration")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0, 2 after printing what is wrong with the input, or the exit code of a failed training."""
    args = parser().parse_args(argv)
    setup_logging()
    try:
        return run(
            Path(args.config), Path(args.data), fresh=args.fresh, limit=args.limit, overrides=list(args.overrides)
        )
    except UserError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on where it stopped")
        return 130


def run(
    config: Path, data: Path, *, fresh: bool = False, limit: int | None = None, overrides: Sequence[str] = ()
) -> int:
    """Run all steps and return the exit code. results.json, report.html and report.png go to the run folder."""
    from tinyllava_fast.config.load import dump, load_run
    from tinyllava_fast.data.easy_vqa import prepare

    loaded = load_run(config, list(overrides))
    run_dir = Path(loaded.output_dir)
    log.info("easy-VQA is in %s", prepare(data))
    if fresh:
        for folder in ("eval", "eval-blind"):
            shutil.rmtree(run_dir / folder, ignore_errors=True)
    if not fresh and is_trained(run_dir, dump(loaded)):
        log.info("%s is trained already (--fresh trains again)", run_dir)
    elif code := train(config, overrides, fresh=fresh):
        return code
    from tinyllava_fast.eval.report import write_report
    from tinyllava_fast.eval.results import write_json
    from tinyllava_fast.eval.runner import default_output, evaluate

    model = run_dir / "final"
    seen, unseen = (evaluate(model, [BENCHMARK], data, blind=blind, limit=limit)[BENCHMARK] for blind in (False, True))
    folders = [default_output(model, blind) / BENCHMARK for blind in (False, True)]
    results = summarize(json.loads((run_dir / "summary.json").read_text(encoding="utf-8")), seen, unseen)
    write_json(run_dir / "results.json", results)
    captions = any(Path(stage.data.records).name == "captions.json" for stage in loaded.stages)
    note = NOTE if captions else ""
    page, picture = write_report(run_dir, *folders, note=note)
    show(results, {row["name"]: row["questions"] for row in seen["tables"]["type"]})
    log.info("results: %s", run_dir / "results.json")
    log.info("report:  %s, %s", page, picture)
    log.info("to ask it yourself: %s %s, then open http://127.0.0.1:8000", server_command(), model)
    return 0


def is_trained(run_dir: Path, config: str) -> bool:
    """Return True if a run of exactly this resolved configuration has finished there."""
    saved = run_dir / "config.yaml"
    finished = (run_dir / "summary.json").is_file() and (run_dir / "final" / "config.json").is_file()
    return finished and saved.is_file() and saved.read_text(encoding="utf-8") == config


def train(config: Path, overrides: Sequence[str], *, fresh: bool) -> int:
    """Train in a process of its own, so that its memory is its own; returns the exit code.

    Signals end in a checkpoint: Ctrl-C reaches both processes and this one waits, SIGTERM is passed on.
    """
    process = subprocess.Popen(trainer_command(config, overrides, fresh))
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                log.info("waiting for the training to save its checkpoint; press Ctrl-C again to stop at once")
    finally:
        signal.signal(signal.SIGTERM, previous)


def trainer_command(config: Path, overrides: Sequence[str], fresh: bool) -> list[str]:
    """Return the command line of tlf-train, run by this interpreter."""
    resume = "never" if fresh else "auto"
    return [sys.executable, "-m", "tinyllava_fast.train.cli", str(config), "--resume", resume, *overrides]


def server_command() -> str:
    """Return how tlf-serve is called: by its name, or by its path from here where the name alone is not found."""
    return "tlf-serve" if shutil.which("tlf-serve") else os.path.relpath(Path(sys.executable).with_name("tlf-serve"))


def summarize(training: dict[str, float], seen: Mapping[str, Any], unseen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of results.json, from the training summary and the two evaluations."""
    run = seen["run"]
    return {
        "accuracy": _accuracy(seen["metrics"]),
        "questions": seen["questions"],
        "accuracy_by_type": {row["name"]: _accuracy([row]) for row in seen["tables"]["type"]},
        "blind_accuracy": _accuracy(unseen["metrics"]),
        "blind_accuracy_by_type": {row["name"]: _accuracy([row]) for row in unseen["tables"]["type"]},
        "train_seconds": training["train_seconds"],
        "eval_seconds": run["eval_seconds"],
        "samples_per_s": training["samples_per_s"],
        "tokens_per_s": training["tokens_per_s"],
        "questions_per_s": run["questions_per_s"],
        "peak_rss_bytes": max(training["peak_rss_bytes"], run["peak_rss_bytes"]),
        "train_peak_rss_bytes": training["peak_rss_bytes"],
        "eval_peak_rss_bytes": run["peak_rss_bytes"],
        "model_digest": seen["model_digest"],
        "machine": run["machine"],
        "versions": seen["versions"],
    }


def _accuracy(metrics: list[dict[str, float]]) -> float:
    """Return the first metric as a share 0..1."""
    return float(metrics[0]["value"] / metrics[0]["scale"])


def show(results: dict[str, Any], counts: dict[str, int]) -> None:
    """Print the results as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    from tinyllava_fast.eval.report.html import duration, size

    table = Table(title=f"easy-VQA, {results['questions']:,} test questions", title_justify="left")
    for name in ("type", "questions", "accuracy", "blank images"):
        table.add_column(name, justify="left" if name == "type" else "right")
    for kind, accuracy in results["accuracy_by_type"].items():
        table.add_row(kind, f"{counts[kind]:,}", f"{accuracy:.2%}", f"{results['blind_accuracy_by_type'][kind]:.2%}")
    table.add_section()
    table.add_row(
        "all",
        f"{results['questions']:,}",
        f"{results['accuracy']:.2%}",
        f"{results['blind_accuracy']:.2%}",
        style="bold",
    )
    console = Console()
    console.print(table)
    console.print(
        f"training {duration(results['train_seconds'])}, {results['samples_per_s']:.1f} samples/s, "
        f"{results['tokens_per_s']:,.0f} tokens/s, {size(results['train_peak_rss_bytes'])} peak"
    )
    console.print(
        f"evaluation {duration(results['eval_seconds'])}, {results['questions_per_s']:.0f} questions/s, "
        f"{size(results['eval_peak_rss_bytes'])} peak"
    )


if __name__ == "__main__":
    sys.exit(main())

"""tlf-eval: evaluate a model folder on a benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.plugins import load_plugins


def parser() -> argparse.ArgumentParser:
    """The command line of tlf-eval."""
    p = argparse.ArgumentParser(prog="tlf-eval", description=__doc__)
    p.add_argument("model", help="model folder, e.g. runs/demo/final")
    p.add_argument("--benchmark", default="easy_vqa", help="registered benchmark (default: easy_vqa)")
    p.add_argument("--data", required=True, metavar="DIR", help="folder with the benchmark's files")
    p.add_argument("--output", metavar="DIR", help="results folder (default: eval/<benchmark> beside the model)")
    p.add_argument("--blind", action="store_true", help="control: replace every image by a blank one")
    p.add_argument("--limit", type=_positive, metavar="N", help="ask only the first N questions")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the model was saved")
    p.add_argument("--weights", choices=("bf16", "int8", "nf4"), help="language model's weights, on CPUs")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    p.add_argument("--batch-tokens", type=_positive, default=16384, metavar="N", help="tokens in flight (memory)")
    p.add_argument("--plugin", action="append", default=[], metavar="FILE", help="Python file with components of yours")
    p.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all cores)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-eval. Returns 0, or 2 after printing what is wrong with the input."""
    args = parser().parse_args(argv)
    setup_logging()
    import torch

    from tinyllava_fast.eval.runner import evaluate

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        load_plugins(args.plugin)
        results = evaluate(
            args.model,
            args.benchmark,
            args.data,
            args.output,
            blind=args.blind,
            limit=args.limit,
            dtype=args.dtype,
            device=args.device,
            weights=args.weights,
            batch_tokens=args.batch_tokens,
            threads=args.threads or torch.get_num_threads(),
        )
    except UserError as error:
        log.error("%s", error)
        return 2
    sys.stdout.write(table(results) + "\n")
    return 0


def table(results: dict[str, object]) -> str:
    """Accuracy by type as plain text, for a terminal or a pipe."""
    counts, by_type = results["questions_by_type"], results["accuracy_by_type"]
    assert isinstance(counts, dict) and isinstance(by_type, dict)  # noqa: S101 what every benchmark's score returns
    lines = [f"{'type':<16}{'questions':>10}{'accuracy':>10}"]
    lines += [f"{kind:<16}{counts[kind]:>10}{100 * value:>9.2f}%" for kind, value in by_type.items()]
    lines.append(f"{'all':<16}{results['questions']:>10}{100 * float(str(results['accuracy'])):>9.2f}%")
    lines.append(
        f"{results['questions_per_s']} questions/s, {int(str(results['peak_rss_bytes'])) / 2**20:.0f} MiB peak"
    )
    return "\n".join(lines)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())

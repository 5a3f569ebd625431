"""tlf-doctor: what this machine can do, whether it is right, and what to mend."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log, setup_logging


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = Parser(
        prog="tlf-doctor",
        description=__doc__,
        exits={0: "healthy", 1: "found a fault", 2: "asked for something that does not exist"},
    )
    p.add_argument("--json", action="store_true", help="write everything found as JSON")
    p.add_argument("--report", action="store_true", help="write a block for a bug report, without private names")
    p.add_argument("--only", action="append", default=[], metavar="CHECK", help="this check alone; may be repeated")
    p.add_argument("--skip", action="append", default=[], metavar="CHECK", help="not this check; may be repeated")
    group = p.add_argument_group("what fits here, instead of the checks")
    group.add_argument(
        "--fit", nargs=2, metavar=("LLM", "TOWER"), help="names of configs/model/, e.g. phi_2 siglip_so400m"
    )
    group.add_argument("--recipe", default="full", help="full, full+tower, lora or pretrain (default: full)")
    group.add_argument("--lora-rank", type=int, default=128, metavar="N", help="of lora (default: 128)")
    group.add_argument("--tokens", type=int, default=8448, metavar="N", help="of a pack (default: 8448)")
    group.add_argument("--samples", type=int, default=8, metavar="N", help="of a pack, an image each (default: 8)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tlf-doctor``; returns 0 if all is well, 1 for a fault, 2 for a wrong argument."""
    args = parser().parse_args(argv)
    setup_logging()
    try:
        return _fit(args) if args.fit else _examine(args)
    except UserError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130


def _examine(args: argparse.Namespace) -> int:
    from tinyllava_fast.doctor import report
    from tinyllava_fast.doctor.examine import examine, healthy

    done = []
    for one in examine(args.only, args.skip):
        done.append(one)
        if not (args.json or args.report):
            sys.stdout.write("\n".join([*report.lines(one), ""]))
            sys.stdout.flush()
    if args.json:
        sys.stdout.write(json.dumps(report.as_json(done), indent=2, default=str) + "\n")
    elif args.report:
        sys.stdout.write(report.block(done) + "\n")
    else:
        sys.stdout.write(report.summary(done) + "\n")
    return 0 if healthy(done) else 1


def _fit(args: argparse.Namespace) -> int:
    from tinyllava_fast.doctor.fit import Question, fit, measured_device, sentences

    llm, tower = args.fit
    question = Question(llm, tower, args.recipe, args.lora_rank, args.tokens, args.samples)
    found = fit(question, measured_device())
    text = json.dumps(found, indent=2) if args.json else "\n".join(sentences(found))
    sys.stdout.write(text + "\n")
    return 0 if any(row["fits"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())

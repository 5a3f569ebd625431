"""One side of `tlf-bench train` and its kin in a process: ``python -m tinyllava_fast.bench.worker SIDE RUN.yaml``.

Nothing heavy is imported before the memory settings of `tlf-train` are in place, which torch reads once. They are ours
alone: the peer runs as transformers leaves it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import IO

from tinyllava_fast.bench.gate import Gate
from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import prepare_memory
from tinyllava_fast.log import log, setup_logging


def main(argv: Sequence[str] | None = None, answers: IO[str] | None = None) -> int:
    """Build one side and obey the gate until all packs are used or the parent closes the pipe.

    answers: where the gate speaks; None: standard output, which is then ours alone. Returns the exit code, 2 for a
    user's mistake, whose text goes to standard error.
    """
    parser = argparse.ArgumentParser(prog="tinyllava_fast.bench.worker")
    parser.add_argument("side", choices=("ours", "peer", "reference"))
    parser.add_argument("run")
    parser.add_argument("--per-step", type=int, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--liger", action="store_true")
    args = parser.parse_args(argv)
    setup_logging(logging.WARNING)
    answers = answers or _claim_stdout()
    if args.side == "ours":
        prepare_memory()
    from tinyllava_fast.bench.machine import device_peak, device_sync, pick_device
    from tinyllava_fast.bench.sides import serve
    from tinyllava_fast.config.load import load_run

    try:
        run = load_run(args.run)
        device = pick_device(run.engine.device)
        if args.side == "ours" and device == "cpu":
            from tinyllava_fast.train import cpu_pool

            cpu_pool.install()
        gate = Gate(sys.stdin, answers, device_sync(device), device_peak(device))
        serve(
            *(args.side, run, gate),
            per_step=args.per_step,
            precision=args.precision,
            checkpointing=args.checkpointing,
            attention=args.attention,
            liger=args.liger,
        )
    except UserError as error:
        log.error("%s", error)
        return 2
    except EOFError:
        pass  # the parent has all it wanted, or is gone
    return 0


def _claim_stdout() -> IO[str]:
    """Return the pipe to the parent, for us alone: whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main())

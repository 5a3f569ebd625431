"""tlf-look: what a model looked at when it answered, token by token, as one HTML file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_fast import plugins
from tinyllava_fast.commands import INTERRUPTED, Parser
from tinyllava_fast.errors import UserError, writing
from tinyllava_fast.files import write_file
from tinyllava_fast.infer.flags import add_adapter_flag, natural, positive, threads
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import path_argument

EXAMPLES = """
  tlf-look runs/demo/final picture.png "What color is the shape?"
  tlf-look runs/demo/final a.png "Which one is red?" --image b.png --png figures
"""


def parser() -> argparse.ArgumentParser:
    """The command line of tlf-look."""
    p = Parser(
        prog="tlf-look",
        description=__doc__,
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", type=path_argument, help="model folder, e.g. runs/demo/final")
    p.add_argument("picture", type=path_argument, metavar="image", help="picture file")
    p.add_argument("question", help="what to ask about it")
    p.add_argument(
        "--image", type=path_argument, action="append", default=[], metavar="FILE", help="a further picture; repeat"
    )
    p.add_argument("--output", type=path_argument, default="look.html", metavar="FILE", help="default: look.html")
    p.add_argument("--png", type=path_argument, metavar="DIR", help="also write the maps there as PNGs")
    p.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="longest answer (default: 32)")
    p.add_argument("--neutral", metavar="TEXT", help="question that attention is relative to (default: a description)")
    p.add_argument(
        "--fill",
        choices=("blank", "mean", "blur", "none"),
        default="mean",
        help="what replaces parts of the picture in the curves; none: no curves (default: mean)",
    )
    p.add_argument("--seed", type=natural, default=0, help="of the curves' random orders (default: 0)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the model was saved")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    p.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: all cores)")
    add_adapter_flag(p)
    plugins.add_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-look. Returns 0, 2 after printing what is wrong with the input, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    setup_logging()
    try:
        plugins.load_plugins(args.plugin)
        _look(args)
    except UserError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _look(args: argparse.Namespace) -> None:
    import torch

    from tinyllava_fast.look.assistant import Assistant
    from tinyllava_fast.look.curves import RANDOM
    from tinyllava_fast.look.looker import NEUTRAL
    from tinyllava_fast.look.overlay import write_pngs
    from tinyllava_fast.look.page import page
    from tinyllava_fast.look.types import DEFAULT

    if args.threads:
        torch.set_num_threads(args.threads)
    assistant = Assistant.from_pretrained(
        args.model, dtype=args.dtype, device=args.device, adapter=args.adapter, prepare=False
    )
    shown = [args.picture, *args.image]
    look = assistant.look(
        shown if args.image else args.picture,
        args.question,
        max_new_tokens=args.max_new_tokens,
        neutral=args.neutral or NEUTRAL,
        fill=None if args.fill == "none" else args.fill,
        seed=args.seed,
    )
    output = Path(args.output)
    facts = [("model", str(args.model)), ("pictures", ", ".join(map(str, shown))), ("question", args.question)]
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, page(look, facts).encode("utf-8", "replace"), durable=False)
    log.info("wrote %s", output)
    if args.png:
        log.info("wrote %d pictures to %s", len(write_pngs(look, Path(args.png))), args.png)
    sys.stdout.write(look.answer + "\n")
    if look.curves:
        own, random = look.curves[DEFAULT], look.curves[RANDOM]
        log.info(
            "%s: deletion area %.3f (random %.3f ± %.3f), insertion %.3f (random %.3f ± %.3f)",
            DEFAULT, own.deletion_area, random.deletion_area, random.deletion_error,
            own.insertion_area, random.insertion_area, random.insertion_error,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

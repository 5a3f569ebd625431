"""tlf-chat: talk to a model about an image in the terminal; answers appear as they are generated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.flags import add_model_flags
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.plugins import load_plugins

if TYPE_CHECKING:
    from tinyllava_fast.infer.assistant import Assistant


def parser() -> argparse.ArgumentParser:
    """The command line of tlf-chat."""
    p = Parser(prog="tlf-chat", description=__doc__)
    p.add_argument("model", help="model folder, e.g. runs/demo/final")
    p.add_argument("--image", metavar="FILE", help="what the conversation is about (default: nothing)")
    p.add_argument("--question", metavar="TEXT", help="ask this, print the answer and leave")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the nucleus of this probability (default: 1)")
    p.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add_model_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-chat. Returns 0, or 2 after saying what is wrong with the input."""
    args = parser().parse_args(argv)
    setup_logging()
    from tinyllava_fast.infer.assistant import Assistant

    try:
        load_plugins(args.plugin)
        assistant = Assistant.from_pretrained(args.model, dtype=args.dtype, device=args.device, weights=args.weights)
        questions = iter([args.question]) if args.question is not None else _typed()
        converse(assistant, questions, args)
    except (UserError, ValueError) as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    return 0


def converse(assistant: Assistant, questions: Iterator[str], args: Any) -> None:
    """Answer each question with all that was said before it, streaming to standard output.

    A question that cannot be answered (the conversation no longer fits the context) is reported and forgotten.
    """
    from tinyllava_fast.infer.types import Message, Request, Sampling

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    said: list[Message] = []
    for question in questions:
        messages = [*said, {"from": "human", "value": question}]
        request = Request(messages=messages, image=args.image, sampling=sampling, id="question")
        try:
            (answer,) = assistant.engine.answers([request], on_token=lambda _, piece: _show(piece))
        except UserError as error:
            if args.question is not None or not said:
                raise
            log.error("%s", error)
            continue
        _show("\n")
        said = [*messages, {"from": "gpt", "value": answer.text}]


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _typed() -> Iterator[str]:
    """Lines of standard input until it ends; empty ones are skipped."""
    while True:
        if sys.stdin.isatty():
            _show("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    sys.exit(main())

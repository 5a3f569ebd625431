"""tlf-chat: talk to a model folder or a server about images in the terminal; answers appear as they are generated.

Standard input may also be a file or a pipe: each line is a question, and nothing but the answers is printed.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tinyllava_fast.commands import INTERRUPTED, Parser
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.flags import add_adapter_flag, add_model_flags, add_server_flags, server_of, threads
from tinyllava_fast.infer.history import kept_lines
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import path_argument
from tinyllava_fast.plugins import load_plugins

if TYPE_CHECKING:
    from tinyllava_fast.infer.conversation import Conversation
    from tinyllava_fast.infer.partners import Partner

HISTORY = "chat_history"
SERVER = "--server"
LEAVE = ("quit", "exit")


def parser() -> argparse.ArgumentParser:
    """The command line of tlf-chat."""
    p = Parser(prog="tlf-chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", type=path_argument, help="model folder, e.g. runs/demo/final")
    add_server_flags(p, SERVER)
    p.add_argument(
        "--image",
        type=path_argument,
        metavar="FILE",
        action="append",
        default=[],
        help="what the conversation is about (default: nothing); may be given several times",
    )
    p.add_argument("--question", metavar="TEXT", help="ask this, print the answer and leave")
    p.add_argument("--system", metavar="TEXT", help="system text instead of the one that the model was trained with")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the nucleus of this probability (default: 1)")
    p.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default: all)")
    p.add_argument(
        "--min-p", type=float, default=0.0, help="least share of the likeliest token's probability (default: 0)"
    )
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default: 1, none)")
    p.add_argument("--presence-penalty", type=float, default=0.0, help="off each token that was said (default: 0)")
    p.add_argument(
        "--frequency-penalty", type=float, default=0.0, help="off a token, each time it is said (default: 0)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    p.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: all cores)")
    add_model_flags(p)
    add_adapter_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-chat. Returns 0, 2 after saying what is wrong with the input, 130 after Ctrl-C outside a prompt."""
    args = parser().parse_args(argv)
    setup_logging()
    _accept_any_bytes()
    try:
        load_plugins(args.plugin)
        return _run(args)
    except (UserError, ValueError) as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    from tinyllava_fast.infer.conversation import Conversation
    from tinyllava_fast.infer.types import SETTINGS, Sampling

    sampling = Sampling(**{name: getattr(args, name) for name in SETTINGS})
    talk = Conversation(_partner(args), args.image, sampling, _show, _text(args.system))
    if args.question is not None:
        talk.ask(_text(args.question) or "")
        return 0
    if not _at_terminal():
        return _answer_lines(talk)
    _show(f"{talk.partner.name}: {talk.about()}\nAsk a question. /help lists the commands, /quit or Ctrl-D leaves.\n")
    with kept_lines(HISTORY):
        return _answer_typed(talk)


def _partner(args: argparse.Namespace) -> Partner:
    """Who answers. Raises UserError as ``server_of`` and ``from_pretrained``."""
    from tinyllava_fast.infer.partners import LocalPartner, ServerPartner

    if (endpoint := server_of(args, SERVER, also={"--threads": args.threads, "--plugin": args.plugin})) is not None:
        return ServerPartner(endpoint)
    from tinyllava_fast.infer.assistant import Assistant

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    return LocalPartner(
        Assistant.from_pretrained(
            args.model,
            dtype=args.dtype,
            device=args.device,
            weights=args.weights,
            adapter=args.adapter,
            speculate=args.speculate,
        )
    )


def _answer_lines(talk: Conversation) -> int:
    """Answer the lines of a pipe. Returns 2 if any of them could not be answered, else 0."""
    code = 0
    for line in sys.stdin:
        if not line.strip():
            continue
        if line.rstrip() == "/quit":
            break
        if (said := talk.command(line.rstrip())) is not None:
            log.info("%s", said)
            continue
        try:
            talk.ask(line)
        except UserError as error:
            if not talk.turns:  # nothing that a new conversation could mend
                raise
            log.error("%s", talk.explain(error))
            code = 2
    return code


def _answer_typed(talk: Conversation) -> int:
    """Answer what is typed, until the user leaves; Ctrl-C stops an answer, and leaves when pressed twice."""
    pressed = False
    for line in _typed():
        if line is None:
            if pressed:
                return 0
            pressed = True
            _show("\nCtrl-C once more leaves.\n")
            continue
        pressed = False
        if line in LEAVE or line == "/quit":
            return 0
        _answer(talk, line)
    return 0


def _answer(talk: Conversation, line: str) -> None:
    """Carry out or answer a typed line; a mistake and Ctrl-C end that line alone."""
    try:
        if (said := talk.command(line)) is not None:
            _show(f"{said}\n")
            return
    except UserError as error:
        log.error("%s", error)
        return
    try:
        talk.ask(line)
    except UserError as error:
        log.error("%s", talk.explain(error))
    except KeyboardInterrupt:
        _show("\n(stopped; the question is forgotten, /retry asks it again)\n")


def _typed() -> Iterator[str | None]:
    """Lines typed at a prompt until the input ends, empty ones left out; None for Ctrl-C at the prompt."""
    while True:
        try:
            line = input("> ").rstrip()
        except EOFError:
            _show("\n")
            return
        except KeyboardInterrupt:
            yield None
            continue
        if line:
            yield line


def _accept_any_bytes() -> None:
    """Read bytes that are no text, and write characters that the terminal lacks, as replacement characters."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _text(argument: str | None) -> str | None:
    """An argument of the command line with replacement characters for bytes that are no text."""
    return None if argument is None else os.fsencode(argument).decode(errors="replace")


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


_HARMLESS = "\n\t\u200c\u200d"  # the last two join letters of some scripts, and emoji


def _show(piece: str) -> None:
    """Write a text; to a terminal without what would move its cursor, colour it or set it up."""
    if sys.stdout.isatty():
        piece = "".join(c if c.isprintable() or c in _HARMLESS else "\ufffd" for c in piece)
    sys.stdout.write(piece)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Flags of the commands that open a model: how its weights are held, and where they run; or which server has it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tinyllava_fast import plugins
from tinyllava_fast.errors import UserError
from tinyllava_fast.paths import path_argument

if TYPE_CHECKING:
    from tinyllava_fast.client.endpoint import Endpoint

ANY_DEVICE = "auto"
MOST_THREADS = 4096
RETRIES = 5
TIMEOUT_S = 300


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--weights``, ``--device``, ``--speculate``, as from_pretrained takes them, and ``--plugin``.

    Nothing heavy is imported: a command answers ``--help`` before torch is there.
    """
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the model was saved")
    parser.add_argument("--weights", choices=("bf16", "int8", "nf4"), help="language model's weights")
    parser.add_argument("--device", default=ANY_DEVICE, help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--speculate",
        type=positive,
        default=0,
        metavar="N",
        help="guess up to N tokens of a greedy answer from what its prompt and it repeat, and verify them in one step "
        "(default: none; 8 is a good number for one answer at a time)",
    )
    plugins.add_flag(parser)


def add_adapter_flag(parser: argparse.ArgumentParser) -> None:
    """``--adapter``, as from_pretrained takes it."""
    parser.add_argument(
        "--adapter", type=path_argument, metavar="DIR", help="LoRA adapter that is added to the model's weights"
    )


def add_server_flags(parser: argparse.ArgumentParser, flag: str) -> argparse._ArgumentGroup:
    """``flag URL``, ``--model``, ``--api-key-env``, ``--retries`` and ``--timeout``, in a group that is returned."""
    group = parser.add_argument_group("a server instead of a model folder, which speaks OpenAI's chat completions")
    group.add_argument(
        flag, dest="server", metavar="URL", help="e.g. http://localhost:8000; without a path it gets /v1"
    )
    group.add_argument("--model", dest="served", metavar="ID", help="name there (default: the only one it has)")
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds its key (default: none)")
    group.add_argument("--retries", type=natural, metavar="N", help=f"if it is busy or fails (default: {RETRIES})")
    group.add_argument("--timeout", type=positive, metavar="S", help=f"to wait for it (default: {TIMEOUT_S})")
    return group


def server_of(args: argparse.Namespace, flag: str, *, also: Mapping[str, object] | None = None) -> Endpoint | None:
    """Return the server that the flags name; None if they name a model folder.

    also: further flags that are for a model folder alone, with their values.
    Raises UserError for both or none of them, flags of the other one, and as ``client.endpoint.at``.
    """
    if args.server and args.model:
        raise UserError(f"{flag} and the model folder {args.model}: name one of them; a server's model by --model")
    if not args.server and not args.model:
        raise UserError(f"give a model folder, or a server by {flag}")
    of_folders = {
        "--dtype": args.dtype,
        "--weights": args.weights,
        "--adapter": args.adapter,
        "--speculate": args.speculate,
        "--device": args.device != ANY_DEVICE,
        **(also or {}),
    }
    of_servers = {
        "--model": args.served,
        "--api-key-env": args.api_key_env,
        "--retries": args.retries is not None,
        "--timeout": args.timeout,
    }
    for name, value in (of_folders if args.server else of_servers).items():
        if value:
            raise UserError(f"{name} is for {'a model folder' if args.server else f'a server ({flag})'}; leave it out")
    if not args.server:
        return None
    from tinyllava_fast.client.endpoint import at

    retries = RETRIES if args.retries is None else args.retries
    return at(
        args.server,
        args.served,
        key_variable=args.api_key_env,
        timeout_s=args.timeout or TIMEOUT_S,
        attempts=retries + 1,
    )


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's ``type``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def natural(text: str) -> int:
    """A whole number of at least 0, as argparse's ``type``."""
    return 0 if text.strip() == "0" else positive(text)


def threads(text: str) -> int:
    """A number of CPU threads, as argparse's ``type``."""
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{value} is more than {MOST_THREADS}, the most threads")
    return value

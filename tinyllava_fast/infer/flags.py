"""Flags of the commands that open a model: how its weights are held, where they run, and in which steps."""

from __future__ import annotations

import argparse

from tinyllava_fast import plugins
from tinyllava_fast.paths import path_argument

MOST_THREADS = 4096


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--weights``, ``--device``, ``--speculate``, as from_pretrained takes them, and ``--plugin``.

    Nothing heavy is imported: a command answers ``--help`` before torch is there.
    """
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the model was saved")
    parser.add_argument("--weights", choices=("bf16", "int8", "nf4"), help="language model's weights, on CPUs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
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


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's ``type``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def threads(text: str) -> int:
    """A number of CPU threads, as argparse's ``type``."""
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{value} is more than {MOST_THREADS}, the most threads")
    return value

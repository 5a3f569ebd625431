"""Paths as people write them: ``~`` for the home folder, wherever the shell has not put it in already.

A shell replaces ``~`` at the beginning of an argument only: not in ``stages.finetune.data.records=~/records.json``, not
in ``--data=~/eval``, and nothing does in a YAML file.
"""

from __future__ import annotations

import argparse
import os

from tinyllava_fast.errors import UserError


def expand_home(path: str) -> str:
    """Return the path with ``~`` or ``~name`` at its beginning replaced by that home folder; any other as it is.

    Raises UserError where no such home folder is known: a folder named ``~`` would be made in its place.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        raise UserError(
            f"{path}: ~ stands for a home folder, and there is none known for {path.partition('/')[0]!r}; write the "
            f"whole path, or ./{path} for a file whose name begins so"
        )
    return expanded


def path_argument(text: str) -> str:
    """A path of the command line, as argparse's ``type``. Raises ArgumentTypeError for one that is empty or no path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; give a file or folder")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} holds a NUL character; remove it")
    try:
        return expand_home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

"""The parts that all commands share: ``--version``, and the nearest flag for one that does not exist."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from tinyllava_fast.version import __version__

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count."""


class Parser(argparse.ArgumentParser):
    """argparse's parser with ``--version``. An unknown flag is answered with the nearest one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument("--version", action="version", version=version())

    def error(self, message: str) -> NoReturn:
        """See the base class."""
        unknown = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
        hints = [hint for flag in unknown if (hint := nearest_flag(flag, _flags(self)))]
        super().error("; ".join([message, *hints]))


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its code, without waiting long for Python's last round.

    The collector's, over all that torch has loaded, takes a second on an idle core and half a minute on a busy one;
    frozen, nothing is left to collect. Code 1, of a mistake of ours or a process that died: at once, since what is
    closed at the exit may wait for other processes.
    """
    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code == 1:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    if "triton._C.libtriton" not in sys.modules:  # nanobind, which it is built with, lists what is not collected
        gc.freeze()
    sys.exit(code)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """All flags of a parser and of its subcommands."""
    flags = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for sub in action.choices.values() for flag in _flags(sub)]
    return flags


def version() -> str:
    """Return the line that ``--version`` prints."""
    return f"tinyllava_fast {__version__}"


def nearest_flag(flag: str, known: Iterable[str]) -> str:
    """Return a sentence fragment that names the known flag nearest to one that does not exist; "" if none is near.

    >>> nearest_flag("--resum", ["--resume", "--profile"])
    'did you mean --resume?'
    """
    if not flag.startswith("-"):
        return ""
    plain = {name.replace("_", "-"): name for name in known}
    close: Sequence[str] = get_close_matches(flag.partition("=")[0].replace("_", "-"), list(plain), n=1, cutoff=0.6)
    return f"did you mean {plain[close[0]]}?" if close else ""

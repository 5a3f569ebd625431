"""The parts that all commands share.

``--version``, ``--print-completion SHELL``, the last sections of ``--help``, and the nearest flag for one that does not
exist.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from tinyllava_fast.errors import UserError, import_optional
from tinyllava_fast.paths import path_argument
from tinyllava_fast.variables import VARIABLES
from tinyllava_fast.version import __version__

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count."""
EXITS = {
    0: "done",
    1: "what may be over at the next try, or what the command was asked to look for",
    2: "something to be mended first: the message says what and how",
    INTERRUPTED: "interrupted by Ctrl-C",
}
"""Exit code -> its meaning, of all commands."""
COMPLETION = "--print-completion"
SHELLS = ("bash", "zsh", "tcsh")


class Parser(argparse.ArgumentParser):
    """argparse's parser with ``--version``, and for a whole command ``--print-completion`` and more sections of help.

    An unknown flag is answered with the nearest one. exits: codes whose meaning is another than in EXITS.
    """

    def __init__(self, *, exits: Mapping[int, str] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument("--version", action="version", version=version())
        self._exits = {**EXITS, **(exits or {})}
        self._whole = " " not in self.prog  # else a subcommand, or python -m
        if self._whole:
            text = "print what completes this command's arguments in a shell, and exit"
            self.add_argument(COMPLETION, action=_Completion, choices=SHELLS, help=text)

    def format_help(self) -> str:
        """Return argparse's text; of a whole command with exit codes and variables, as a manual page has."""
        return super().format_help() + (f"\n{more_help(self._exits)}" if self._whole else "")

    def error(self, message: str) -> NoReturn:
        """See the base class."""
        unknown = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
        hints = [hint for flag in unknown if (hint := nearest_flag(flag, _flags(self)))]
        super().error("; ".join([message, *hints]))


class _Completion(argparse.Action):
    """Prints the script by which a shell completes the arguments of a parser, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: Any = None) -> None:
        """See the base class."""
        try:
            sys.stdout.write(completion(parser, values))
        except UserError as error:
            parser.error(str(error))
        parser.exit()


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script by which a shell of SHELLS completes the command's flags, subcommands and paths.

    Raises UserError where shtab is not installed.
    """
    shtab = import_optional("shtab", COMPLETION, "completion")
    for action in _actions(parser):
        if action.type is path_argument:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
    return f"{shtab.complete(parser, shell)}\n"


def more_help(exits: Mapping[int, str] = EXITS) -> str:
    """Return the sections of a command's help on exit codes and environment variables."""
    codes = "\n".join(f"  {code:<20} {text}" for code, text in sorted(exits.items()))
    variables = "\n".join(f"  {name:<20} {text}" for name, text in VARIABLES.items())
    return f"exit code:\n{codes}\n\nenvironment:\n{variables}\n"


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
    return [flag for action in _actions(parser) for flag in action.option_strings]


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)


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

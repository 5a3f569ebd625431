"""Components from outside the package: Python files or modules that register themselves when they are imported.

A plugin is ordinary code of the user's, e.g. a connector with ``@CONNECTORS.register("mine")``. It is named by the
user (``plugins:`` of a run, ``--plugin`` of the other commands), never by a model folder: opening a model runs no code
that came with it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.paths import path_argument


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin``, which may be repeated; its values are for ``load_plugins``."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=path_argument,
        metavar="FILE",
        help="Python file with components of yours",
    )


def load_plugins(names: Iterable[str]) -> None:
    """Import each plugin once. names: paths that end in .py, relative to the working directory, or dotted module names.

    Raises UserError naming the plugin if it does not exist, fails to import, or tries to end the process meanwhile.
    (``os._exit`` ends it before anyone can tell.) A KeyboardInterrupt is the user's and goes through.
    """
    for name in names:
        try:
            _load_file(Path(name).resolve()) if name.endswith(".py") else importlib.import_module(_module(name))
        except KeyboardInterrupt:
            raise
        except _NamingError as error:
            raise UserError(f"plugin {name!r}: {error}") from None
        except SystemExit as error:
            raise UserError(
                f"plugin {name!r} called sys.exit while it was imported (exit code {error.code!r}); "
                'guard it with if __name__ == "__main__":'
            ) from error
        except BaseException as error:  # a plugin may raise anything; all of it is about that plugin
            raise UserError(f"plugin {name!r} cannot be imported: {type(error).__name__}: {error}") from error
        log.info("plugin %s", name)


class _NamingError(Exception):
    """A name that is neither a Python file's nor a module's."""


def _module(name: str) -> str:
    """The name, if it can be a module's. Raises _NamingError."""
    if all(part.isidentifier() for part in name.split(".")):
        return name
    if not name.strip():
        raise _NamingError("the name is empty; give a Python file or a module")
    if os.path.isdir(name):
        raise _NamingError("a folder; name the Python file in it")
    if os.path.isfile(name):
        raise _NamingError("a file whose name does not end in .py; only Python files can be plugins")
    raise _NamingError(
        "neither a Python file (ending in .py, relative to the working directory) nor the name of a module (mine.parts)"
    )


def _load_file(path: Path) -> None:
    module_name = f"tinyllava_fast_plugin:{path}"  # the whole path: two files of one name are two plugins
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise

"""Components from outside the package: Python files or modules that register themselves when they are imported.

A plugin is ordinary code of the user's, e.g. a connector with ``@CONNECTORS.register("mine")``. It is named by the
user (``plugins:`` of a run, ``--plugin`` of the other commands), never by a model folder: opening a model runs no code
that came with it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log


def add_flag(parser: argparse.ArgumentParser) -> None:
    """``--plugin``, which may be repeated; its values are for ``load_plugins``."""
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE", help="Python file with components of yours"
    )


def load_plugins(names: Iterable[str]) -> None:
    """Import each plugin once. names: paths that end in .py, or dotted module names.

    Raises UserError naming the plugin if it does not exist or fails to import.
    """
    for name in names:
        try:
            _load_file(Path(name).resolve()) if name.endswith(".py") else importlib.import_module(name)
        except Exception as error:  # a plugin may raise anything; all of it is about that plugin
            raise UserError(f"plugin {name!r} cannot be imported: {type(error).__name__}: {error}") from error
        log.info("plugin %s", name)


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

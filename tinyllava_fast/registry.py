"""Exact-name registries with lazy discovery: a component is one file in a folder, found by importing it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from tinyllava_fast.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a component.

    kind: what it holds, for messages ("connector").
    package: the package whose modules are imported, sorted, at the first look-up, e.g.
        "tinyllava_fast.models.connectors". An import error there is raised, never swallowed, and raised again at the
        next look-up: a registry never serves a part of its components.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._discovered = self._discovering = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a class or function under an exact name. UserError if another one has the name.

        A file that is imported again, since its first import failed, replaces what it had registered.
        """

        def add(entry: T) -> T:
            held = self._entries.get(name)
            if held is not None and held is not entry and _origin(held) != _origin(entry):
                raise UserError(
                    f"{self.kind} {name!r} is registered twice, by {_origin(held)} and by {_origin(entry)}; rename one"
                )
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str, where: str = "") -> T:
        """The component of that exact name; where: the config key that asked, for the message."""
        self._discover()
        if name not in self._entries:
            prefix = f"{where}: " if where else ""
            raise UserError(
                f"{prefix}unknown {self.kind} {name!r}; {nearest(name, self._entries)}. If it is one of your own, name "
                "its file: --plugin FILE, plugins: [FILE] in a YAML, or load(..., plugins=[FILE])"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def _discover(self) -> None:
        if self._discovered or self._discovering:  # a module of the package may look something up
            return
        self._discovering = True
        try:
            package = importlib.import_module(self.package)
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self.package}.{module}")
            self._discovered = True
        finally:
            self._discovering = False


def _origin(entry: object) -> str:
    """Return the module and name of a class or function; of an object, its repr."""
    module, name = getattr(entry, "__module__", ""), getattr(entry, "__qualname__", "")
    return f"{module}.{name}" if name else repr(entry)

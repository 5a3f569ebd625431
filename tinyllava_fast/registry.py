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
        "tinyllava_fast.models.connectors". An import error there is raised, never swallowed.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a class or function under an exact name. A duplicate is an error."""

        def add(entry: T) -> T:
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._entries[name]} and {entry}")
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
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{self.package}.{module}")

"""Registries: all of a package or an error, one component a name, and imports that are tried again."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinyllava_fast.errors import UserError
from tinyllava_fast.registry import Registry

_numbers = itertools.count()
PART = "from {package} import REGISTRY\n@REGISTRY.register({name!r})\ndef {name}(): ...\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Registry[object]]]:
    """Writes a package of modules (name -> text) and returns its registry."""
    name = f"tlf_registry_test_{next(_numbers)}"
    monkeypatch.syspath_prepend(tmp_path)

    def make(**modules: str) -> Registry[object]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(
            f"from tinyllava_fast.registry import Registry\nREGISTRY = Registry('thing', {name!r})\n"
        )
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text or PART.format(package=name, name=module))
        return __import__(name).REGISTRY

    yield make
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def test_all_modules_are_found(package: Callable[..., Registry[object]]) -> None:
    registry = package(a="", b="", c="")
    assert registry.names() == ["a", "b", "c"] and "b" in registry and list(registry) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"key: unknown thing 'd'; Known: a, b, c"):
        registry.get("d", "key")


def test_a_module_that_fails_fails_every_time(package: Callable[..., Registry[object]]) -> None:
    registry = package(a="", b="raise RuntimeError('broken')\n", c="")
    for look in (registry.names, lambda: registry.get("a"), lambda: "c" in registry, lambda: list(registry)):
        with pytest.raises(RuntimeError, match="broken"):
            look()


def test_a_mended_module_is_found(package: Callable[..., Registry[object]], tmp_path: Path) -> None:
    registry = package(a="", b="")
    path = next(tmp_path.rglob("b.py"))
    good = path.read_text()
    path.write_text(good + "raise RuntimeError('after it registered')\n")
    with pytest.raises(RuntimeError):
        registry.names()
    path.write_text(good)
    assert registry.names() == ["a", "b"]


def test_a_module_may_look_up_while_it_is_imported(package: Callable[..., Registry[object]]) -> None:
    text = "from {package} import REGISTRY\nREGISTRY.names()\n@REGISTRY.register('b')\ndef b(): ...\n"
    registry = package(a="", c="")
    folder = Path(sys.modules[registry.package].__path__[0])
    (folder / "b.py").write_text(text.format(package=registry.package))
    assert registry.names() == ["a", "b", "c"]


def test_a_name_is_registered_once(package: Callable[..., Registry[object]]) -> None:
    registry = package(a="")

    @registry.register("mine")
    def first() -> None: ...

    assert registry.register("mine")(first) is first, "the same one again"
    with pytest.raises(UserError, match=r"thing 'mine' is registered twice, by .*first and by .*second; rename one"):

        @registry.register("mine")
        def second() -> None: ...


def test_a_name_of_the_package_taken_by_a_plugin(package: Callable[..., Registry[object]]) -> None:
    """The plugin comes first, since look-ups are late: the clash is a sentence at the first of them."""
    registry = package(a="", b="")

    @registry.register("b")
    def mine() -> None: ...

    with pytest.raises(UserError, match=r"thing 'b' is registered twice, by .*mine and by .*\.b\.b; rename one"):
        registry.names()

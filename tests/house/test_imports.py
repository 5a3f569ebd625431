"""No module imports itself through others, be it inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = {"tinyllava_fast": "tinyllava_fast", "kernels": "tinyllava_fast.kernels", "bench": "tinyllava_fast.bench"}
EXTENSION = "tinyllava_fast._C"  # compiled: it imports nothing of ours

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Path of each module by its import name."""
    found = {}
    for folder, package in PLACES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def names(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere in the node, but for those that only type checkers read."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for other in node.orelse:
            yield from names(other)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide where a module lies"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from names(child)


def module_of(name: str, known: set[str]) -> str | None:
    """The module that a dotted name is, or is in. Packages around a module are not counted as imported."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def import_graph() -> Graph:
    """The modules that each module imports."""
    paths = modules()
    known = {*paths, EXTENSION}
    graph: Graph = {EXTENSION: set()}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        graph[module] = {m for name in names(tree) if (m := module_of(name, known)) not in (None, module)}
    return graph


def circle(graph: Graph) -> list[str]:
    """Modules that import each other in turn, the first one again at the end; [] if there are none."""
    left = dict(graph)
    while loose := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in loose:
            del left[module]
    if not left:
        return []
    path = [min(left)]
    while path[-1] not in path[:-1]:
        path.append(min(left[path[-1]] & left.keys()))
    return path[path.index(path[-1]) :]


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph()
    assert len(graph) > 150 and sum(map(len, graph.values())) > 500
    found = circle(graph)
    assert not found, " -> ".join(found)


def test_circles_and_imports_inside_functions_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    code = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    from c.d import e\n"
    assert list(names(ast.parse(code))) == ["a", "c.d.e"]
    assert module_of("c.d.e", {"c", "c.d"}) == "c.d" and module_of("torch.nn", {"c"}) is None

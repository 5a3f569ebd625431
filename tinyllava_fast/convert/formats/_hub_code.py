"""The code of a model's own parts for a Hub repository, taken from the toolkit's modules.

A repository must load where this toolkit is not installed. Its file ``parts_tinyllava.py`` holds the classes of the
model's tower and connector, and of a language model that transformers lacks, as they stand in ``models/``: each
definition that those classes reach is copied with its comments. Left out are methods that build, draw, describe or
import weights; what else they take from the toolkit has a plain form here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.version import __version__

_OURS = "tinyllava_fast."
_ROOMS = tuple(f"{_OURS}models.{room}" for room in ("connectors", "vision", "llm"))
_LEFT_OUT = {
    "tiny", "reset", "from_reference_names", "check_widths", "external_parameters", "describe", "from_config", "_draw",
    "_load", "_given", "_stored", "_check_type", "_check", "_truncate", "input_size", "image_processor",
    "layer_parameters", "layers", "widths", "processor_class", "model_types", "_model_class",
}  # fmt: skip
_PLAIN = {
    "UserError": 'class UserError(ValueError):\n    """An argument that the model cannot take."""',
    "nearest": "def nearest(value: str, known: Iterable[str]) -> str:\n"
    '    """Return advice for a name that is unknown."""\n'
    "    return f\"known: {', '.join(known)}\"",
    "INIT_STD": "INIT_STD = 0.02",
    "Values": "Values = dict[str, Any]",
    "Layers": "Layers = int",
    "Pixels": "Pixels = int",
    "Size": "Size = int",
    "Settings": "Settings = dict[str, Any]",
    "Text": "Text = str",
    "ShareBelowOne": "ShareBelowOne = float",
    "connector_mlp": "def connector_mlp(\n"
    "    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str\n"
    ") -> Tensor:\n"
    '    """Return the second linear map of the activation of the first."""\n'
    "    hidden = getattr(nn.functional, activation)(nn.functional.linear(x, w1, b1))\n"
    "    return nn.functional.linear(hidden, w2, b2)",
}
"""Forms of what copied code takes from other rooms, by name."""
_PLAIN_IMPORTS = [("typing", "Any"), ("collections.abc", "Iterable"), ("torch", "Tensor"), ("torch", "nn")]
_INSTALLED = ("huggingface_hub", "numpy", "torch", "transformers")
_END = '''
_TOWERS = {towers}
_CONNECTORS = {connectors}


def tower_class(name: str) -> Any:
    """Return the class of a vision tower."""
    return _TOWERS[name]


def connector_class(name: str) -> Any:
    """Return the class of a connector."""
    return _CONNECTORS[name]
'''


@dataclass
class _Module:
    """A module of ours: its definitions by name, what it imports, and its lines."""

    name: str
    lines: list[str]
    nodes: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name -> (module of ours, name there)."""
    others: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name -> (module, what is imported from it; "" for the module itself)."""


class _Copy:
    """Collects definitions, each after those that it uses."""

    def __init__(self) -> None:
        self.modules: dict[str, _Module] = {}
        self.texts: dict[tuple[str, str], str] = {}
        self.imports: dict[tuple[str, str], None] = {item: None for item in _PLAIN_IMPORTS}
        self.sources: dict[str, None] = {}

    def add(self, module: str, name: str) -> None:
        """Add a definition and what it uses. Raises UserError for what a repository cannot hold."""
        if (module, name) in self.texts:
            return
        found = self._module(module)
        if name in found.ours:
            self.add(*found.ours[name])
        elif name in found.nodes:
            node = found.nodes[name]
            self.texts[module, name] = ""  # a definition may name itself
            kept = list(_kept(node))
            self._check_imports(found, kept)
            for used in dict.fromkeys(part for item in kept for part in _names(item)):
                if used in found.others:
                    self.imports[found.others[used]] = None
                elif used != name and (used in found.ours or used in found.nodes):
                    self._use(found, used)
            del self.texts[module, name]
            self.texts[module, name] = _text(found.lines, node, kept)
            self.sources[module] = None
        else:
            raise UserError(f"{module}: {name} is no definition of it, so no code for a Hub repository can be made")

    def _check_imports(self, module: _Module, kept: list[ast.AST]) -> None:
        """Raise UserError for an import of the toolkit inside what is copied: it would be copied as it stands."""
        for node in (part for item in kept for part in ast.walk(item)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_OURS)
                if ours or _not_followed(node):
                    raise UserError(
                        f"{module.name}:{node.lineno}: imports of this toolkit inside a function find nothing in a Hub "
                        "repository; move it to the top of the module"
                    )

    def _use(self, module: _Module, used: str) -> None:
        place, name = module.ours.get(used, (module.name, used))
        if name in _PLAIN:
            self.texts.setdefault(("", name), _PLAIN[name])
        elif place.startswith((*_ROOMS, module.name)):
            self.add(place, name)
        else:
            raise UserError(
                f"{module.name}: uses {place}.{name}, which has no form in a Hub repository; write it into that module"
            )

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _read(importlib.import_module(name))
        return self.modules[name]

    def text(self) -> str:
        """Return the definitions, plain forms first. Raises UserError for two of one name."""
        names = [name for _, name in self.texts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{', '.join(self.sources)}: two of them define {', '.join(twice)}; rename one")
        plain = [text for (module, _), text in self.texts.items() if not module]
        return "\n\n\n".join(plain + [text for (module, _), text in self.texts.items() if module])


def parts_source(lmm: LMM) -> str:
    """Return parts_tinyllava.py of a model. Raises UserError for a part whose code uses more than can be copied."""
    copy = _Copy()
    halves = [half for half in lmm.vision.children() if hasattr(half, "model_classes")]
    towers: list[Any] = [type(part) for part in (lmm.vision, *halves)]
    connector = next(c for c in type(lmm.connector).__mro__ if c.__dict__.get("name") == lmm.connector.name)
    for part in (*towers, connector):
        copy.add(part.__module__, part.__name__)
    if not type(lmm.llm).__module__.startswith("transformers."):
        module = type(lmm.llm).__module__
        config, kind = type(lmm.llm.config).__name__, type(lmm.llm).__name__
        copy.add(module, config)
        copy.add(module, kind)
        copy.imports |= {("transformers", "AutoConfig"): None, ("transformers", "AutoModelForCausalLM"): None}
        copy.texts["register", ""] = (
            f'AutoConfig.register("{lmm.llm.config.model_type}", {config}, exist_ok=True)\n'
            f"AutoModelForCausalLM.register({config}, {kind}, exist_ok=True)"
        )
    head = (
        f'"""Parts of this model, copied from tinyllava_fast {__version__} (Apache-2.0):\n\n'
        + "\n".join(f"- {module}" for module in copy.sources)
        + '\n"""\n\nfrom __future__ import annotations\n\n'
    )
    table = "{" + ", ".join(f'"{tower.name}": {tower.__name__}' for tower in towers) + "}"
    end = _END.format(towers=table, connectors=f'{{"{lmm.connector.name}": {connector.__name__}}}')
    return head + _statements(list(copy.imports)) + "\n\n\n" + copy.text() + "\n\n" + end


def _statements(imports: list[tuple[str, str]]) -> str:
    """Return import statements: the standard library's, then the others'."""
    lines: dict[bool, list[str]] = {False: [], True: []}
    for module in sorted({module for module, _ in imports}):
        installed = module.split(".")[0] in _INSTALLED
        names = sorted({name for place, name in imports if place == module})
        lines[installed] += [f"import {module}"] * ("" in names)
        if given := [name for name in names if name]:
            lines[installed].append(f"from {module} import {', '.join(given)}")
    return "\n\n".join("\n".join(lines[installed]) for installed in lines)


def _read(module: ModuleType) -> _Module:
    source = inspect.getsource(module)
    found = _Module(module.__name__, source.splitlines())
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and (place := _not_followed(node)):
            raise UserError(
                f"{module.__name__}:{node.lineno}: imports {place}, which a Hub repository lacks; write "
                "`from tinyllava_fast.ROOM.MODULE import NAME` at the top of the module"
            )
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_OURS):
            found.ours |= {a.asname or a.name: (node.module or "", a.name) for a in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.others |= {a.asname or a.name: _imported(node, a) for a in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.nodes[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.nodes[target.id] = node
    return found


def _not_followed(node: ast.Import | ast.ImportFrom) -> str:
    """Return the module of an import that no repository has and that is not copied; "" for others."""
    if isinstance(node, ast.ImportFrom):
        place = "." * node.level + (node.module or "")
        return place if node.level or place == _OURS.rstrip(".") else ""
    return next((a.name for a in node.names if f"{a.name}.".startswith(_OURS)), "")


def _imported(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> tuple[str, str]:
    name = alias.name + (f" as {alias.asname}" if alias.asname else "")
    return (node.module or "", name) if isinstance(node, ast.ImportFrom) else (name, "")


def _kept(node: ast.stmt) -> Iterator[ast.AST]:
    """Yield what is copied of a definition: of a class its bases and the members that are not left out."""
    if not isinstance(node, ast.ClassDef):
        yield node
        return
    yield from node.bases
    yield from (d for d in node.decorator_list if not _registers(d))
    for member in node.body:
        target = getattr(member, "target", None) or next(iter(getattr(member, "targets", [])), None)
        if getattr(member, "name", getattr(target, "id", "")) not in _LEFT_OUT:
            yield member


def _registers(decorator: ast.expr) -> bool:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(call, ast.Attribute) and call.attr == "register"


def _names(node: ast.AST) -> Iterator[str]:
    yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))


def _text(lines: list[str], node: ast.stmt, kept: list[ast.AST]) -> str:
    """Return the lines of a definition without the decorators and members that are left out."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators if not _registers(d))])
    drop = {line for d in decorators if _registers(d) for line in range(d.lineno, (d.end_lineno or d.lineno) + 1)}
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if not any(member is item for item in kept):
                start = min([member.lineno, *(d.lineno for d in getattr(member, "decorator_list", []))])
                drop |= set(range(start, (member.end_lineno or start) + 1))
    text = [lines[number - 1] for number in range(first, (node.end_lineno or first) + 1) if number not in drop]
    slim = [line for n, line in enumerate(text) if line.strip() or (n and text[n - 1].strip())]
    while slim and not slim[-1].strip():
        slim.pop()
    return "\n".join(slim)

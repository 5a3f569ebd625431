"""YAML -> frozen dataclasses, strictly: an unknown key, a wrong type or a missing file is an error that names it.

The walk over sections is ours, for messages that name the whole key, the file and the nearest valid name; each leaf
value is checked and coerced by jsonargparse (PyYAML alone reads 1e-3 as a string).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tinyllava_fast.config.compose import Section, expand, read_section, section_of
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import UserError, nearest

T = TypeVar("T")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply dotted overrides ("stages.finetune.optim.lr=1e-4") and check every key and value.

    A section may be a file of its own or start from one by ``base`` (config/compose.py); overrides reach inside.
    Raises UserError naming the file, the key, what was expected and the nearest valid name.
    """
    path = Path(path)
    tree = read_section(RunConfig, path)
    for override in overrides:
        _apply_override(tree, override)
        tree = expand(RunConfig, tree, path, (path,))  # the value may name a file, relative to the run's
    run = parse_into(RunConfig, tree, str(path))
    _check_run(run, str(path))
    return run


def parse_into(cls: type[T], mapping: Any, where: str, *, key: str = "") -> T:
    """Build dataclass ``cls`` from a mapping; nested dataclasses, lists and dicts of them included.

    where: the file or object the mapping came from, for messages. key: dotted prefix of the mapping inside it.
    """
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: {key or 'top level'}: expected a mapping of {cls.__name__} keys, got {mapping!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    files = mapping.written if isinstance(mapping, Section) else {}
    for name in mapping:
        if name not in fields:
            raise UserError(f"{files.get(name, where)}: {_join(key, name)}: unknown key; {nearest(str(name), fields)}")
    hints = get_type_hints(cls)
    values = {
        name: _parse_value(hints[name], value, files.get(name, where), _join(key, name))
        for name, value in mapping.items()
    }
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: {_join(key, name)}: missing; it has no default, add it")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {key or cls.__name__}: {error}") from None


def dump(config: Any) -> str:
    """The dataclass as YAML; ``load_run`` of the text gives an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON-able values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def describe(cls: type = RunConfig, prefix: str = "") -> str:
    """Every key of a configuration with its type, default and meaning: the body of ``tlf-train --help``."""
    docs, hints, lines = _field_docs(cls), get_type_hints(cls), []
    for spec in dataclasses.fields(cls):
        name, hint = _join(prefix, spec.name), hints[spec.name]
        section = section_of(hint)
        if section is not None:
            inner = name if section is hint else f"{name}.<name>"
            lines.append(describe(section, inner))
            continue
        default = "required" if spec.default is dataclasses.MISSING else repr(spec.default)
        if spec.default_factory is not dataclasses.MISSING:
            default = repr(spec.default_factory())
        lines.append(f"  {name}: {_type_name(hint)} = {default}")
        if spec.name in docs:
            lines.append(textwrap.indent(textwrap.fill(docs[spec.name], 100), "      "))
    return "\n".join(lines)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """``a.b.c=value`` into the tree; a list of named sections is addressed by name or index."""
    dotted, sep, text = override.removeprefix("--").partition("=")
    if not sep or not dotted:
        raise UserError(f"override {override!r}: expected key.path=value, e.g. stages.finetune.optim.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node: Any = tree
    *parents, last = dotted.split(".")
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
        if isinstance(node, Section):
            node.written.pop(last, None)  # no file's any more
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise UserError(f"override {override!r}: {part!r} lies inside a value, not a section")


def _index(node: list[Any], part: str, override: str) -> int:
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise UserError(f"override {override!r}: no item {part!r}; {nearest(part, names)}")


def _parse_value(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse_into(hint, value, where, key=key)
    section = section_of(hint)
    if section is not None:
        if not isinstance(value, list):
            raise UserError(f"{where}: {key}: expected a list of {section.__name__}, got {value!r}")
        return [parse_into(section, v, where, key=f"{key}[{i}]") for i, v in enumerate(value)]
    return _coerce(hint, value, where, key)


@functools.cache
def _leaf_parser(hint: Any) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _coerce(hint: Any, value: Any, where: str, key: str) -> Any:
    from argparse import ArgumentError

    if hint is int:
        value = _whole(value)
    # A number where text is due is more often a slip than a name: refuse it as a user would expect.
    mismatch = (hint is bool) != isinstance(value, bool) and hint in (int, float, bool)
    try:
        if mismatch:
            raise ValueError
        return _leaf_parser(hint).parse_object({"value": value}).value
    except (ArgumentError, ValueError, TypeError):
        raise UserError(f"{where}: {key}: expected {_type_name(hint)}, got {value!r}") from None


def _whole(value: Any) -> Any:
    """1e3, a float or a string to YAML, as the int it means; anything else unchanged."""
    if isinstance(value, (float, str)):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint.__name__
    if get_origin(hint) is not None and str(hint).startswith("typing.Literal"):
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    if get_origin(hint) is Union and any(get_origin(part) is Literal for part in get_args(hint)):
        return " or ".join(_type_name(part).removeprefix("one of ") for part in get_args(hint))
    return str(hint).replace("typing.", "")


def _join(prefix: str, name: Any) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)  # noqa: S101 the source of a class
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _check_run(run: RunConfig, where: str) -> None:
    """What no single field can tell."""
    if not run.stages:
        raise UserError(f"{where}: stages: empty; a run needs at least one stage")
    names = [stage.name for stage in run.stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: stages: the name {name!r} is used twice; stage names are folder names")
        if not name or "/" in name or name in ("checkpoints", "final", "tensorboard"):
            raise UserError(f"{where}: stages: {name!r} can't name a stage; it becomes a folder of the run")

"""YAML files -> one tree: sections in files of their own, and ``base: <file>`` to start from another file's section.

A section (a mapping that the schema describes) may be written in three ways:

    llm: model/phi_2.yaml             the file's mapping
    llm: {base: phi_2.yaml, lr: 1}    the file's mapping, deeply under the keys given here: these win, lists replace
    llm: {lr: 1}                      these keys alone, or over those of the ``base`` of the section around it

Paths are relative to the file that names them. A section that names a file takes nothing from the ``base`` around it,
so that naming another model leaves no key of the first one behind.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from tinyllava_fast.errors import UserError, nearest

BASE = "base"


class Section(dict[str, Any]):
    """A mapping that remembers which file each key was written in, for messages."""

    def __init__(self, values: dict[str, Any], written: dict[str, str], *, whole: bool = False) -> None:
        super().__init__(values)
        self.written = written
        self.whole = whole  # names a file of its own: nothing of an outer base shows through


def read_section(cls: type, path: Path, chain: tuple[Path, ...] = ()) -> Section:
    """The mapping of dataclass ``cls`` in a file, everything that it names included.

    chain: files that are being read. Raises UserError for a missing or malformed file, or one that leads to itself.
    """
    if path.resolve() in (p.resolve() for p in chain):
        raise UserError("the config files name one another in a circle: " + " -> ".join(map(str, (*chain, path))))
    return expand(cls, read_yaml(path), path, (*chain, path))


def expand(cls: type, mapping: dict[str, Any], path: Path, chain: tuple[Path, ...]) -> Section:
    """``mapping``, written in ``path``, with every section that is a path or has a ``base`` replaced by its content."""
    known = mapping.written if isinstance(mapping, Section) else {}
    values = dict(mapping)
    base = values.pop(BASE, None)
    hints = get_type_hints(cls)
    for name, value in values.items():
        section = section_of(hints.get(name))
        if section is None:
            continue
        where = f"{path}: {name}"
        if isinstance(value, list):
            values[name] = [_expand_value(section, v, path, chain, f"{where}[{i}]") for i, v in enumerate(value)]
        elif get_origin(hints[name]) is not list:
            values[name] = _expand_value(section, value, path, chain, where)
    own = Section(values, {name: known.get(name, str(path)) for name in values}, whole=getattr(mapping, "whole", False))
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{path}: {BASE}: expected the path of a YAML file, got {base!r}")
    merged = _merge(read_section(cls, path.parent / base, chain), own)
    merged.whole = True
    return merged


def section_of(hint: Any) -> type | None:
    """The dataclass inside a hint: itself, or the item of list[dataclass]."""
    candidates = (hint, *get_args(hint)) if get_origin(hint) is list else (hint,)
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError naming the file, and the nearest one if it does not exist."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config file; {nearest(path.name, near)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {type(tree).__name__}")
    return tree


def _expand_value(cls: type, value: Any, path: Path, chain: tuple[Path, ...], where: str) -> Any:
    if isinstance(value, str):
        try:
            section = read_section(cls, path.parent / value, chain)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        section.whole = True
        return section
    return expand(cls, value, path, chain) if isinstance(value, dict) else value


def _merge(under: Section, over: Section) -> Section:
    values, written = dict(under), dict(under.written)
    for name, value in over.items():
        below = values.get(name)
        if isinstance(value, Section) and isinstance(below, Section) and not value.whole:
            values[name] = _merge(below, value)
        elif isinstance(value, dict) and isinstance(below, dict) and not isinstance(value, Section):
            values[name] = _merge_plain(below, value)  # free-form settings, such as a transformers config
        else:
            values[name] = value
        written[name] = over.written[name]
    return Section(values, written)


def _merge_plain(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[name] = _merge_plain(below, value) if both else value  # type: ignore[arg-type]
    return merged

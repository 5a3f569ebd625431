"""YAML files -> one tree: sections in files of their own, and ``base: <file>`` to start from another file's section.

A section (a mapping that the schema describes) may be written in three ways:

    llm: model/phi_2.yaml             the file's mapping
    llm: {base: phi_2.yaml, lr: 1}    the file's mapping, deeply under the keys given here: these win, lists replace
    llm: {lr: 1}                      these keys alone, or over those of the ``base`` of the section around it

Paths are relative to the file that names them. A section that names a file takes nothing from the ``base`` around it,
so that naming another model leaves no key of the first one behind.

Two keys replace what stands below them, in a ``base`` and in overrides alike (``outdated``); a line of the log says so:
another component ``type`` drops the ``options`` of the former type, and ``model.path`` drops the components that would
have been built. ``config``, whose keys most types share, goes on: a key that the new type lacks is refused by name.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from tinyllava_fast.config.schema import ModelConfig
from tinyllava_fast.config.yaml_text import parse_yaml
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.fields import read_text, shown
from tinyllava_fast.log import log
from tinyllava_fast.paths import expand_home

BASE = "base"


class Section(dict[str, object]):
    """A mapping of dataclass ``cls`` that remembers which file each key was written in, for messages."""

    def __init__(self, cls: type, values: dict[str, object], written: dict[str, str], *, whole: bool = False) -> None:
        super().__init__(values)
        self.cls = cls
        self.written = written
        self.whole = whole  # names a file of its own: nothing of an outer base shows through


def read_section(cls: type, path: Path, chain: tuple[Path, ...] = ()) -> Section:
    """Return the mapping of dataclass ``cls`` in a file, everything that it names included.

    chain: files that are being read. Raises UserError for a missing or malformed file, or one that leads to itself.
    """
    if os.path.realpath(path) in map(os.path.realpath, chain):
        raise UserError("the config files name one another in a circle: " + " -> ".join(map(str, (*chain, path))))
    return expand(cls, read_yaml(path), path, (*chain, path))


def expand(cls: type, mapping: dict[str, object], path: Path, chain: tuple[Path, ...], key: str = "") -> Section:
    """Return ``mapping``, written in ``path``, with the content of every section that is a path or has a ``base``.

    key: dotted key of the mapping in the file, for messages.
    """
    known = mapping.written if isinstance(mapping, Section) else {}
    values = dict(mapping)
    base = values.pop(BASE, None)
    hints = get_type_hints(cls)
    for name, value in values.items():
        section = section_of(hints.get(name))
        if section is None:
            continue
        full = f"{key}.{name}" if key else name
        if isinstance(value, list):
            values[name] = [_expand_value(section, v, path, chain, f"{full}[{i}]") for i, v in enumerate(value)]
        elif get_origin(hints[name]) is not list:
            values[name] = _expand_value(section, value, path, chain, full)
    written = {name: known.get(name, str(path)) for name in values}
    own = Section(cls, values, written, whole=getattr(mapping, "whole", False))
    if BASE not in mapping:
        return own
    merged = _merge(read_section(cls, _beside(path, base, f"{path}: {BASE}"), chain), own)
    merged.whole = True
    return merged


def section_of(hint: object) -> type | None:
    """Return the dataclass inside a hint: itself, or the item of list[dataclass]."""
    candidates = (hint, *get_args(hint)) if get_origin(hint) is list else (hint,)
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def read_yaml(path: Path) -> dict[str, object]:
    """Return the mapping in a YAML file. Raises UserError naming the file, and the nearest one if it does not exist."""
    if not os.path.isfile(path):
        if os.path.isdir(path):
            raise UserError(f"{path}: a folder; name a YAML file in it")
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if os.path.isdir(path.parent) else []
        raise UserError(f"{path}: no such config file; {nearest(path.name, near)}")
    tree = parse_yaml(read_text(path, UserError), str(path))
    if not isinstance(tree, dict):
        found = "nothing: the file is empty" if tree is None else shown(tree)
        raise UserError(f"{path}: expected a mapping of keys, got {found}")
    return tree


def outdated(section: Section, name: str, value: object) -> tuple[str, ...]:
    """Return the keys of a section that mean nothing once ``name`` has another value: see the head of this file."""
    if section.cls is ModelConfig and name == "path" and value is not None:
        return tuple(key for key in ("llm", "vision", "connector") if key in section)
    fields = {f.name: f for f in dataclasses.fields(section.cls)}
    if name == "type" in fields and section.get("options") and value != section.get("type", fields["type"].default):
        return ("options",)
    return ()


def drop_outdated(section: Section, name: str, value: object, by: str) -> None:
    """Remove what is outdated from the section, and say so. by: the file or override that sets the value."""
    for key in outdated(section, name, value):
        source = section.written.pop(key, "")
        log.info("%s: %s: %s replaces %s%s", by, name, value, key, f" of {source}" if source else "")
        del section[key]


def _beside(path: Path, value: object, where: str) -> Path:
    """Return the file that a section names, relative to the file ``path`` that names it."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{where}: expected the path of a YAML file, got {shown(value)}")
    return path.parent / expand_home(value)


def _expand_value(cls: type, value: object, path: Path, chain: tuple[Path, ...], key: str) -> object:
    if isinstance(value, str):
        where = f"{path}: {key}"
        try:
            section = read_section(cls, _beside(path, value, "a section that is text"), chain)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        section.whole = True
        return section
    return expand(cls, value, path, chain, key) if isinstance(value, dict) else value


def _merge(under: Section, over: Section) -> Section:
    for name in ("type", "path"):
        if name in over:
            drop_outdated(under, name, over[name], over.written[name])
    values, written = dict(under), dict(under.written)
    for name, value in over.items():
        below = values.get(name)
        if isinstance(value, Section) and isinstance(below, Section) and not value.whole:
            values[name] = _merge(below, value)
        else:
            values[name] = value if isinstance(value, Section) else _merge_plain(below, value)
        written[name] = over.written[name]
    return Section(under.cls, values, written)


def _merge_plain(under: object, over: object) -> object:
    """Return ``over``; of two mappings, such as a transformers config, the keys of both, those of ``over`` first."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return under | {name: _merge_plain(under.get(name), value) for name, value in over.items()}

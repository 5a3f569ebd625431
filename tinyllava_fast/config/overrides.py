"""``key.path=value`` of the command line, put into the tree of a run's YAML.

A list of named sections is addressed by name or index (stages.finetune, stages.1). The value is YAML: nothing behind
the equals sign is null, a text with ": " in it needs quotes. Of a key that is given twice the last value holds, so that
a script's defaults may stand first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinyllava_fast.config.compose import Section, drop_outdated
from tinyllava_fast.config.yaml_text import parse_yaml
from tinyllava_fast.errors import UserError, nearest


def apply_overrides(tree: Section, overrides: Sequence[str], expand: Callable[[Section], Section]) -> Section:
    """Return the tree with the overrides in it, in order. expand: reads the section files that a value may name.

    An override that outdates other keys (config/compose.py) outdates those of files, not those of earlier overrides.
    """
    done: list[tuple[list[str], object, str]] = []
    for override in overrides:
        parts, value = _parse(override, tree)
        kept = _outdated_prefixes(tree, parts, value, override)
        again = [item for item in done if any(item[0][: len(prefix)] == prefix for prefix in kept)]
        done.append((parts, value, override))
        for item in (done[-1], *again):
            _set(tree, *item)
            tree = expand(tree)
    return tree


def _parse(override: str, tree: Section) -> tuple[list[str], object]:
    """Return the parts of the dotted key, and the value."""
    stage = _stage(override.removeprefix("--"), tree)
    dotted, sep, text = override.removeprefix("--").removeprefix(stage).partition("=")
    parts = dotted.split(".")
    if stage:
        parts = ["stages", stage.removeprefix("stages."), *parts[1:]]
    if not sep or not all(parts) or any(part != part.strip() for part in parts):
        raise UserError(f"override {override!r}: expected key.path=value, e.g. stages.finetune.optim.lr=1e-4")
    try:
        return parts, parse_yaml(text, f"override {override!r}")
    except UserError as error:
        if "mapping values are not allowed" in str(error):
            raise UserError(f"{error}; a text that holds a colon needs quotes: {dotted}='\"...\"'") from None
        raise


def _stage(text: str, tree: Section) -> str:
    """Return the "stages.NAME" that an override begins with; "" if none. A name may hold a dot or an equals sign."""
    stages = tree.get("stages")
    items = stages if isinstance(stages, list) else []
    heads = [f"stages.{item['name']}" for item in items if isinstance(item, dict) and item.get("name")]
    return max((head for head in heads if text.startswith((f"{head}.", f"{head}="))), key=len, default="")


def _outdated_prefixes(tree: Section, parts: list[str], value: object, override: str) -> list[list[str]]:
    """Drop what the override outdates; return the dotted keys that earlier overrides may have set there."""
    node: object = tree
    for part in parts[:-1]:
        if not isinstance(node, (list, dict)):
            return []
        node = node[_index(node, part, override)] if isinstance(node, list) else node.get(part)
    if not isinstance(node, Section) or parts[-1] not in ("type", "path"):
        return []
    before = set(node)
    drop_outdated(node, parts[-1], value, f"override {override!r}")
    return [[*parts[:-1], key] for key in before - set(node)]


def _set(tree: dict[str, object], parts: list[str], value: object, override: str) -> None:
    node: object = tree
    *parents, last = parts
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


def _child(node: object, part: str, override: str) -> object:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise UserError(f"override {override!r}: {part!r} lies inside a value, not a section")


def _index(node: list[object], part: str, override: str) -> int:
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
    if part in names:
        return names.index(part)
    if part.isascii() and part.isdigit() and len(part) < 10 and int(part) < len(node):
        return int(part)
    raise UserError(f"override {override!r}: no item {part!r}; {nearest(part, names)}")

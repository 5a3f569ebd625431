"""YAML as we read it: safe types only, each key once and a text, one document, nothing endless.

PyYAML keeps the last of two equal keys in silence, takes ``on: 1`` for the key true, and shares one object between all
aliases of an anchor. Merge keys (``<<: *base``) and anchors work as everywhere; a key beside ``<<`` wins over a merged
one.
"""

from __future__ import annotations

import re

import yaml

from tinyllava_fast.errors import UserError

_MOST_VALUES = 100_000  # of a file, with its aliases written out
_ENDLESS = (
    f"it holds more than {_MOST_VALUES:,} values, aliases (*name) written out, or too many lists and mappings inside "
    "one another; does an alias stand inside what it stands for?"
)
_ODD_INT = re.compile(r"[-+]?0[0-7_]+|[^:]*:.*")
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _RefusedError(yaml.MarkedYAMLError):
    """YAML that is well formed, but not unambiguous."""


class _Loader(yaml.SafeLoader):
    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuse what only YAML 1.1 takes for a number: 010 as octal, 1:30 as sexagesimal."""
        value: int = super().construct_yaml_int(node)
        if _ODD_INT.fullmatch(node.value):
            raise _odd_number(node, value)
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Refuse 1:30.5, which is sexagesimal."""
        value: float = super().construct_yaml_float(node)
        if ":" in node.value:
            raise _odd_number(node, value)
        return value

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> yaml.MappingNode:
        """Check the keys as they are written, before merge keys bring in others."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if key.tag != _TEXT:
                name = (key.value or "null") if isinstance(key.value, str) else "that is a list or mapping"
                problem = f"the key {name} is not text to YAML; put it in quotes"
            elif key.value in lines:
                problem = f"the key {key.value!r} stands twice, first in line {lines[key.value]}; keep one of them"
            else:
                lines[key.value] = key.start_mark.line + 1
                continue
            raise _RefusedError(problem=problem, problem_mark=key.start_mark)
        return node


def _odd_number(node: yaml.ScalarNode, value: float) -> _RefusedError:
    text = f"{node.value} is the number {value} to YAML; write {value}, or put it in quotes for a text"
    return _RefusedError(problem=text, problem_mark=node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def parse_yaml(text: str, where: str) -> object:
    """Return the one document in a YAML text, None if it is empty. No object of it is shared between two places.

    Raises UserError naming ``where`` and the line.
    """
    try:
        return _unshared(yaml.load(text, Loader=_Loader), where, [0])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}" if mark is not None else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        what = "" if isinstance(error, _RefusedError) else "not valid YAML: "
        raise UserError(f"{where}{at}: {what}{said}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: {_ENDLESS}") from None
    except (ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of a date or number that is none
        raise UserError(f"{where}: not valid YAML: a value cannot be read ({error}); put it in quotes") from None


def _unshared(value: object, where: str, seen: list[int]) -> object:
    """Return a copy in which no two places share an object. seen: values so far.

    It ends for a value that contains itself.
    """
    seen[0] += 1
    if seen[0] > _MOST_VALUES:
        raise UserError(f"{where}: not valid YAML: {_ENDLESS}")
    if isinstance(value, dict):
        return {key: _unshared(item, where, seen) for key, item in value.items()}
    return [_unshared(item, where, seen) for item in value] if isinstance(value, list) else value

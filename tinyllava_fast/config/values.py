"""One value of a configuration, read as its type says: numbers in their range, null only where it may be.

A number may be written as YAML 1.1 reads it, or as people do: 1e-3, which PyYAML takes for text, and 1e3 for a whole
number. Nothing else is converted: a number is no text, and true is no number.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from tinyllava_fast.config.ranges import FINITE, Filled, Located, Range, fault
from tinyllava_fast.errors import UserError
from tinyllava_fast.fields import is_text, shown
from tinyllava_fast.paths import expand_home

Marks = tuple[object, ...]


class _MismatchError(UserError):
    """A value that is not of its type, or out of its range. key, expected, why: as the message says them."""

    def __init__(self, text: str, key: str, expected: str, why: str) -> None:
        super().__init__(text)
        self.key = key
        self.expected = expected
        self.why = why


def read_value(hint: object, value: object, where: str, key: str, marks: Marks = ()) -> object:
    """Return the value as the type says. marks: of an annotation around the type.

    where, key: its file or "", and its dotted key, for messages. Raises UserError naming both, what was expected and
    what was found.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return read_value(inner[0], value, where, key, (*inner[1:], *marks))
    if origin in (Union, types.UnionType):
        return _read_union(hint, value, where, key, marks)
    if origin in (list, tuple, dict):
        return _read_container(hint, value, where, key, marks)
    if hint in (Any, object):
        return _read_any(value, where, key, marks)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
    elif hint is int or hint is float:
        return _read_number(hint, value, where, key, marks)
    elif hint is str:
        return _read_text(value, where, key, marks)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    _fail(where, key, type_name(hint), value)


def place(where: str, key: str) -> str:
    """Return the head of a message: the file, if there is one, and the key."""
    return f"{where}: {key}" if where else key


def type_name(hint: object) -> str:
    """Return a type in the words of ``tlf-train --help``, without its range."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part).removeprefix("one of ") for part in inner)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(part) for part in inner)}]"
    if hint is types.NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")


def range_of(hint: object) -> str:
    """Return the ranges inside a type, in words; "" without one."""
    found = list(dict.fromkeys(str(mark) for mark in _ranges(hint) if str(mark)))
    inner = next((part for part in get_args(hint) if part is not types.NoneType), hint)
    many = get_origin(hint) in (list, tuple, dict) or get_origin(inner) in (list, tuple, dict)
    return ("each " if many and found else "") + " or ".join(found)


def _ranges(hint: object) -> Iterator[Range]:
    for part in get_args(hint):
        if isinstance(part, Range):
            yield part
        yield from _ranges(part)


def _read_union(hint: object, value: object, where: str, key: str, marks: Marks) -> object:
    options = [part for part in get_args(hint) if part is not types.NoneType]
    if value is None:
        if len(options) < len(get_args(hint)):
            return None
        _fail(where, key, type_name(hint), value)
    if len(options) == 1:
        try:
            return read_value(options[0], value, where, key, marks)
        except _MismatchError as error:
            if (error.key, error.expected) == (key, type_name(options[0])):  # say that null may stand there, too
                _fail(where, key, type_name(hint), value, error.why)
            raise
    for part in options:
        try:
            return read_value(part, value, where, key, marks)
        except _MismatchError:
            continue
    _fail(where, key, type_name(hint), value)


def _read_container(hint: object, value: object, where: str, key: str, marks: Marks) -> object:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is dict and isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                _fail(where, key, "text as the name of each entry", name, "put it in quotes")
        return {n: read_value(inner[1], v, where, f"{key}.{n}", marks) for n, v in value.items()}
    if origin is dict or not isinstance(value, (list, tuple)):
        _fail(where, key, type_name(hint), value)
    if origin is list:
        return [read_value(inner[0], v, where, f"{key}[{i}]", marks) for i, v in enumerate(value)]
    if len(value) != len(inner):
        _fail(where, key, f"a list of {len(inner)} values", value)
    pairs = enumerate(zip(inner, value, strict=True))
    return tuple(read_value(part, v, where, f"{key}[{i}]", marks) for i, (part, v) in pairs)


def _read_any(value: object, where: str, key: str, marks: Marks) -> object:
    """Return free-form settings: anything that JSON can hold; finite numbers where a mark says so."""
    if isinstance(value, dict):
        return _read_container(dict[str, object], value, where, key, marks)
    if isinstance(value, (list, tuple)):
        return _read_container(list[object], value, where, key, marks)
    if isinstance(value, float) and any(isinstance(m, Range) for m in marks) and not math.isfinite(value):
        _fail(where, key, "a number that is finite", value)
    if isinstance(value, str):
        return _read_text(value, where, key, ())
    if value is not None and not isinstance(value, (bool, int, float)):
        _fail(where, key, "text, a number, true, false, null, a list or a mapping", value, "put it in quotes")
    return value


def _read_number(kind: type[int] | type[float], value: object, where: str, key: str, marks: Marks) -> int | float:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            _fail(where, key, kind.__name__, value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        _fail(where, key, kind.__name__, value)
    if kind is int and isinstance(number, float) and math.isfinite(number):
        if not number.is_integer():
            _fail(where, key, kind.__name__, value)
        number = int(number)
    ranges = [mark for mark in marks if isinstance(mark, Range)]
    for allowed in ranges or [FINITE]:
        expected = fault("int" if kind is int else "float", number, allowed)
        if expected:
            _fail(where, key, expected, value, allowed.why)
    return kind(number)


def _read_text(value: object, where: str, key: str, marks: Marks) -> str:
    path = any(isinstance(mark, Located) for mark in marks)
    if not isinstance(value, str):
        simple = value is not None and not isinstance(value, (dict, list, tuple))
        why = "to YAML ~ alone is null, too: write ~/ for the home folder" if path and value is None else ""
        _fail(where, key, "str", value, "put it in quotes" if simple else why)
    if not is_text(value):
        _fail(where, key, "str", value, "it holds half of a surrogate pair; mend it")
    if "\0" in value:
        _fail(where, key, "str", value, "it holds a NUL character; remove it")
    if not value.strip() and any(isinstance(mark, Filled) for mark in marks):
        _fail(where, key, "text that is not empty", value)
    if not path:
        return value
    try:
        return expand_home(value)
    except UserError as error:
        raise UserError(f"{place(where, key)}: {error}") from None


def _fail(where: str, key: str, expected: str, value: object, why: str = "") -> NoReturn:
    text = f"{place(where, key)}: expected {expected}, got {shown(value)}" + (f"; {why}" if why else "")
    raise _MismatchError(text, key, expected, why)

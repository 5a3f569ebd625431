"""``--option textvqa.ocr=false``: settings of benchmarks, each declared by the benchmark's Options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Benchmark
from tinyllava_fast.fields import is_number, is_text

_WANTED = {int: "a whole number", float: "a number", str: "UTF-8 text"}


def chosen(text: str) -> list[str]:
    """Names of a comma list; "all": every one of the standard suite. UserError for an unknown or repeated name."""
    if text == "all":
        return [name for name in BENCHMARKS if BENCHMARKS.get(name).in_all]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        BENCHMARKS.get(name, "--benchmarks")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--benchmarks {text!r}: give one or more names, each once")
    return names


def build(names: Sequence[str], options: Sequence[str] = ()) -> list[Benchmark]:
    """The benchmarks of these names with options like "textvqa.ocr=false" set.

    Raises UserError for an option of a benchmark that is not chosen, an unknown option, or a value of another type.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in options:
        path, equals, text = option.partition("=")
        name, dot, field = path.partition(".")
        if not (equals and dot):
            raise UserError(f"--option {option!r}: write BENCHMARK.OPTION=VALUE, e.g. textvqa.ocr=false")
        if name not in values:
            raise UserError(f"--option {option!r}: benchmark {name!r} is not chosen; {nearest(name, values)}")
        hints = get_type_hints(BENCHMARKS.get(name).Options)
        if field not in hints:
            raise UserError(f"--option {option!r}: {name} has no option {field!r}; {nearest(field, hints)}")
        if field in values[name]:
            raise UserError(f"--option {option!r}: {name}.{field} is given twice; keep one of them")
        values[name][field] = _value(text, hints[field], option)
    return [_benchmark(name, values[name]) for name in names]


def _benchmark(name: str, values: dict[str, Any]) -> Benchmark:
    """Raises UserError for a value that the benchmark's Options refuse."""
    try:
        return BENCHMARKS.get(name)(BENCHMARKS.get(name).Options(**values))
    except UserError as error:
        raise UserError(f"--option {name}: {error}") from None


def describe(benchmark: Benchmark) -> dict[str, Any]:
    """The settings of a benchmark as JSON-able values."""
    return dataclasses.asdict(benchmark.options)


def _value(text: str, kind: Any, option: str) -> Any:
    """The text as the kind of the option, a finite number or text; ranges are the Options' own to check."""
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise UserError(f"--option {option!r}: {text!r} is none of {', '.join(get_args(kind))}")
    if kind is bool:
        if text in ("true", "false"):
            return text == "true"
        raise UserError(f"--option {option!r}: true or false is expected")
    if kind is str and is_text(text):
        return text
    try:
        value = kind(text) if text.isascii() and "_" not in text else None
    except (TypeError, ValueError):
        value = None
    if kind is str or not is_number(value):
        raise UserError(f"--option {option!r}: {_WANTED[kind]} is expected")
    return value

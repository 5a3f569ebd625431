"""``--option textvqa.ocr=false``: settings of benchmarks, each declared by the benchmark's Options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args, get_type_hints

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.config.values import read_value
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Benchmark
from tinyllava_fast.fields import is_text


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
    values: dict[str, dict[str, object]] = {name: {} for name in names}
    for option in options:
        path, equals, text = option.partition("=")
        name, dot, field = path.partition(".")
        if not (equals and dot):
            raise UserError(f"--option {option!r}: write BENCHMARK.OPTION=VALUE, e.g. textvqa.ocr=false")
        if name not in values:
            raise UserError(f"--option {option!r}: benchmark {name!r} is not chosen; {nearest(name, values)}")
        hints = get_type_hints(BENCHMARKS.get(name).Options, include_extras=True)
        if field not in hints:
            raise UserError(f"--option {option!r}: {name} has no option {field!r}; {nearest(field, hints)}")
        if field in values[name]:
            raise UserError(f"--option {option!r}: {name}.{field} is given twice; keep one of them")
        if not is_text(text):
            raise UserError(f"--option {option!a}: the value is not UTF-8 text")
        values[name][field] = _value(text, hints[field], f"--option {option!r}", path)
    return [_build(name, values[name]) for name in names]


def describe(benchmark: Benchmark) -> dict[str, object]:
    """The settings of a benchmark as JSON-able values."""
    return dataclasses.asdict(benchmark.options)


def _build(name: str, values: dict[str, object]) -> Benchmark:
    benchmark = BENCHMARKS.get(name)
    return benchmark(parse_into(benchmark.Options, values, "--option", key=name))


def _value(text: str, hint: object, where: str, key: str) -> object:
    """The text as the type of the option says; a number may be written in any way that a YAML takes."""
    switch = bool in (hint, *get_args(hint)) and text in ("true", "false")
    return read_value(hint, text == "true" if switch else text, where, key)

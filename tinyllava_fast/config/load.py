"""YAML -> frozen dataclasses, strictly: an unknown key, a wrong type or a missing file is an error that names it.

The walk over sections is here, config/compose.py joins the files of a run, config/values.py reads each value.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import yaml

from tinyllava_fast.config.compose import Section, expand, read_section, section_of
from tinyllava_fast.config.names import file_name_fault
from tinyllava_fast.config.overrides import apply_overrides
from tinyllava_fast.config.ranges import Named
from tinyllava_fast.config.schema import LEAST_SILENCE, ModelConfig, RunConfig
from tinyllava_fast.config.values import place, range_of, read_value, type_name
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.fields import shown
from tinyllava_fast.paths import expand_home

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply dotted overrides ("stages.finetune.optim.lr=1e-4") and check every key and value.

    A section may be a file of its own or start from one by ``base`` (config/compose.py); overrides reach inside.
    A file below configs/ that is not here is the one that was installed with the package.
    Raises UserError naming the file, the key, what was expected and the nearest valid name.
    """
    if "\0" in str(path) or not str(path).strip():
        what = "with a NUL character; remove it" if str(path).strip() else "that is empty; name a YAML file"
        raise UserError(f"{str(path)!r}: a path {what}")
    path = shipped(Path(expand_home(str(path))))
    tree = apply_overrides(read_section(RunConfig, path), overrides, lambda t: expand(RunConfig, t, path, (path,)))
    run = parse_into(RunConfig, tree, str(path))
    _check_run(run, str(path))
    return run


def shipped(path: Path) -> Path:
    """Return the path, or for one below configs/ that does not exist here that of the package's own file."""
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    installed = Path(__file__).parents[1] / path
    return installed if installed.is_file() else path


def parse_into(cls: type[T], mapping: object, where: str, *, key: str = "") -> T:
    """Build dataclass ``cls`` from a mapping; nested dataclasses, lists and dicts of them included.

    where: the file that the mapping came from, for messages; "": the key says all. key: dotted prefix of the mapping.
    """
    if not isinstance(mapping, dict):
        raise UserError(
            f"{place(where, key or 'top level')}: expected a mapping of {cls.__name__} keys, got {shown(mapping)}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    files = mapping.written if isinstance(mapping, Section) else {}
    for name in mapping:
        if name not in fields:
            full = place(files.get(name, where), _join(key, name))
            raise UserError(f"{full}: unknown key; {nearest(str(name), fields)}")
    hints = get_type_hints(cls, include_extras=True)
    values = {
        name: _parse_value(hints[name], value, files.get(name, where), _join(key, name))
        for name, value in mapping.items()
    }
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{place(where, _join(key, name))}: missing; it has no default, add it")
    try:
        return cls(**values)
    except UserError as error:
        full = _join(key, error) if str(error).partition(":")[0] in fields else f"{key or cls.__name__}: {error}"
        raise UserError(place(where, full)) from None


def dump(config: DataclassInstance) -> str:
    """Return the dataclass as YAML; ``load_run`` of the text gives an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: DataclassInstance) -> dict[str, Any]:
    """Return the dataclass as plain JSON-able values (tuples become lists)."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return {name: plain(value) for name, value in dataclasses.asdict(config).items()}


def describe(
    cls: type = RunConfig, prefix: str = "", default: object = None, *, names: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Return every key of a configuration with its type, default, range and meaning: the body of ``tlf-train --help``.

    default: an object whose values are the defaults; None: those of the class. names: kind of a registry -> the names
    that it knows, shown with the keys that take them.
    """
    docs, hints, lines = _field_docs(cls), get_type_hints(cls, include_extras=True), []
    for spec in dataclasses.fields(cls):
        name, hint = _join(prefix, spec.name), hints[spec.name]
        value = _default(spec) if default is None else getattr(default, spec.name)
        section = section_of(hint)
        if section is not None:
            one = section is hint
            inner = value if one and value is not dataclasses.MISSING else None
            lines.append(describe(section, name if one else f"{name}.<name>", inner, names=names))
            continue
        text = "required" if value is dataclasses.MISSING else shown(value)
        allowed = range_of(hint)
        lines.append(f"  {name}: {type_name(hint)} = {text}" + (f"  ({allowed})" if allowed else ""))
        kinds = [mark.kind for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Named)]
        known = [f"Known: {', '.join(names[kind])}." for kind in kinds if kind in names] if names else []
        if spec.name in docs:
            lines.append(textwrap.indent(textwrap.fill(" ".join([docs[spec.name], *known]), 100), "      "))
    return "\n".join(lines)


def _default(spec: dataclasses.Field[object]) -> object:
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def _parse_value(hint: object, value: object, where: str, key: str) -> object:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse_into(hint, value, where, key=key)
    section = section_of(hint)
    if section is not None:
        if not isinstance(value, list):
            raise UserError(
                f"{place(where, key)}: expected a list of {section.__name__}, each behind a dash, got {shown(value)}"
            )
        return [parse_into(section, v, where, key=_item_key(key, i, v)) for i, v in enumerate(value)]
    return read_value(hint, value, where, key)


def _item_key(key: str, index: int, item: object) -> str:
    """Return the key of an item of a list as an override writes it: by its name, by its index where it has none."""
    name = item.get("name") if isinstance(item, dict) else None
    return f"{key}.{name}" if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) else f"{key}[{index}]"


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Return the string below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)  # noqa: S101 the source of a class
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _check_run(run: RunConfig, where: str) -> None:
    """Raise UserError for faults that no single field can tell."""
    if not run.stages:
        raise UserError(f"{where}: stages: empty; a run needs at least one stage")
    _check_stage_names([stage.name for stage in run.stages], where)
    for stage in run.stages:
        stage.validation.check(f"{where}: stages.{stage.name}.validation")
    _check_model(run.model, where)
    if 0 < (silence := run.engine.silence_timeout) < LEAST_SILENCE:
        raise UserError(
            f"{where}: engine.silence_timeout: {silence}: a busy core can stop a process that is well for seconds; set "
            f"{LEAST_SILENCE} or more, or 0 for never"
        )
    if os.path.exists(run.output_dir) and not os.path.isdir(run.output_dir):
        raise UserError(f"{where}: output_dir: {run.output_dir} is a file; name a folder")


def _check_stage_names(names: list[str], where: str) -> None:
    for number, name in enumerate(names):
        key = f"{where}: stages[{number}].name"
        if problem := file_name_fault(name) or ("the run folder holds one of that name" if _is_taken(name) else ""):
            raise UserError(f"{key}: {name!r} can't name a stage, which becomes a folder of the run: {problem}")
        twin = next((other for other in names[:number] if other.casefold() == name.casefold()), None)
        if twin is not None:
            raise UserError(
                f"{key}: the name {name!r} is used twice; stage names are folder names"
                + (f", and some file systems take {twin!r} for the same" if twin != name else "")
            )


def _is_taken(name: str) -> bool:
    """Return True if the run folder has something else of that name: some file systems take "Final" for "final"."""
    folders = {"best", "checkpoints", "final", "last", "tensorboard", "trackio", "validation", "wandb"}
    files = {"config.yaml", "index.html", "metrics.jsonl", "nonfinite.jsonl", "status.json", "summary.json", "wandb-id"}
    return name.casefold() in folders | files


def _check_model(model: ModelConfig, where: str) -> None:
    """Raise UserError for components beside ``model.path``, which has them all and would leave them unread."""
    if model.path is None:
        return
    default = ModelConfig()
    for part in ("llm", "vision", "connector"):
        given, plain = to_dict(getattr(model, part)), to_dict(getattr(default, part))
        for name in (n for n in given if given[n] != plain[n]):
            raise UserError(
                f"{where}: model.{part}.{name}: set, but model.path ({model.path}) already holds the language model, "
                f"tower, connector, tokenizer and image processor; remove one of the two"
            )

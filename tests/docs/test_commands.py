"""Every command that README and docs show is parsed by the parser it is meant for; files and names it gives exist."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, Command, blocks, commands, name, prose, read
from tinyllava_fast.config.load import describe, load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.train import cli as train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
HISTORY = DOCS / "LOG.md"  # what was typed then
SHOWN = [page for page in PAGES if page != HISTORY]


def parser(program: str) -> argparse.ArgumentParser:
    module = import_module(PROJECT["scripts"][program].partition(":")[0])
    make = getattr(module, "parser", None) or getattr(module, "_parser", None)
    assert make is not None, f"{program}: give its module a function parser() that returns its command line"
    return make()


def flags(of: argparse.ArgumentParser) -> set[str]:
    found = set(of._option_string_actions)
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for sub in action.choices.values() for flag in flags(sub)}
    return found


def problem(command: Command) -> str | None:
    """What is wrong with a command, or None."""
    words = list(command.words)
    if command.program == "make":
        targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
        wrong = [word for word in words if "=" not in word and word not in targets]
        return f"no target {wrong[0]}" if wrong else None
    if command.program not in PROJECT["scripts"]:
        return f"no such command; have {', '.join(PROJECT['scripts'])}"
    if command.program == "tlf-train":
        return _train_problem(words if command.whole else ["1" if word == "N" else word for word in words])
    known = parser(command.program)
    if not command.whole:
        given = {word.partition("=")[0].rstrip(",") for word in words if word.startswith("--")}
        unknown = sorted(given - flags(known))
        return f"unknown {unknown}" if unknown else None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            known.parse_args(words)
    except SystemExit as stop:
        return said.getvalue() if stop.code else None
    return None


def _train_problem(words: list[str]) -> str | None:
    if words[:1] == ["status"] or (words and words[0].startswith("--") and words[0] in train.USAGE):
        return None
    try:
        _, _, rest = train.split_processes(words)
        path, _, overrides, _ = train.parse(rest)
        if path is None:
            return None
        # a YAML of the reader's is taken for the one that `tlf-data init` writes
        load_run(ROOT / path if path.startswith("configs/") else ROOT / "configs" / "mine.yaml", overrides)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_commands_parse(page: Path) -> None:
    wrong = [f"{command}\n    {text}" for command in commands(page) if (text := problem(command)) is not None]
    assert not wrong, "\n".join(wrong)


def test_there_are_commands_of_every_program() -> None:
    shown = {command.program for page in SHOWN for command in commands(page)}
    assert set(PROJECT["scripts"]) | {"make"} <= shown, set(PROJECT["scripts"]) - shown


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("tlf-eval", "m", "--benchmrks", "pope"), "--benchmarks"),
        (("tlf-train", "configs/demo.yaml", "stages.finetune.optim.lrr=1"), "lr"),
        (("tlf-train", "configs/nothing.yaml"), "nothing.yaml"),
        (("tlf-bench", "opps"), "invalid choice"),
        (("make", "demmo"), "demmo"),
        (("tlf-nothing", "x"), "no such command"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_wrong_command_is_found(line: tuple[str, ...], said: str) -> None:
    assert said in (problem(Command("page", line[0], line[1:], True)) or "")


@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_files_extras_and_modules_exist(page: Path) -> None:
    text = read(page)
    files = {path.rstrip(".") for path in re.findall(r"(?<![\w/])(?:configs|csrc|kernels|bench)/[\w./-]+", text)}
    missing = sorted(path for path in files if not (ROOT / path).exists())
    assert not missing, missing
    extras = {extra for group in re.findall(r"tinyllava-fast\[([\w,]+)\]", text) for extra in group.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"]), extras
    for module in re.findall(r"python -m ((?:tests|tinyllava_fast)[\w.]*)", text):
        assert util.find_spec(module) is not None, module


def test_keys_of_the_migration_tables_exist() -> None:
    known = describe(names={})
    keys = set(re.findall(r"^  (\S+):", known, re.MULTILINE))
    tails = {key.partition("<name>.")[2] for key in keys if key.startswith("stages.<name>.")}
    wrong = []
    for text in re.findall(r"`([^`]+)`", prose(DOCS / "migration.md")):
        if text == "…" or not text.startswith(("…", "model.", "engine.", "checkpoint.")):
            continue
        key = text.lstrip("…").partition(":")[0]
        pool = tails if text.startswith("…") else keys
        if not any(one == key or one.startswith(f"{key}.") for one in pool):
            wrong.append(text)
    assert len(tails) > 50 and not wrong, wrong


def test_yaml_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    shown = [(name(page), text) for page in SHOWN for text in blocks(page, "yaml")]
    assert len(shown) > 5
    for page, text in shown:
        assert yaml.safe_load(text), page


def test_python_compiles() -> None:
    shown = [(name(page), text) for page in SHOWN for kind in ("python", "py") for text in blocks(page, kind)]
    assert len(shown) > 5
    for page, text in shown:
        compile(text, page, "exec")

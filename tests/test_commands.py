"""Every command: --version, and the nearest flag for one that does not exist."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from tinyllava_fast import __version__
from tinyllava_fast.bench import cli as bench
from tinyllava_fast.commands import nearest_flag
from tinyllava_fast.convert import cli as convert
from tinyllava_fast.eval import cli as evaluate
from tinyllava_fast.infer import chat
from tinyllava_fast.train import cli as train

MAINS: dict[str, Callable[..., Any]] = {
    "tlf-train": train.main,
    "tlf-eval": evaluate.main,
    "tlf-chat": chat.main,
    "tlf-convert": convert.main,
    "tlf-bench": bench.main,
}


def code_of(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    try:
        return MAINS[command](arguments) or 0
    except SystemExit as exit:
        return int(exit.code or 0)


@pytest.mark.parametrize("command", MAINS)
def test_version(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(command, ["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"tinyllava_fast {__version__}\n"


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("tlf-eval", ["--benchmrks", "x"], "unrecognized arguments: --benchmrks; did you mean --benchmarks?"),
        ("tlf-chat", ["m", "--plugn=x"], "did you mean --plugin?"),
        ("tlf-convert", ["export", "a", "b", "--format", "llava", "--lm-name", "x"], "did you mean --llm-name?"),
    ],
)
def test_nearest_flag(
    command: str, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(command, arguments, monkeypatch) == 2
    assert said in capsys.readouterr().err


def test_no_flag_is_near() -> None:
    assert nearest_flag("--xyz", ["--resume"]) == nearest_flag("resume", ["--resume"]) == ""
    assert nearest_flag("--print-confg", ["--print_config"]) == "did you mean --print_config?"

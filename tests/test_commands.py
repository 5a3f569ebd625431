"""Every command: --version, and the nearest flag for one that does not exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast import __version__
from tinyllava_fast.bench import cli as bench
from tinyllava_fast.commands import nearest_flag
from tinyllava_fast.convert import cli as convert
from tinyllava_fast.doctor import cli as doctor
from tinyllava_fast.eval import cli as evaluate
from tinyllava_fast.infer import chat
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.look import cli as look
from tinyllava_fast.prepare import cli as data
from tinyllava_fast.serve import cli as serve
from tinyllava_fast.train import cli as train
from tinyllava_fast.variables import VARIABLES

MAINS: dict[str, Callable[..., Any]] = {
    "tlf-data": data.main,
    "tlf-train": train.main,
    "tlf-eval": evaluate.main,
    "tlf-chat": chat.main,
    "tlf-look": look.main,
    "tlf-serve": serve.main,
    "tlf-convert": convert.main,
    "tlf-bench": bench.main,
    "tlf-doctor": doctor.main,
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


@pytest.mark.parametrize("command", MAINS)
def test_help_ends_like_a_manual_page(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(command, ["--help"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "\nexit code:\n  0  " in out and all(f"\n  {name} " in out for name in VARIABLES)


@pytest.mark.parametrize("command", MAINS)
def test_a_shell_completes_it(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The script is one that bash takes, and it offers the command's own flags."""
    pytest.importorskip("shtab", reason="shtab writes the scripts")
    assert code_of(command, ["--print-completion", "bash"], monkeypatch) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert f" {command}\n" in script.read_text() and " --version " in script.read_text()


def test_completion_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert code_of("tlf-eval", ["--print-completion", "bash"], monkeypatch) == 2
    assert "pip install 'tinyllava-fast[completion]'" in capsys.readouterr().err


def test_every_variable_that_is_read_is_told() -> None:
    root = Path(__file__).parents[1]
    sources = [*(root / "tinyllava_fast").rglob("*.py"), *(root / "kernels").glob("*.py"), root / "csrc" / "isa.cpp"]
    quoted = {name for path in sources for name in re.findall(r'"(TLF_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    own = {"TLF_ATTEMPT", "TLF_LAUNCHED_NS", "TLF_REFUSED", "TLF_SLURM_STEP"}  # of processes for one another
    assert quoted - own == set(VARIABLES)


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


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("tlf-eval", ["m", "--limit", "x"], "argument --limit: 'x' is not a positive whole number"),
        ("tlf-eval", ["m", "--batch-tokens", "0"], "argument --batch-tokens: '0' is not a positive whole number"),
        ("tlf-eval", ["m", "--threads", "9" * 20], "argument --threads: 99999999999999999999 is more than 4096"),
        ("tlf-serve", [], "no model; name its folder"),
        ("tlf-serve", ["a", "--models", "a"], "two models are called 'a'"),
        ("tlf-serve", ["a", "--host", "0.0.0.0"], "others can reach this; give --api-key"),
        ("tlf-serve", ["a", "--api-key", " "], "the key must be printable ASCII"),
        ("tlf-chat", ["m", "--threads", "9" * 11], "argument --threads: 99999999999 is more than 4096"),
        ("tlf-chat", ["m", "--temperature", "nan"], "temperature is nan; it must be 0 (greedy) or a positive number"),
        ("tlf-chat", ["m", "--temperature", "inf"], "temperature is inf; it must be"),
        ("tlf-bench", ["machine", "--quick", "--device", "xpu"], "--device xpu: there is no such device here"),
        ("tlf-train", ["x.yaml", "--resume", ""], "--resume: expected auto, never or a path"),
        ("tlf-data", [], "the following arguments are required: command"),
    ],
)
def test_values_of_flags(
    command: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup_logging()
    monkeypatch.setattr(log, "propagate", True)
    assert code_of(command, arguments, monkeypatch) == 2
    assert said in capsys.readouterr().err + caplog.text

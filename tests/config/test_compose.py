"""Sections in files of their own, bases, and overrides that reach into both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.config.load import dump, load_run
from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.errors import UserError


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Files by name (``__`` for a folder's slash); returns run.yaml."""

    def make(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "run.yaml"

    return make


STAGE = "stages: [{name: a, data: {records: a.json}}]\n"


def test_overrides_reach_into_a_section_that_is_a_file(write: Callable[..., Path]) -> None:
    path = write(
        run="model: parts/model.yaml\n" + STAGE,
        parts__model="llm: llm/big.yaml\nconnector: {options: {depth: 3}}\n",
        parts__llm__big="path: big\nconfig: {a: 1, b: {c: 2}}\n",
    )
    run = load_run(path, ["model.llm.path=small", "model.llm.config.b.d=4", "model.connector.options.activation=relu"])
    assert run.model.llm.path == "small" and run.model.llm.config == {"a": 1, "b": {"c": 2, "d": 4}}
    assert run.model.connector.options == {"depth": 3, "activation": "relu"}


def test_an_override_may_name_a_file_and_the_next_reach_into_it(write: Callable[..., Path]) -> None:
    path = write(run=STAGE, model="llm: {path: x}\nconnector: {options: {depth: 3}}\n", llm="path: y\n")
    run = load_run(path, ["model=model.yaml", "model.connector.options.depth=4", "model.llm=llm.yaml"])
    assert run.model.connector.options == {"depth": 4} and run.model.llm.path == "y"


def test_base_is_merged_under_its_mapping_deeply(write: Callable[..., Path]) -> None:
    path = write(
        run="base: common/base.yaml\nseed: 5\nengine: {threads: 2}\nmodel: {llm: {config: {b: {c: 9}}}}\n",
        common__base="seed: 1\nlog_every: 7\nengine: {threads: 1, workers: 3}\nmodel: model.yaml\n"
        "stages: [{base: stage.yaml, name: b}, {base: stage.yaml, optim: {betas: [0.5, 0.6]}}]\n",
        common__model="llm: {config: {a: 1, b: {c: 2, d: 3}}}\n",
        common__stage="name: s\ndata: {records: r.json}\noptim: {lr: 1e-4, betas: [0.1, 0.2]}\n",
    )
    run = load_run(path, ["stages.b.optim.lr=3e-4"])
    assert (run.seed, run.log_every, run.engine.threads, run.engine.workers) == (5, 7, 2, 3)
    assert run.model.llm.config == {"a": 1, "b": {"c": 9, "d": 3}}
    assert [s.name for s in run.stages] == ["b", "s"] and [s.optim.lr for s in run.stages] == [3e-4, 1e-4]
    assert [s.optim.betas for s in run.stages] == [(0.1, 0.2), (0.5, 0.6)], "lists replace"
    assert "base.yaml" not in dump(run) and "base:" not in dump(run)


def test_a_section_with_a_file_of_its_own_takes_nothing_from_the_outer_base(write: Callable[..., Path]) -> None:
    files = {
        "base": "model: {llm: {path: old, tokenizer: old}, vision: {path: v}}\n" + STAGE,
        "new": "path: new\n",
    }
    for llm in ("new.yaml", "{base: new.yaml}"):
        run = load_run(write(run=f"base: base.yaml\nmodel: {{llm: {llm}}}\n", **files))
        assert (run.model.llm.path, run.model.llm.tokenizer, run.model.vision.path) == ("new", None, "v")
    run = load_run(write(run="base: base.yaml\nmodel: {llm: {path: new}}\n", **files))
    assert (run.model.llm.path, run.model.llm.tokenizer) == ("new", "old")


@pytest.mark.parametrize(
    ("over", "overrides", "options"),
    [
        ("{type: pixel_shuffle}", [], {}),
        ("{type: pixel_shuffle, options: {factor: 3}}", [], {"factor": 3}),
        ("{type: mlp}", [], {"depth": 3}),
        ("{options: {activation: relu}}", [], {"depth": 3, "activation": "relu"}),
        ("{}", ["model.connector.type=pixel_shuffle"], {}),
        ("{}", ["model.connector.type=mlp"], {"depth": 3}),
        ("{}", ["model.connector.type=pixel_shuffle", "model.connector.options.factor=3"], {"factor": 3}),
        ("{}", ["model.connector.options.factor=3", "model.connector.type=pixel_shuffle"], {"factor": 3}),
        ("{}", ["model.connector.options={factor: 3}", "model.connector.type=pixel_shuffle"], {"factor": 3}),
        ("{}", ["model.connector.options.depth=4", "model.connector.type=mlp"], {"depth": 4}),
        ("{}", ["model.connector={type: linear}"], {}),
    ],
)
def test_another_type_leaves_the_options_of_the_former_behind(
    over: str, overrides: list[str], options: dict[str, Any], write: Callable[..., Path]
) -> None:
    path = write(
        run=f"base: base.yaml\nmodel: {{connector: {over}}}\n",
        base="model: {connector: {type: mlp, options: {depth: 3}}}\n" + STAGE,
    )
    assert load_run(path, overrides).model.connector.options == options


def test_config_goes_on_with_another_type(write: Callable[..., Path]) -> None:
    path = write(run="model: {vision: {config: {hidden_size: 8}}}\n" + STAGE)
    assert load_run(path, ["model.vision.type=clip"]).model.vision.config == {"hidden_size": 8}


def test_a_model_folder_replaces_the_components_of_the_base(write: Callable[..., Path]) -> None:
    path = write(run="base: base.yaml\nmodel: {path: runs/x/final}\n", base="model: {llm: {path: a}}\n" + STAGE)
    assert load_run(path).model.llm.path is None
    path = write(run="base: base.yaml\nmodel: {path: runs/x/final, llm: {path: b}}\n")
    with pytest.raises(UserError, match=r"model\.llm\.path: set, but model\.path"):
        load_run(path)


def test_stages_replace_those_of_the_base(write: Callable[..., Path]) -> None:
    path = write(run="base: base.yaml\nstages: [{name: z, data: {}}]\n", base="log_every: 3\n" + STAGE)
    assert [s.name for s in load_run(path).stages] == ["z"]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"run": "base: run.yaml\n"}, ["in a circle", "run.yaml -> "]),
        ({"run": "base: a.yaml\n", "a": "base: b.yaml\n", "b": "base: a.yaml\n"}, ["circle", "a.yaml", "b.yaml"]),
        ({"run": "model: m.yaml\n", "m": "llm: {base: l.yaml}\n", "l": "base: l.yaml\n"}, ["circle", "l.yaml"]),
        ({"run": "base: bas.yaml\n", "base": STAGE}, ["bas.yaml: no such config file", "did you mean 'base.yaml'"]),
        ({"run": "base: [a]\n"}, ["run.yaml: base: expected the path of a YAML file, got ['a']"]),
        ({"run": "model: {llm: {base: 3}}\n"}, ["run.yaml: base: expected the path"]),
        ({"run": "base: a.yaml\n", "a": "- 1\n"}, ["a.yaml: expected a mapping"]),
        ({"run": "model: m.yaml\n" + STAGE, "m": "llm: {pth: 1}\n"}, ["m.yaml: model.llm.pth: unknown key", "'path'"]),
        ({"run": "base: a.yaml\n" + STAGE, "a": "seed: x\n"}, ["a.yaml: seed: expected int, got 'x'"]),
        ({"run": "model: {llm: {config: {base: 1}}}\n"}, ["stages: empty"]),
    ],
)
def test_errors_name_the_file(files: dict[str, str], parts: list[str], write: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as error:
        load_run(write(**files))
    for part in parts:
        assert part in str(error.value)


def test_an_override_is_not_blamed_on_the_file(write: Callable[..., Path]) -> None:
    path = write(run="base: a.yaml\n" + STAGE, a="engine: {threads: 1}\n")
    with pytest.raises(UserError) as error:
        load_run(path, ["engine.threads=x"])
    assert "run.yaml: engine.threads: expected int" in str(error.value)


@pytest.mark.parametrize(
    ("root", "data", "records", "images"),
    [
        (".", {"records": "a/b.json"}, "a/b.json", "."),
        (".", {"records": "./b.json", "image_folder": "x/"}, "./b.json", "x/"),
        ("/data", {"records": "b.json"}, "/data/b.json", "/data"),
        ("/data", {"records": "b.json", "image_folder": "i/j"}, "/data/b.json", "/data/i/j"),
        ("data", {"records": "/x/b.json", "image_folder": "/y"}, "/x/b.json", "/y"),
        ("data", {}, "", "data"),
    ],
)
def test_data_root(root: str, data: dict[str, Any], records: str, images: str) -> None:
    found = DataConfig(**data).under(root)
    assert (found.records, found.image_folder) == (records, images)

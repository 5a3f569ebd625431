"""The run configuration: strict keys, typed values, overrides, round trip, and messages that name the remedy."""

from pathlib import Path

import pytest

from tinyllava_fast.config.load import describe, dump, load_run, parse_into
from tinyllava_fast.config.schema import ConnectorConfig, RunConfig, StageConfig
from tinyllava_fast.errors import UserError

MINIMAL = """
output_dir: runs/x
stages:
  - name: pretrain
    data: {records: a.json}
    optim: {lr: 1e-3, betas: [0.9, 0.95]}
  - name: finetune
    data: {records: b.json}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_values_are_typed(config: Path) -> None:
    run = load_run(config)
    assert run.stages[0].optim.lr == 1e-3 and isinstance(run.stages[0].optim.lr, float)
    assert run.stages[0].optim.betas == (0.9, 0.95)
    assert run.stages[1].recipe.vision.tune == "frozen"


def test_round_trip(config: Path, tmp_path: Path) -> None:
    run = load_run(config)
    again = tmp_path / "again.yaml"
    again.write_text(dump(run))
    assert load_run(again) == run


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stages.finetune.optim.lr=1e-4", lambda r: r.stages[1].optim.lr, 1e-4),
        ("stages.0.max_steps=7", lambda r: r.stages[0].max_steps, 7),
        ("--engine.threads=2", lambda r: r.engine.threads, 2),
        ("seed=1e3", lambda r: r.seed, 1000),
        ("model.llm.config={model_type: llama}", lambda r: r.model.llm.config, {"model_type": "llama"}),
    ],
)
def test_overrides(config: Path, override: str, read, value) -> None:
    assert read(load_run(config, [override])) == value


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "stages.finetune.optim.lrr=1",
            ["run.yaml", "stages[1].optim.lrr", "unknown key", "did you mean 'lr'"],
        ),
        ("stages.finetun.optim.lr=1", ["no item 'finetun'", "did you mean 'finetune'"]),
        ("stages.9.optim.lr=1", ["no item '9'"]),
        (
            "stages.0.optim.label_smoothing=2",
            ["run.yaml", "stages[0].optim.label_smoothing: expected a number from 0 to 1, got 2"],
        ),
        ("stages.0.optim.z_loss=-1", ["run.yaml", "stages[0].optim.z_loss: expected a number of at least 0, got -1"]),
        ("engine.dtype=fp8", ["engine.dtype", "one of 'bfloat16', 'float32'", "'fp8'"]),
        ("seed=abc", ["run.yaml", "seed", "expected int", "'abc'"]),
        ("seed=true", ["seed", "expected int"]),
        ("engine.compile=3", ["engine.compile", "expected bool or 'auto', 'regional'"]),
        ("engine=7", ["engine", "expected a mapping of EngineConfig"]),
        ("stages={}", ["stages", "expected a list of StageConfig"]),
        ("stages=[]", ["stages", "at least one stage"]),
        ("stages=[{name: a}]", ["stages[0].data", "missing"]),
        ("stages=[{name: a, data: {}}, {name: a, data: {}}]", ["'a' is used twice"]),
        ("stages=[{name: final, data: {}}]", ["can't name a stage"]),
        ("engine.threads.x=1", ["engine.threads", "expected int"]),
        ("noequals", ["expected key.path=value"]),
        ("seed={", ["not valid YAML"]),
        ("seed.x.y=1", ["not a section"]),
    ],
)
def test_errors_name_key_file_and_remedy(config: Path, override: str, parts: list[str]) -> None:
    overrides = ["seed=1", override] if override.startswith("seed.x") else [override]
    with pytest.raises(UserError) as error:
        load_run(config, overrides)
    for part in parts:
        assert part in str(error.value)


def test_missing_file_names_the_nearest(config: Path) -> None:
    with pytest.raises(UserError, match=r"run2\.yaml: no such config file; did you mean 'run\.yaml'"):
        load_run(config.with_name("run2.yaml"))


@pytest.mark.parametrize(("text", "part"), [("a: [", "not valid YAML"), ("- 1", "expected a mapping")])
def test_malformed_yaml(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part):
        load_run(path)


def test_a_section_may_live_in_its_own_file(config: Path) -> None:
    config.with_name("model.yaml").write_text("connector: {options: {depth: 3}}")
    run = load_run(config, ["model=model.yaml"])
    assert run.model.connector.options == {"depth": 3}
    with pytest.raises(UserError, match="no such config file"):
        load_run(config, ["model=absent.yaml"])


def test_parse_into_refuses_paths_without_a_folder() -> None:
    with pytest.raises(UserError, match="expected a mapping of ConnectorConfig"):
        parse_into(ConnectorConfig, "x.yaml", "here")


def test_describe_lists_every_key_with_its_meaning() -> None:
    text = describe()
    assert "stages.<name>.optim.lr: float = 0.001" in text
    assert "Peak learning rate of components without their own." in text
    assert "stages.<name>.name: str = required" in text
    assert describe(StageConfig).count("\n") < text.count("\n")
    assert RunConfig().output_dir in text

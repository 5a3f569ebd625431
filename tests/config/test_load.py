"""The run configuration: strict keys, typed values, overrides, round trip, and messages that name the remedy."""

from pathlib import Path

import pytest
import yaml

from tinyllava_fast.config.load import describe, dump, load_run, parse_into
from tinyllava_fast.config.schema import ConnectorConfig, ModelConfig, RunConfig, StageConfig
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
            ["run.yaml", "stages.finetune.optim.lrr", "unknown key", "did you mean 'lr'"],
        ),
        ("stages.finetun.optim.lr=1", ["no item 'finetun'", "did you mean 'finetune'"]),
        ("stages.9.optim.lr=1", ["no item '9'"]),
        (
            "stages.0.optim.label_smoothing=2",
            ["run.yaml", "stages.pretrain.optim.label_smoothing: expected a number from 0 to 1, got 2"],
        ),
        (
            "stages.0.optim.z_loss=-1",
            ["run.yaml", "stages.pretrain.optim.z_loss: expected a number of at least 0"],
        ),
        ("engine.dtype=fp8", ["engine.dtype", "one of 'bfloat16', 'float16', 'float32'", "'fp8'"]),
        ("seed=abc", ["run.yaml", "seed", "expected int", "'abc'"]),
        ("seed=true", ["seed", "expected int"]),
        ("engine.compile=3", ["engine.compile", "expected bool or 'auto', 'regional'"]),
        ("engine=7", ["engine", "expected a mapping of EngineConfig"]),
        ("stages={}", ["stages", "expected a list of StageConfig"]),
        ("stages=[]", ["stages", "at least one stage"]),
        ("stages=[{name: a}]", ["stages.a.data", "missing"]),
        ("stages=[{name: a, data: {}}, {name: a, data: {}}]", ["'a' is used twice"]),
        ("stages=[{name: final, data: {}}]", ["can't name a stage"]),
        ("engine.threads.x=1", ["engine.threads", "expected int"]),
        ("engine.silence_timeout=9", ["engine.silence_timeout: 9: a busy core", "set 10 or more, or 0 for never"]),
        ("engine.threads.0.x=1", ["engine.threads", "expected int", "got {'0': {'x': 1}}"]),
        ("noequals", ["expected key.path=value"]),
        ("=5", ["expected key.path=value"]),
        ("..=5", ["expected key.path=value"]),
        ("seed.=5", ["expected key.path=value"]),
        (".seed=5", ["expected key.path=value"]),
        (" seed =5", ["expected key.path=value"]),
        ("sed=5", ["run.yaml: sed: unknown key; did you mean 'seed'"]),
        ("stages.0.x=5", ["stages.pretrain.x: unknown key"]),
        ("stages.-1.name=x", ["no item '-1'"]),
        ("stages.²={}", ["no item '²'"]),
        ("stages.99999999999999999999={}", ["no item"]),
        ("stages.0=5", ["stages[0]: expected a mapping of StageConfig keys, got 5"]),
        ("stages.pretrain.optim.betas.0=1", ["optim.betas"]),
        ("stages.pretrain.optim.betas.2=1", ["no item '2'"]),
        (
            "stages.finetune.optim.betas.2=1",
            ["stages.finetune.optim.betas: expected tuple[float, float], got {"],
        ),
        ("stages.pretrain.data.records=", ["stages.pretrain.data.records: expected str, got null"]),
        ("stages.pretrain.data.image_folder=", ["stages.pretrain.data.image_folder: expected str, got null"]),
        ("output_dir=runs: x", ["output_dir: expected str, got {'runs': 'x'}"]),
        ("output_dir=a: b: c", ["not valid YAML", "needs quotes", "output_dir='"]),
        ("output_dir=12:30", ["12:30 is the number 750 to YAML; write 750, or put it in quotes"]),
        ("output_dir=yes", ["output_dir: expected str, got true; put it in quotes"]),
        ("model.llm.config={a: &x {b: *x}}", ["override", "does an alias stand inside"]),
        ("stages=[{name: a, data: {}}, {name: A, data: {}}]", ["'A' is used twice", "'a' for the same"]),
        ("output_dir={}", ["output_dir: expected str"]),
        ("stages.finetune.recipe.llm=frozen", ["run.yaml: stages[1].recipe.llm: ", "frozen: no such config file"]),
        ("model.vision.config={1: 2}", ["line 1: the key 1 is not text to YAML; put it in quotes"]),
        ("stages=[{name: x, data: {}}, x.yaml]", ["run.yaml: stages[1]: ", "x.yaml: no such config file"]),
        ("base=absent.yaml", ["absent.yaml: no such config file"]),
        ("engine=engine.yml", ["engine.yml: no such config file"]),
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", "dot"), ("..", "dot"), (".lock", "dot"), ("a.", "dot"), (" a", "space"), ("a ", "space"),
        ("a/b", "slash"), ("a\\b", "slash"), ("/", "slash"), ("a\nb", "control"), ("a\x7f", "control"),
        ("a\u202eb", "control"), ("x" * 201, "201 bytes"), ("ä" * 101, "202 bytes"), ("final", "the run folder holds"),
        ("Final", "the run folder holds"), ("checkpoints", "holds"), ("tensorboard", "holds"), ("config.yaml", "holds"),
        ("metrics.jsonl", "holds"), ("summary.json", "holds"), ("Best", "holds"), ("index.html", "holds"),
        ("", "not empty"), ("  ", "not empty"), ("a\0b", "NUL"),
    ],
)  # fmt: skip
def test_stage_names_that_are_no_folders(config: Path, name: str, said: str) -> None:
    run = yaml.safe_load(MINIMAL)
    run["stages"][1]["name"] = name
    config.write_text(yaml.safe_dump(run))
    with pytest.raises(UserError) as error:
        load_run(config)
    assert "run.yaml: stages[1].name: " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("name", ["a", "1", "stage 2", "näher", "日本", "a.b", "x" * 200, "final2", "pre-train_1"])
def test_stage_names_that_are(config: Path, name: str) -> None:
    run = yaml.safe_load(MINIMAL)
    run["stages"][1]["name"] = name
    config.write_text(yaml.safe_dump(run, allow_unicode=True))
    assert load_run(config).stages[1].name == name


def test_output_dir_is_no_file(config: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir: .*run\.yaml is a file; name a folder"):
        load_run(config, [f"output_dir={config}"])


def test_the_last_override_of_a_key_holds(config: Path) -> None:
    assert load_run(config, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    "override",
    [
        "model.llm.path=x",
        "model.vision.type=clip",
        "model.vision.image_mean=[0, 0, 0]",
        "model.connector={type: linear}",
    ],
)
def test_components_beside_a_model_folder(config: Path, override: str) -> None:
    """In any order on the command line; those of the file give way to a path on the command line, and it is said."""
    for overrides in (["model.path=runs/x/final", override], [override, "model.path=runs/x/final"]):
        with pytest.raises(UserError, match=r"model\.[a-z]+\.[a-z_]+: set, but model\.path \(runs/x/final\) already"):
            load_run(config, overrides)
    config.write_text(MINIMAL + "model: {path: runs/x/final, llm: {type: auto}}")
    assert load_run(config).model.path == "runs/x/final", "what a dump writes of defaults is no contradiction"
    with pytest.raises(UserError, match="already holds"):
        load_run(config, [override])


def test_a_path_on_the_command_line_replaces_the_components_of_the_file(config: Path) -> None:
    config.write_text(MINIMAL + "model: {llm: {path: x}, vision: {type: clip}}")
    model = load_run(config, ["model.path=runs/x/final"]).model
    assert model == ModelConfig(path="runs/x/final")
    assert load_run(config, ["model.path=null"]).model.llm.path == "x"


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

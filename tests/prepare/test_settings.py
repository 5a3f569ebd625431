from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.prepare.settings import MOST_TOKENS, filled, geometry, prepare, template_text

ROOT = Path(__file__).parents[2]


def test_the_file_is_the_one_in_configs_with_values_of_the_data(own: Path) -> None:
    made = prepare(own / "records.json", own / "images", own / "my.yaml", vocabulary=300)
    run, twin = load_run(made.config), load_run(ROOT / "configs" / "mine.yaml")
    (stage,), (other,) = run.stages, twin.stages
    assert run.output_dir == "runs/my" and run.model.llm.tokenizer == str(own / "my-tokenizer")
    assert stage.data.records == str(own / "records.json") and stage.data.image_folder == str(own / "images")
    assert run.model.vision.config["image_size"] == 32 and run.model.vision.config["patch_size"] == 4
    assert run.model.vision.image_mean == (0.471, 0.157, 0.471)
    assert stage.data.augment == other.data.augment and stage.data.augment.hflip == 0
    assert (stage.recipe, stage.optim, run.model.connector) == (other.recipe, other.optim, twin.model.connector)
    assert stage.batch.max_images == stage.batch.max_segments == 32 and stage.epochs == 60
    assert made.config.read_text().startswith("# Written by tlf-data init: 8 records, 8 images, 20 pixels wide; the")


def test_it_trains(own: Path) -> None:
    from tinyllava_fast.train.cli import main

    made = prepare(own / "records.json", own / "images", own / "my.yaml", vocabulary=300)
    overrides = [f"output_dir={own / 'run'}", "stages.train.max_steps=2", "engine.workers=0", "engine.threads=1"]
    assert main([str(made.config), *overrides]) == 0
    assert (own / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("side", "expected"),
    [(1, (32, 4)), (16, (32, 4)), (28, (32, 4)), (32, (32, 4)), (33, (64, 8)), (64, (64, 8)), (65, (128, 16)),
     (150, (160, 16)), (224, (224, 16)), (4000, (224, 16))],
)  # fmt: skip
def test_geometry_is_whole_blocks_of_patches(side: int, expected: tuple[int, int]) -> None:
    size, patch = geometry(side)
    assert (size, patch) == expected and size % (2 * patch) == 0


def test_a_long_record_fits_the_budget_and_the_context(own: Path) -> None:
    words = " ".join(str(n) for n in range(6000))
    turns = [{"from": "human", "value": "Count."}, {"from": "gpt", "value": words}]
    (own / "long.jsonl").write_text(json.dumps({"conversations": turns}))
    run = load_run(prepare(own / "long.jsonl", own, own / "long.yaml", vocabulary=300).config)
    assert run.stages[0].batch.tokens > MOST_TOKENS
    assert run.model.llm.config["max_position_embeddings"] >= run.stages[0].batch.tokens
    assert run.stages[0].batch.max_segments == 1


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("my.txt", {}, "with the end .yaml"),
        ("old.yaml", {}, "old.yaml: exists; choose another name"),
        ("new.yaml", {"vocabulary": 100}, "a vocabulary of 100 is too small; give 260"),
        ("new.yaml", {"llm": "package:no-such-thing"}, "package 'no-such-thing' is not installed"),
    ],
)
def test_mistakes(own: Path, out: str, options: dict[str, object], message: str) -> None:
    (own / "old.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=message):
        prepare(own / "records.json", own / "images", own / out, **options)  # type: ignore[arg-type]
    assert not (own / "new.yaml").exists() and not (own / "new-tokenizer").exists()


def test_a_pretrained_language_model_brings_its_template(own: Path) -> None:
    from tests.tiny import make_tokenizer

    make_tokenizer().save_pretrained(own / "llm")
    (own / "llm" / "config.json").write_text('{"model_type": "llama"}')
    made = prepare(own / "records.json", own / "images", own / "my.yaml", llm=str(own / "llm"))
    run = load_run(made.config)
    assert made.tokenizer is None and run.model.llm.path == str(own / "llm") and run.model.llm.config == {}
    assert run.stages[0].data.template == "llama" and run.stages[0].recipe.llm.lr == 1e-4


def test_paths_that_yaml_would_read_as_something_else_are_quoted(own: Path) -> None:
    import yaml

    for path in ("a b/c: d.json", "7", "#x", "{a}", "null", "ö/x.json", "yes", "1e5"):
        text = filled(template_text(), {"records": path})
        assert yaml.safe_load(text)["stages"][0]["data"]["records"] == path

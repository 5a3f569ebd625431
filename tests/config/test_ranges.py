"""Every key of the schema, and of every component's options, with values no one means: read, or refused by name."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from tinyllava_fast.config.compose import section_of
from tinyllava_fast.config.load import describe, parse_into
from tinyllava_fast.config.ranges import Filled, Range
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.recipes.base import RECIPES
from tinyllava_fast.train.optimizers.base import OPTIMIZERS

NAN, INF = float("nan"), float("inf")
VALUES: dict[str, Any] = {
    "-1": -1, "0": 0, "1": 1, "0.5": 0.5, "-0.5": -0.5, "huge": 10**30, "-huge": -(10**30), "vast": 10**400,
    "nan": NAN, "inf": INF, "-inf": -INF, "'nan'": "nan", "'inf'": "inf", "'1e999'": "1e999", "null": None, "text": "x",
    "empty": "", "blank": " ",
    "NUL": "a\0b", "half a surrogate": "\ud800", "list": [], "list of 1": [1], "list of null": [None],
    "list of nan": [NAN, NAN, NAN], "list of a list": [[1, 2, 3]], "mapping": {}, "mapping of null": {"a": None},
    "mapping of nan": {"a": {"b": [NAN]}}, "key 1": {1: 1}, "true": True, "false": False,
}  # fmt: skip
STAGE = {"name": "s", "data": {}}
LISTS = {"sources": {"name": "s", "path": "x"}, "benchmarks": {"name": "s", "data": "x"}}
"""What an item of a list in a stage needs at least."""


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value below a dataclass; stages.s is the stage, s an item of another list."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        key = f"{prefix}.{name}" if prefix else name
        section = section_of(hint)
        if section is None:
            yield key, hint
        else:
            yield from leaves(section, key if section is hint else f"{key}.s")


def with_value(key: str, value: Any) -> dict[str, Any]:
    """A mapping of RunConfig in which nothing stands but a stage, what the value lies in, and the value."""
    tree: dict[str, Any] = {"stages": [{"name": "s", "data": {}}]}
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[0] if part == "s" else node.setdefault(part, [dict(LISTS[part])] if part in LISTS else {})
    node[last] = value
    return tree


def allowed(hint: Any, value: Any, marks: tuple[Any, ...] = ()) -> bool:
    """True if the type and its marks allow the value: written once more, in another way than the reader of values."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return allowed(inner[0], value, inner[1:])
    if origin in (Union, types.UnionType):
        return any(allowed(part, value, marks) for part in inner)
    if hint is types.NoneType:
        return value is None
    if origin is Literal:
        return any(value is choice or (type(value), value) == (type(choice), choice) for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(allowed(inner[0], item, marks) for item in value)
    if origin is tuple:
        fits = isinstance(value, list) and len(value) == len(inner)
        return fits and all(allowed(part, item, marks) for part, item in zip(inner, value, strict=True))
    if origin is dict:
        texts = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        return texts and all(allowed(inner[1], item, marks) for item in value.values())
    if hint is Any:
        if isinstance(value, dict):
            return allowed(dict[str, Any], value, marks)
        if isinstance(value, list):
            return allowed(list[Any], value, marks)
        return value is None or not isinstance(value, (float, str)) or allowed(type(value), value, marks)
    if hint is str:
        clean = isinstance(value, str) and "\0" not in value and "\ud800" not in value
        return clean and not (any(isinstance(m, Filled) for m in marks) and not value.strip())
    if hint is bool:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > 1e300:
        return False
    if hint is int and value != int(value):
        return False
    ranges = [m for m in marks if isinstance(m, Range)]
    largest = 2**31 - 1 if hint is int else 3.5e38
    named_most = any(r.most is not None for r in ranges)
    return all(r.holds(value) for r in ranges) and (named_most or value <= largest) and value >= -largest


def check(make: Any, hint: Any, key: str) -> list[str]:
    """Return what is wrong with the treatment of each value; make: builds the configuration with a value in it."""
    wrong = []
    for label, value in VALUES.items():
        try:
            make(value)
        except UserError as error:
            if allowed(hint, value) and "is not a multiple of" not in str(error):  # that is of two fields together
                wrong.append(f"{key}={label}: refused, but its type allows it: {error}")
            elif key not in str(error) or not re.search("expected|is not a multiple", str(error)):
                wrong.append(f"{key}={label}: the message does not say what is expected: {error}")
        except Exception as error:
            wrong.append(f"{key}={label}: {type(error).__name__}: {error}")
        else:
            if not allowed(hint, value):
                wrong.append(f"{key}={label}: accepted")
    return wrong


RUN_LEAVES = dict(leaves(RunConfig))


@pytest.mark.parametrize("key", RUN_LEAVES)
def test_every_key_of_a_run(key: str) -> None:
    hint = RUN_LEAVES[key]
    named = re.sub(r"\.s\.name$", "[0].name", key)  # what has a wrong name has an index only
    assert not check(
        lambda value: parse_into(RunConfig, with_value(key, value), "run.yaml"), hint, f"run.yaml: {named}"
    )


def options() -> dict[str, type]:
    """Every registered component's options, by kind and name."""
    registries: dict[str, Any] = {
        "llm": LLMS, "vision": VISION, "connector": CONNECTORS, "recipe": RECIPES, "optimizer": OPTIMIZERS,
        "benchmark": BENCHMARKS,
    }  # fmt: skip
    return {f"{kind}.{name}": registry.get(name).Options for kind, registry in registries.items() for name in registry}


OPTIONS = [(owner, key, hint) for owner, cls in options().items() for key, hint in leaves(cls)]


@pytest.mark.parametrize(("owner", "key", "hint"), OPTIONS, ids=[f"{owner}.{key}" for owner, key, _ in OPTIONS])
def test_every_option_of_every_component(owner: str, key: str, hint: Any) -> None:
    cls = options()[owner]

    def make(value: Any) -> Any:
        *parents, last = key.split(".")
        tree: Any = {last: value}
        for part in reversed(parents):
            tree = {part: tree}
        return parse_into(cls, tree, "", key="o")

    assert not check(make, hint, f"o.{key}")


def test_there_are_many() -> None:
    assert len(RUN_LEAVES) > 100 and len(OPTIONS) > 25


def test_every_number_has_a_range_or_a_reason() -> None:
    """A number of the schema that may be anything finite is listed here, so that a new key is thought about."""
    free = {key for key, hint in RUN_LEAVES.items() if hint in (int, float)}
    assert free == {"model.vision.feature_layer"}


# Key: values that are right, values that are not; by hand, so that a range that is wrong in the schema is found.
VERDICTS: dict[str, tuple[list[Any], list[Any]]] = {
    "seed": ([0, 1, "1e3", 2**32 - 1], [-1, 2**32, 0.5]),
    "log_every": ([1, 10], [0, -1]),
    "checkpoint.every_steps": ([0, 1], [-1]),
    "checkpoint.keep": ([1], [0, -1]),
    "engine.workers": ([0, 1, 64], [-1, 2000]),
    "engine.prefetch": ([1, 4], [0, -1]),
    "engine.threads": ([0, 1, 192], [-1, 10**6]),
    "engine.zero_stage": ([0, 3], [4, -1, "2", True]),
    "engine.compile": ([True, False, "auto", "regional"], ["Auto", 1, 0, "true"]),
    "model.vision.feature_layer": ([-2, 0, 12], [1.5, "x"]),
    "model.vision.image_mean": ([[0, 0.5, 1], None], [[0.5, 0.5], [NAN, 0, 0], [0, 0, 123.7], [0.5, True, 0.5], 0.5]),
    "model.vision.image_std": ([[0.2, 1, 1e-3]], [[0, 0, 0], [0.5, 0.5, -0.5], [0.5, 0.5, None], "abc"]),
    "model.llm.path": (["x", None], ["", " ", 3]),
    "model.llm.config": ([{"a": None, "b": [1, {"c": "x"}]}], [{"a": NAN}, {"a": [INF]}, {"a": {"b": -INF}}, [], "x"]),
    "stages.s.max_steps": ([1, None, 3.0], [0, -1, 0.5]),
    "stages.s.epochs": ([1, 0.01, "1e-2", 300], [0, -0.5, NAN, INF, 1e9]),
    "stages.s.optim.lr": ([1e-12, 1, "1e-4"], [0, -0.01, NAN, "fast"]),
    "stages.s.optim.betas": ([[0, 0.999]], [[0.9, 1], [0.9], [0.9, 0.95, 0.99], [-0.1, 0.9], 0.9]),
    "stages.s.optim.eps": ([1e-8, 1], [0, -1e-8, 2]),
    "stages.s.optim.weight_decay": ([0, 0.1], [-1]),
    "stages.s.optim.clip_norm": ([0, 1], [-1, NAN]),
    "stages.s.optim.warmup_ratio": ([0, 0.03, 1], [2, -1]),
    "stages.s.optim.min_lr_ratio": ([0, 1], [5, -1]),
    "stages.s.optim.label_smoothing": ([0, 1], [2, -0.1]),
    "stages.s.optim.z_loss": ([0, 1e-4], [-1]),
    "stages.s.batch.tokens": ([1, 2048], [0, -1]),
    "stages.s.batch.max_segments": ([1, 65536], [0, 65537]),
    "stages.s.batch.max_images": ([0, 8], [-1]),
    "stages.s.batch.image_multiple": ([1, 14], [0, -2]),
    "stages.s.batch.packs_per_step": ([1, 16], [0, -1]),
    "stages.s.batch.lookahead": ([1, 512], [0, -1]),
    "stages.s.data.max_tokens": ([1, None], [0, -1]),
    "stages.s.data.turns_per_sample": ([0, 5], [-1]),
    "stages.s.data.feature_cache": ([0, 0.5], [-1, NAN]),
    "stages.s.data.image_grid": ([[], [[32, 64]]], [[[0, 64]], [[32]], [32, 64], [[32, -1]], [[1.5, 2]]]),
    "stages.s.data.records": (["", "a.json"], [3, ["a.json"]]),
    "stages.s.data.augment.hflip": ([0, 0.5, 1], [2, -1]),
    "stages.s.data.augment.vflip": ([0, 1], [1.01]),
    "stages.s.data.augment.shift": ([0, 1], [5, -0.1]),
    "stages.s.data.augment.scale": ([0, 0.99], [1, 3, -0.1]),
    "stages.s.data.augment.rotate": ([0, 180], [-1, 181]),
    "stages.s.recipe.llm.lr": ([1e-5, None], [0, -1]),
    "stages.s.recipe.llm.from_layer": ([0, 3], [-1]),
    "stages.s.recipe.llm.lora.r": ([1], [0, -1]),
    "stages.s.recipe.llm.lora.alpha": ([0.5, 256], [0, -1, NAN]),
    "stages.s.recipe.llm.lora.dropout": ([0, 0.99], [1, -0.1]),
    "stages.s.recipe.llm.lora.rank_pattern": ([{"q_proj": 4}], [{"q_proj": 0}, {"q_proj": None}, {"q": 1.5}, [4]]),
    "stages.s.recipe.llm.lora.alpha_pattern": ([{"q_proj": 4}], [{"q_proj": 0}, {"q_proj": NAN}]),
    "stages.s.recipe.llm.lora.target_modules": ([["q_proj"], None], [[""], [None], "q_proj", [3]]),
    "plugins": ([["a.py"], []], [[""], "a.py", [None]]),
    "output_dir": (["runs/x"], ["", None, 7]),
}  # fmt: skip


@pytest.mark.parametrize("key", VERDICTS)
def test_verdicts(key: str) -> None:
    right, wrong = VERDICTS[key]
    for value in right:
        parse_into(RunConfig, with_value(key, value), "run.yaml")
    for value in wrong:
        with pytest.raises(UserError, match="expected"):
            parse_into(RunConfig, with_value(key, value), "run.yaml")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("log_every", -1, "run.yaml: log_every: expected a whole number of at least 1, got -1"),
        ("output_dir", None, "run.yaml: output_dir: expected str, got null"),
        ("output_dir", "", "run.yaml: output_dir: expected text that is not empty, got ''"),
        ("seed", None, "run.yaml: seed: expected int, got null"),
        ("seed", 10**30, f"run.yaml: seed: expected a whole number from 0 to 4294967295, got {10**30}"),
        ("model.llm.path", 3, "run.yaml: model.llm.path: expected str or null, got 3; put it in quotes"),
        ("model.llm.type", True, "run.yaml: model.llm.type: expected str, got true; put it in quotes"),
        ("stages.s.max_steps", -1, "got -1; leave it out, or give null, to train for `epochs`"),
        ("stages.s.optim.betas", [0.9, 1], "optim.betas[1]: expected a number of at least 0 and below 1, got 1"),
        ("stages.s.optim.lr", NAN, "stages.s.optim.lr: expected a number above 0, got nan"),
        ("stages.s.optim", None, "stages.s.optim: expected a mapping of OptimConfig keys, got null"),
        ("model.vision.image_std", [1, 0, 1], "model.vision.image_std[1]: expected a number above 0, got 0"),
        ("stages.s.recipe.llm.lora.rank_pattern", {"q": 0}, "rank_pattern.q: expected a whole number from 1 to 65536"),
        ("model.llm.config", {"a": {"b": NAN}}, "model.llm.config.a.b: expected a number that is finite, got nan"),
        ("batch", 1, "run.yaml: batch: unknown key"),
    ],
)  # fmt: skip
def test_messages(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_into(RunConfig, with_value(key, value), "run.yaml")
    assert said in str(error.value)


def test_help_shows_ranges_and_the_defaults_that_hold() -> None:
    text = describe()
    for line in (
        "seed: int = 0  (from 0 to 4294967295)",
        "stages.<name>.optim.lr: float = 0.001  (above 0)",
        "stages.<name>.max_steps: int or null = null  (of at least 1)",
        "stages.<name>.optim.betas: tuple[float, float] = (0.9, 0.999)  (each of at least 0 and below 1)",
        "stages.<name>.recipe.vision.tune: one of 'frozen', 'full', 'partial', 'lora', 'qlora' = 'frozen'",
        "stages.<name>.recipe.llm.tune: one of 'frozen', 'full', 'partial', 'lora', 'qlora' = 'full'",
    ):
        assert line in text
    lines = text.splitlines()
    pairs = zip(lines, [*lines[1:], ""], strict=True)
    bare = [line for line, below in pairs if not line.startswith("   ") and not below.startswith("      ")]
    assert [line.split(":")[0].split(".")[-1] for line in bare] == [], "a key without a help line"


def test_defaults_are_allowed() -> None:
    """The defaults of the schema pass its own check."""
    parsed = parse_into(RunConfig, {"stages": [STAGE]}, "run.yaml")
    again = parse_into(RunConfig, dataclasses.asdict(parsed), "run.yaml")
    assert again == parsed
    for owner, cls in options().items():
        assert parse_into(cls, dataclasses.asdict(cls()), owner) == cls()

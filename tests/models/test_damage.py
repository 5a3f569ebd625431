"""Every field of every JSON file of a model folder, dropped, made null and made something else: a sentence or a model.

Whatever is wrong with a folder is a UserError that names the file, and nothing is built that fills the memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.damage import DROP, changed
from tests.models.checkpoints.golden import folder as golden_folder
from tests.models.checkpoints.golden import sources
from tests.tiny import make_model, make_tokenizer, tiny_config
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.checkpoints._load import open_checkpoint

CHANGES = [DROP, None, 7, -1, 0, "text", "", [], {}, True, float("nan"), 1e30, 10**9]
FOREIGN = [
    "tinyllama-clip-mlp2x_gelu-mono",
    "legacy-tinyllama-siglip",
    "llava15-tinyllama-clip",
    "phi-mof-mof_mlp-split",
]
At = tuple[str | int, ...]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ours") / "model"
    return io.save_model(make_model(), make_tokenizer(), build_image_processor(tiny_config()), target)


def places(value: object, at: At = ()) -> Iterator[At]:
    """Every field, and the first two items of every list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*at, key)
        yield from places(item, (*at, key))


def cases(file: Path, *, every: int) -> list[str]:
    """The texts that a file is replaced with: all damaged ones, or one of ``every``, spread evenly."""
    values = json.loads(file.read_text(encoding="utf-8"))
    at = [place for place in places(values) if place[:2] != ("model", "vocab")]
    wanted = [(place, new) for place in at for new in CHANGES]
    whole = ["", "{", "[]", "7", "null", '"text"', "[" * 100_000, '{"model_type": "tinyllava_fast", "a": ' + "[" * 9**5]
    return [*whole, *(json.dumps(changed(values, place, new)) for place, new in wanted[::every])]


def try_all(folder: Path, name: str, *, every: int, load: Callable[[Path], object]) -> None:
    file = folder / name
    before = file.read_bytes()
    for text in cases(file, every=every):
        file.write_text(text, encoding="utf-8")
        try:
            load(folder)
        except UserError as error:
            assert str(folder) in str(error), f"{error} names no file, for {text[:300]}"
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}, for {name}: {text[:3000]}") from error
    file.write_bytes(before)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("every", [37, pytest.param(5, marks=[pytest.mark.slow, pytest.mark.no_cover])])
def test_a_damaged_file_of_ours(name: str, every: int, ours: Path, tmp_path: Path) -> None:
    shutil.copytree(ours, tmp_path / "model")
    try_all(tmp_path / "model", name, every=every, load=io.load_model)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("every", [61, pytest.param(5, marks=[pytest.mark.slow, pytest.mark.no_cover])])
def test_a_damaged_config_of_other_projects(name: str, every: int, tmp_path: Path) -> None:
    shutil.copytree(golden_folder(name), tmp_path / "model")
    given = sources(name)
    try_all(tmp_path / "model", "config.json", every=every, load=lambda folder: open_checkpoint(folder, sources=given))


@pytest.mark.parametrize(
    ("file", "at", "new", "message"),
    [
        ("config.json", ("vision",), DROP, r"config\.json: no field 'vision'"),
        ("config.json", ("llm", "config"), DROP, r"config\.json: llm: no field 'config'"),
        ("config.json", ("vision", "type"), DROP, r"config\.json: vision: no field 'type'"),
        ("config.json", ("vision", "type"), 7, r"config\.json: vision: type: expected text"),
        ("config.json", ("llm", "kind"), 7, r"config\.json: llm: kind: unknown key; .*Known: config, options, type"),
        ("config.json", ("llm", "config", "num_attention_heads"), 0, r"llm\.config\.num_attention_heads: .* got 0"),
        ("config.json", ("vision", "config", "patch_size"), 0, r"vision\.config\.patch_size: .* got 0"),
        ("config.json", ("llm", "config", "num_hidden_layers"), 10**9, r"num_hidden_layers: .* to 4096, got 10+"),
        ("config.json", ("vision", "config", "image_size"), 10**6, r"image_size: .* to 16384, got 10+"),
        ("config.json", ("connector", "options", "depth"), 10**9, r"connector\.options\.depth: .* to 4096"),
        ("config.json", ("llm", "config", "rms_norm_eps"), float("nan"), r"rms_norm_eps: expected .* finite"),
        ("config.json", ("llm", "config", "rope_parameters"), {"rope_type": "nosuch"}, r"config\.json: .*nosuch"),
        ("preprocessor_config.json", ("image_mean",), [0.5, 0.5], r"config\.json: image_mean: expected three finite"),
        (
            "preprocessor_config.json",
            ("image_std",),
            [0.5, 0, 0.5],
            r"image_std: expected three finite numbers above 0",
        ),
        ("preprocessor_config.json", ("image_std", 0), float("nan"), r"image_std: expected three finite numbers"),
        ("preprocessor_config.json", ("crop_size",), "text", r"crop_size: expected a whole number from 1"),
        ("preprocessor_config.json", ("size",), {}, r"size: expected height and width, or shortest_edge"),
        ("preprocessor_config.json", ("resample",), 99, r"resample: expected a whole number from 0 to 5, got 99"),
        ("preprocessor_config.json", ("do_resize",), "text", r"do_resize: expected true or false"),
    ],
)
def test_the_field_is_named(file: str, at: At, new: object, message: str, ours: Path, tmp_path: Path) -> None:
    shutil.copytree(ours, tmp_path / "model")
    path = tmp_path / "model" / file
    values = changed(json.loads(path.read_text(encoding="utf-8")), at, new)
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        io.load_model(tmp_path / "model")


def test_a_path_beside_the_folder_is_explained(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it is a file; give the folder that it is in: .*model$"):
        io.load_model(ours / "model.safetensors")
    shutil.copytree(ours, tmp_path / "run" / "pretrain")
    with pytest.raises(CheckpointError, match=r"one lies in it: give .*run/pretrain$"):
        io.load_model(tmp_path / "run")
    shutil.copytree(ours, tmp_path / "run" / "final")
    with pytest.raises(CheckpointError, match=r"one lies in it: give .*run/final$"):
        io.load_model(tmp_path / "run")


def test_files_are_as_readable_as_the_umask_has_them(ours: Path) -> None:
    modes = {oct(file.stat().st_mode & 0o777) for file in ours.iterdir()}
    assert modes == {oct(ours.stat().st_mode & 0o666)}

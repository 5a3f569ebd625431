"""Model folders: round trip, errors that say what is wrong, and saves that never harm what was there."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tinyllava_fast.config.schema import ModelConfig
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VISION


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "red", "blue"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


Saved = tuple[LMM, Path]


@pytest.fixture
def saved(tiny: Callable, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Saved:
    lmm = build_model(tiny(), seed=1)
    lmm.config = replace(lmm.config, template="phi", image_mode="pad", turns="independent")
    folder = io.save_model(lmm, tokenizer, VISION.get("siglip").image_processor(16), tmp_path / "model")
    return lmm, folder


@pytest.mark.parametrize(
    ("llm", "tower", "select"),
    [
        ({}, "siglip", "cls_patch"),
        ({"tie_word_embeddings": False, "rope_theta": 5e5}, "clip", "patch"),
        ({"model_type": "phi", "partial_rotary_factor": 0.5, "tie_word_embeddings": False}, "siglip", "patch"),
        ({"model_type": "gemma", "head_dim": 8}, "clip", "cls_patch"),
    ],
)
def test_round_trip(
    llm: dict,
    tower: str,
    select: str,
    tiny: Callable,
    ragged: Callable,
    pack: Callable,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    lmm = build_model(tiny(llm=llm, tower=tower, feature_select=select), seed=1).eval()
    batch = pack(ragged(5), lmm.tokens_per_image).tensors()
    processor = VISION.get(tower).image_processor(16)
    io.save_model(lmm, tokenizer, processor, tmp_path / "model")
    again, words, pixels = io.load_model(tmp_path / "model")
    assert not again.training and again.tokens_per_image == lmm.tokens_per_image
    assert torch.equal(again(**batch), lmm(**batch))
    weights = again.state_dict()
    assert all(torch.equal(weights.pop(k), v) for k, v in lmm.state_dict().items()) and not weights
    assert words("red blue")["input_ids"] == tokenizer("red blue")["input_ids"]
    assert type(pixels) is type(processor) and pixels.to_dict() == processor.to_dict()
    assert again.config == lmm.config


def test_what_is_in_the_folder(saved: Saved) -> None:
    _, folder = saved
    names = set(load_file(folder / "model.safetensors"))
    assert "llm.lm_head.weight" not in names, "tied: stored once"
    assert {
        "llm.model.embed_tokens.weight",
        "vision.encoder.layers.0.mlp.fc1.weight",
        "connector.layers.0.bias",
    } < names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "tinyllava_fast" and config["dtype"] == "float32"
    assert (config["template"], config["image_mode"], config["turns"]) == ("phi", "pad", "independent")
    assert set(config["versions"]) == {"tinyllava_fast", "torch", "transformers"}
    assert {"tokenizer.json", "preprocessor_config.json"} < {p.name for p in folder.iterdir()}
    assert [p.name for p in folder.parent.iterdir()] == ["model"], "nothing temporary stays"


def test_dtype(saved: Saved, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    _, folder = saved
    half = io.load_model(folder, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    io.save_model(half, tokenizer, VISION.get("siglip").image_processor(16), tmp_path / "half")
    assert io.load_model(tmp_path / "half")[0].dtype == torch.bfloat16


def test_a_folder_is_a_model_config(saved: Saved) -> None:
    lmm, folder = saved
    config = ModelConfig(path=str(folder))
    again = build_model(config, dtype=torch.float32)
    assert again.training and torch.equal(again.llm.lm_head.weight, lmm.llm.lm_head.weight)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    assert len(build_tokenizer(config)) == 5 and build_image_processor(config).size["height"] == 16


def test_weights_gathered_elsewhere(saved: Saved, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lmm, _ = saved
    gathered = {k: torch.full_like(v, 2.0) for k, v in lmm.state_dict().items()}
    io.save_model(lmm, tokenizer, VISION.get("siglip").image_processor(16), tmp_path / "m", state_dict=gathered)
    assert all((p == 2).all() for p in io.load_model(tmp_path / "m")[0].parameters())


def test_a_folder_that_is_none_hints_at_the_one_meant(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved
    run = tmp_path / "runs" / "digits"
    shutil.copytree(folder, run / "final")
    shutil.copytree(folder, tmp_path / "runs" / "pre" / "pretrain")
    for given, said in (
        (run, f"one lies in it: give {run / 'final'}"),
        (tmp_path / "runs" / "pre", f"one lies in it: give {tmp_path / 'runs' / 'pre' / 'pretrain'}"),
        (tmp_path / "runs" / "digit", f"it does not exist; did you mean {run}?"),
        (run / "final" / "model.safetensors", "it is a file; give the folder that it is in"),
        (run / "final" / "nope" / "deep", "it does not exist; give a folder that tlf-train wrote"),
        (tmp_path / "runs", "it has no config.json"),
        ("a\0b", "it does not exist"),
    ):
        for build in (build_model, build_tokenizer, build_image_processor):
            with pytest.raises(CheckpointError) as error:
                build(ModelConfig(path=str(given)))
            assert said in str(error.value) and str(error.value).startswith("model.path: ")


def damage(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    match what:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "header":
            weights.write_bytes(weights.read_bytes()[:20])
        case "weights":
            weights.unlink()
        case "config":
            config.unlink()
        case "folder":
            shutil.rmtree(folder)
        case "json":
            config.write_text("{")
        case "list":
            config.write_text("[]")
        case "dtype":
            config.write_text(json.dumps(values | {"dtype": "float31"}))
        case "llava":
            config.write_text(json.dumps(values | {"model_type": "llava"}))
        case "key":
            config.write_text(json.dumps(values | {"templat": "phi"}))
        case "processor":
            (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "damaged or truncated safetensors"),
        ("header", "damaged or truncated safetensors"),
        ("weights", "weights file does not exist"),
        ("config", "not a model folder: it has no config.json"),
        ("folder", "not a model folder: it does not exist"),
        ("json", "config.json: not JSON"),
        ("list", "model_type is None"),
        ("dtype", "not a torch dtype"),
        ("llava", "no known model: config.json has model_type 'llava'"),
        ("key", "templat: unknown key; did you mean 'template'"),
        ("processor", "image processor cannot be read"),
    ],
)
def test_damage_is_named(what: str, message: str, saved: Saved) -> None:
    _, folder = saved
    damage(folder, what)
    with pytest.raises(CheckpointError, match=message):
        io.load_model(folder)


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Files of this process may not grow past 8 KiB: the operating system refuses the weights half-way.

    Only around the save itself: the limit holds for pytest's own output too, where that is a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_untouched(saved: Saved) -> None:
    lmm, folder = saved
    assert [p.name for p in folder.parent.iterdir()] == ["model"], "no temporary folder stays"
    assert torch.equal(io.load_model(folder)[0].llm.lm_head.weight, lmm.llm.lm_head.weight)


def test_a_write_error_leaves_the_old_folder(saved: Saved, tiny: Callable, tokenizer: PreTrainedTokenizerBase) -> None:
    other, processor = build_model(tiny(), seed=9), VISION.get("siglip").image_processor(16)
    with no_room(), pytest.raises(CheckpointError, match="what was there before is untouched"):
        io.save_model(other, tokenizer, processor, saved[1])
    assert_untouched(saved)


def test_a_full_disk_leaves_the_old_folder(
    saved: Saved, tiny: Callable, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free some space"):
        io.save_model(build_model(tiny(), seed=9), tokenizer, VISION.get("siglip").image_processor(16), saved[1])
    assert_untouched(saved)


def test_overwriting_replaces_the_whole_folder(
    saved: Saved, tiny: Callable, tokenizer: PreTrainedTokenizerBase
) -> None:
    _, folder = saved
    (folder / "stale.txt").write_text("old")
    other = build_model(tiny(), seed=9)
    io.save_model(other, tokenizer, VISION.get("siglip").image_processor(16), folder)
    assert torch.equal(io.load_model(folder)[0].llm.lm_head.weight, other.llm.lm_head.weight)
    assert not (folder / "stale.txt").exists() and [p.name for p in folder.parent.iterdir()] == ["model"]

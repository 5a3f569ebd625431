"""Adapter folders: what is in them, both ways with peft, merged and live, and damage that is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tinyllava_fast.config.schema import LoRAConfig, ModelConfig, OptimConfig, RecipeConfig, TuneConfig
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models import adapter, io
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.recipes.base import apply_recipe


def lora(**settings: object) -> TuneConfig:
    return TuneConfig(tune="lora", lora=LoRAConfig(**{"r": 4, "alpha": 8, "dropout": 0.0, **settings}))


RECIPES = {
    "llm": RecipeConfig(llm=lora()),
    "all": RecipeConfig(llm=lora(), vision=lora(r=2, target_modules=["fc1"]), connector=lora(alpha=3)),
    "rslora": RecipeConfig(llm=lora(rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})),
    "dora": RecipeConfig(llm=lora(dora=True)),
    "biases": RecipeConfig(llm=lora(bias="all"), vision=lora(bias="lora_only", target_modules=["fc2"])),
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "red", "blue"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def save(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Path]:
    def write(lmm: LMM, name: str = "model", **kwargs: object) -> Path:
        return io.save_model(lmm, tokenizer, VISION.get("siglip").image_processor(16), tmp_path / name, **kwargs)

    return write


@pytest.fixture
def batch(ragged: Callable, pack: Callable) -> dict[str, Tensor]:
    return pack(ragged(5), 4).tensors()


def trained(config: ModelConfig, recipe: RecipeConfig) -> LMM:
    """A model whose trainable weights are no longer what they were."""
    lmm = build_model(config, seed=1)
    apply_recipe(lmm, recipe, OptimConfig())
    rng = torch.Generator().manual_seed(2)
    for parameter in lmm.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    return lmm.eval()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_round_trip(recipe: RecipeConfig, tiny: Callable, save: Callable[..., Path], batch: dict[str, Tensor]) -> None:
    lmm = trained(tiny(llm={"attention_bias": True}), recipe)
    expected, settings = lmm(**batch), adapter.layer_settings(lmm)
    folder = save(lmm)
    live = io.load_model(folder, merge_adapter=False)[0]
    assert live.config.has_lora and adapter.layer_settings(live) == settings
    assert torch.equal(live(**batch), expected)
    merged = io.load_model(folder)[0]
    assert not merged.config.has_lora and not any("lora" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(merged(**batch), expected, rtol=1e-6, atol=1e-6)
    again = save(live, "again")
    for file in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "config.json",
    ):
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_peft_reads_it(
    recipe: RecipeConfig, tiny: Callable, save: Callable[..., Path], batch: dict[str, Tensor]
) -> None:
    lmm = trained(tiny(llm={"attention_bias": True}), recipe)
    folder = save(lmm)
    base = io.load_model(folder, merge_adapter=False)[0]
    assert adapter.take(base) is not None
    model = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    assert torch.equal(model(**batch), lmm(**batch))


def test_an_adapter_that_peft_trained_loads_here(
    tiny: Callable, save: Callable[..., Path], batch: dict[str, Tensor]
) -> None:
    folder = save(build_model(tiny(llm={"attention_bias": True}), seed=1))
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "fc1"], bias="lora_only", init_lora_weights=False
    )
    model = peft.get_peft_model(io.load_model(folder)[0], config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.data += 0.1
    model.save_pretrained(str(folder / "adapter"))
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "adapter": True}))
    expected = model(**batch)
    assert torch.equal(io.load_model(folder, merge_adapter=False)[0](**batch), expected)
    torch.testing.assert_close(io.load_model(folder)[0](**batch), expected, rtol=1e-6, atol=1e-6)


def test_what_is_in_the_folder(tiny: Callable, save: Callable[..., Path]) -> None:
    config = tiny()
    folder = save(trained(config, RECIPES["all"]))
    assert json.loads((folder / "config.json").read_text())["has_lora"] is True
    stock = {k for k in build_model(config).state_dict() if k != "llm.lm_head.weight"}
    assert set(load_file(folder / "model.safetensors")) == stock
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.llm.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.vision.encoder.layers.1.mlp.fc1.lora_B.weight"].shape == (40, 2)
    stored = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA" and stored["inference_mode"] is True
    assert len(stored["target_modules"]) == 14 + 2 + 2 and "connector.layers.2" in stored["target_modules"]
    assert set(stored["rank_pattern"].values()) == {4} and set(stored["alpha_pattern"].values()) == {3}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_dtypes(tiny: Callable, save: Callable[..., Path]) -> None:
    lmm = trained(tiny(), RECIPES["llm"])
    exact = {k: t.clone() for k, t in lmm.state_dict().items()}
    adapted = set(adapter.parameter_names(lmm))
    folder = save(lmm, state_dict={k: t if k in adapted else t.bfloat16() for k, t in exact.items()})
    name = "llm.model.layers.1.mlp.up_proj"
    low = exact[f"{name}.base_layer.weight"].bfloat16().float()
    total = low + 2.0 * (exact[f"{name}.lora_B.default.weight"] @ exact[f"{name}.lora_A.default.weight"])
    half, full = io.load_model(folder)[0], io.load_model(folder, dtype=torch.float32)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and {p.dtype for p in full.parameters()} == {
        torch.float32
    }
    assert torch.equal(half.get_submodule(name).weight, total.bfloat16())
    torch.testing.assert_close(full.get_submodule(name).weight, total, rtol=1e-6, atol=1e-7)
    live = io.load_model(folder, merge_adapter=False)[0]
    assert {p.dtype for p in live.parameters()} == {torch.bfloat16}


def test_a_folder_with_an_adapter_is_a_model_config(tiny: Callable, save: Callable[..., Path], batch: dict) -> None:
    lmm = trained(tiny(), RECIPES["llm"])
    folder = save(lmm)
    again = build_model(ModelConfig(path=str(folder)))
    assert again.config.has_lora
    apply_recipe(again, RecipeConfig(llm=TuneConfig(tune="frozen")), OptimConfig())
    assert not again.config.has_lora
    torch.testing.assert_close(again.eval()(**batch), lmm(**batch), rtol=1e-6, atol=1e-6)


def damage(folder: Path, what: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(weights)
    first = min(tensors)
    match what:
        case "folder":
            shutil.rmtree(folder)
        case "weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-50])
        case "json":
            config.write_text("{")
        case "type":
            config.write_text(json.dumps(values | {"peft_type": "IA3"}))
        case "pissa":
            config.write_text(json.dumps(values | {"init_lora_weights": "pissa"}))
        case "saved":
            config.write_text(json.dumps(values | {"modules_to_save": ["connector"]}))
        case "embedding":
            config.write_text(json.dumps(values | {"target_modules": ["embed_tokens"]}))
        case "head":
            config.write_text(json.dumps(values | {"target_modules": ["lm_head"]}))
        case "targets":
            config.write_text(json.dumps(values | {"target_modules": ["nothing"]}))
        case "missing":
            save_file({k: t for k, t in tensors.items() if k != first}, weights)
        case "unexpected":
            save_file(tensors | {"base_model.model.llm.model.extra.lora_A.weight": torch.zeros(1, 1)}, weights)
        case "shape":
            save_file(tensors | {first: torch.zeros(4, 5)}, weights)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("folder", r"adapter_config\.json: missing; the adapter is incomplete"),
        ("weights", r"adapter_model\.safetensors: missing; the adapter is incomplete"),
        ("truncated", "damaged or truncated safetensors"),
        ("json", r"adapter_config\.json: not JSON"),
        ("type", "peft_type is 'IA3'; only LORA"),
        ("pissa", "init_lora_weights is 'pissa', which changes the base weights"),
        ("saved", "modules_to_save is set; only LoRA of linear layers"),
        ("embedding", r"adapts llm\.model\.embed_tokens, a Embedding whose weight this package reads directly"),
        ("head", r"adapts llm\.lm_head, a Linear whose weight"),
        ("targets", "the adapter does not fit this model"),
        ("missing", r"another architecture:\n  missing: llm\.model\.layers\.0\..*lora_A"),
        ("unexpected", r"another architecture:\n  unexpected: llm\.model\.extra"),
        ("shape", "the adapter does not fit this model"),
    ],
)
def test_damage_is_named(what: str, message: str, tiny: Callable, save: Callable[..., Path]) -> None:
    folder = save(trained(tiny(), RECIPES["llm"]))
    damage(folder / "adapter", what)
    with pytest.raises(CheckpointError, match=message):
        io.load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": None}, r"adapter_config\.json: r: is null"),
        ({"use_rslora": "no"}, r"adapter_config\.json: use_rslora: expected true or false, got 'no'"),
        ({"use_dora": 1}, r"adapter_config\.json: use_dora: expected true or false, got 1"),
        ({"rank_pattern": {"(": 4}}, r"adapter_config\.json: rank_pattern: \(: not a regular expression"),
        ({"r": 0}, r"adapter_config\.json: r: expected a whole number of at least 1, got 0"),
        ({"r": "8"}, r"r: expected a whole number"),
        ({"r": 10**9}, r"r: expected a rank of at most \d+, as large as a stored tensor"),
        ({"lora_alpha": None}, r"lora_alpha: is null"),
        ({"lora_alpha": "x"}, r"lora_alpha: expected a number"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"rank_pattern: q_proj: expected a rank of at most"),
        ({"rank_pattern": []}, r"rank_pattern: expected an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern: q_proj: expected a number"),
        ({"target_modules": 7}, r"model/adapter"),
        ({"target_modules": None}, r"model/adapter"),
        ({"target_modules": "("}, r"model/adapter"),
        ({"lora_dropout": "x"}, r"model/adapter"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(
    change: dict, message: str, tiny: Callable, save: Callable[..., Path]
) -> None:
    folder = save(trained(tiny(), RECIPES["llm"]))
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        io.load_model(folder)

"""LoRA folders: merged or kept apart, and the adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.models.checkpoints.golden import arrays, folder, grad_norms, opened, sources
from tinyllava_fast.config.schema import RecipeConfig
from tinyllava_fast.convert.convert import export_model, import_checkpoint, merge_adapter
from tinyllava_fast.data.types import IMAGE_INDEX, PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.checkpoints._load import open_checkpoint

LORA = "tinyllama-siglip-mlp2x_gelu-lora"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return import_checkpoint(folder(LORA), tmp_path / "kept", keep_adapter=True, sources=sources(LORA))


def test_kept_apart_and_merged_when_loaded(kept: Path) -> None:
    base = load_file(folder(LORA) / "adapter_model.safetensors")
    stored = load_file(kept / "adapter" / "adapter_model.safetensors")
    renamed = {k.replace("language_model.", "llm."): v for k, v in base.items()}
    assert renamed.keys() == stored.keys() and all(torch.equal(renamed[k], v) for k, v in stored.items())
    merged, model = io.load_model(kept)[0].state_dict(), opened(LORA).lmm.state_dict()
    for name, tensor in model.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    live = io.load_model(kept, merge_adapter=False)[0]
    assert live.config.has_lora and any("lora_A" in name for name, _ in live.named_parameters())


def test_the_adapter_alone(kept: Path, tmp_path: Path) -> None:
    import peft

    for number, source in enumerate((kept, folder(LORA))):
        target = export_model(source, tmp_path / str(number), "adapter")
        assert sorted(p.name for p in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = peft.LoraConfig.from_pretrained(str(target))
        assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
        assert "llm.model.layers.1.self_attn.v_proj" in config.target_modules
        mine, wanted = (load_file(p / "adapter_model.safetensors") for p in (target, kept / "adapter"))
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[k], wanted[k]) for k in mine)


def test_nothing_to_keep_or_export(tmp_path: Path) -> None:
    plain = "tinyllama-clip-mlp2x_gelu-mono"
    with pytest.raises(UserError, match="holds no adapter to keep"):
        import_checkpoint(folder(plain), tmp_path / "a", keep_adapter=True)
    with pytest.raises(UserError, match="the model has no adapter"):
        export_model(folder(plain), tmp_path / "b", "adapter")
    assert not list(tmp_path.iterdir())


def test_gradients_of_the_adapter(pack: Callable[..., PackedBatch]) -> None:
    lmm = open_checkpoint(folder(LORA), sources=sources(LORA), merge=False).lmm
    golden = arrays(LORA)
    samples = []
    for row in range(3):
        mask = golden["batch_attention_mask"][row].bool()
        ids = golden["batch_input_ids"][row][mask].tolist()
        pixels = golden["batch_pixel_values"][row] if IMAGE_INDEX in ids else None
        supervised = (golden["batch_labels"][row][mask] != -100).tolist()
        samples.append(SimpleNamespace(ids=[None if i < 0 else i for i in ids], supervised=supervised, pixels=pixels))
    batch = pack(samples, lmm.tokens_per_image)
    for parameter in lmm.parameters():
        parameter.requires_grad_(True)
    (lmm(**batch.tensors()) / batch.num_supervised).backward()
    norms = grad_norms(LORA)
    grads = {name: p.grad for name, p in lmm.named_parameters() if p.grad is not None}
    compared = 0
    for name, norm in norms.items():
        ours = name.removeprefix("base_model.model.").replace("language_model.", "llm.")
        ours = ours.replace("connector._connector.", "connector.layers.")
        assert float(grads[ours].norm()) == pytest.approx(norm, rel=1e-3), name
        compared += 1
    assert compared == 32


def _own(tmp_path: Path, recipe: RecipeConfig, **llm: object) -> tuple[Path, Path]:
    """(folder of a model, folder of the same model with an adapter that was trained on it)."""
    from tests.tiny import make_model, make_tokenizer, tiny_config
    from tinyllava_fast.config.schema import OptimConfig
    from tinyllava_fast.models.build import build_image_processor
    from tinyllava_fast.recipes.base import apply_recipe

    lmm, parts = make_model(**llm), (make_tokenizer(), build_image_processor(tiny_config()))
    base = io.save_model(lmm, *parts, tmp_path / "base")
    apply_recipe(lmm, recipe, OptimConfig())
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lmm.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return base, io.save_model(lmm.eval(), *parts, tmp_path / "lora")


def _recipe(**parts: object) -> RecipeConfig:
    from tinyllava_fast.config.schema import LoRAConfig, RecipeConfig, TuneConfig

    frozen = TuneConfig(tune="frozen")
    tuned = {
        part: TuneConfig(tune="lora", lora=LoRAConfig(**{"r": 4, "alpha": 8, "dropout": 0.0, **settings}))  # type: ignore[dict-item]
        for part, settings in parts.items()
    }
    return RecipeConfig(**{"llm": frozen, "vision": frozen, "connector": frozen, **tuned})


RECIPES = {
    "llm": _recipe(llm={}),
    "all": _recipe(llm={}, vision={"r": 2, "target_modules": ["fc1"]}, connector={"alpha": 3}),
    "rslora": _recipe(llm={"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    "dora": _recipe(llm={"dora": True}),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_an_exported_adapter_is_taken_back(recipe: RecipeConfig, tmp_path: Path) -> None:
    base, lora = _own(tmp_path, recipe)
    alone = export_model(lora, tmp_path / "alone", "adapter")
    kept = import_checkpoint(alone, tmp_path / "kept", base=base, keep_adapter=True)
    merged = import_checkpoint(alone, tmp_path / "merged", base=base)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (kept / file).read_bytes() == (lora / file).read_bytes()
    assert not (merged / "adapter").exists()
    assert (merged / "model.safetensors").read_bytes() == (
        merge_adapter(lora, tmp_path / "two") / "model.safetensors"
    ).read_bytes()
    wanted, found = (io.load_model(path)[0].state_dict() for path in (lora, merged))
    assert all(torch.equal(wanted[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_peft_loads_the_adapter_beside_an_exported_llava(recipe: RecipeConfig, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForImageTextToText

    _, lora = _own(tmp_path, recipe)
    apart = export_model(lora, tmp_path / "apart", "llava", keep_adapter=True)
    whole = export_model(lora, tmp_path / "whole", "llava")
    plain = AutoModelForImageTextToText.from_pretrained(apart).eval()
    ids = torch.tensor([[1, 40, plain.config.image_token_id, 50, 60]])
    ids = torch.cat([ids[:, :2], ids[:, 2:3].expand(-1, 16), ids[:, 3:]], 1)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = AutoModelForImageTextToText.from_pretrained(whole).eval()(input_ids=ids, pixel_values=pixels).logits
        without = plain(input_ids=ids, pixel_values=pixels).logits
        adapted = peft.PeftModel.from_pretrained(plain, str(apart / "adapter")).eval()
        found = adapted(input_ids=ids, pixel_values=pixels).logits
    assert (without - wanted).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_adapters_without_what_they_need(tmp_path: Path) -> None:
    base, lora = _own(tmp_path, RECIPES["llm"])
    alone, new = export_model(lora, tmp_path / "alone", "adapter"), tmp_path / "new"
    with pytest.raises(UserError, match="holds an adapter alone; name the model that it was trained on: --base MODEL"):
        import_checkpoint(alone, new)
    with pytest.raises(UserError, match="has an adapter already; give the model"):
        import_checkpoint(alone, new, base=lora)
    with pytest.raises(UserError, match="--base is for a folder that holds an adapter alone"):
        import_checkpoint(base, new, base=base)
    with pytest.raises(UserError, match="holds no adapter; there is nothing to merge"):
        merge_adapter(base, new)
    with pytest.raises(UserError, match="holds no adapter to keep"):
        export_model(base, new, "llava", keep_adapter=True)
    with pytest.raises(UserError, match="factory has no place for one beside the weights; llava has"):
        export_model(lora, new, "factory", keep_adapter=True)
    other, _ = _own(tmp_path / "other", RECIPES["llm"], num_hidden_layers=2)
    with pytest.raises(UserError, match="the adapter is of another architecture"):
        import_checkpoint(alone, new, base=other)
    assert not new.exists()

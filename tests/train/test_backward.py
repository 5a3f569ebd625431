"""The backward pass ends below the lowest weight that trains, and frozen weights get no gradient buffers."""

import pytest
import torch

from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train.engine.torch_engine import TorchEngine

CASES = {  # recipe -> modules whose output needs no gradient, modules whose output does
    "{llm: {tune: frozen}}": (["vision"], ["connector", "llm.model.layers.0", "llm.model.layers.1"]),
    "{llm: {tune: partial, from_layer: 1}, connector: {tune: frozen}}": (
        ["vision", "connector", "llm.model.layers.0"],
        ["llm.model.layers.1"],
    ),
    "{llm: {tune: frozen}, vision: {tune: partial, from_layer: 0}}": (["vision.embeddings"], ["vision", "connector"]),
    "{llm: {tune: lora}, connector: {tune: frozen}}": (["vision", "connector"], ["llm.model.layers.0"]),
}


@pytest.mark.parametrize("recipe", CASES)
def test_it_stops_there(tiny_run, recipe):
    run = load_run(tiny_run(), [f"stages.finetune.recipe={recipe}"])
    model = build_model(run.model, seed=0)
    stage = run.stages[1]
    groups = apply_recipe(model, stage.recipe, stage.optim)
    data = PackedDataset(
        stage.data,
        stage.batch,
        tokenizer=build_tokenizer(run.model),
        processor=build_image_processor(run.model),
        tokens_per_image=model.tokens_per_image,
        seed=0,
    )
    optim = OptimConfig(betas=(0.9, 0.99), eps=1e-8, clip_norm=0.0)
    engine = TorchEngine(model, [dict(g) for g in groups], optim, device=torch.device("cpu"))
    needs = {}

    def note(name):
        def hook(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            needs[name] = first.requires_grad

        return hook

    without, with_ = CASES[recipe]
    for name in (*without, *with_):
        found = name if name in dict(model.named_modules()) else name.replace("llm.", "llm.base_model.model.", 1)
        model.get_submodule(found).register_forward_hook(note(name))
    batch = data.pack(0, data.plan(0)[0])
    assert len(batch.pixel_values)
    engine.forward_backward(batch, 1.0)
    assert needs == dict.fromkeys(without, False) | dict.fromkeys(with_, True)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name

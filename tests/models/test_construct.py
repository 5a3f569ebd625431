"""One constructor: the same architecture with weights drawn from a seed or left empty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tinyllava_fast.config.schema import ModelConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import ConnectorPart, LLMPart, LMMConfig, VisionPart
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.construct import Weights, build, build_tower

FILE = "m/config.json"


def architecture(model: ModelConfig) -> LMMConfig:
    return LMMConfig(
        llm=LLMPart(type=model.llm.type, config=model.llm.config),
        vision=VisionPart(type=model.vision.type, config=model.vision.config),
        connector=ConnectorPart(type="mlp"),
    )


def test_a_description_rebuilds_the_model(tiny: Callable) -> None:
    """It is complete, so that no default of transformers comes in. The numbers are the seed's, whatever the dtype."""
    lmm = build_model(tiny(feature_select="cls_patch"), seed=3)
    empty = build(lmm.config, dtype=torch.float32, file=FILE)
    assert empty.config == lmm.config and empty.tokens_per_image == lmm.tokens_per_image
    shapes = {name: tensor.shape for name, tensor in lmm.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    drawn = build(lmm.config, Weights(seed=3), dtype=torch.bfloat16, file=FILE)
    for name, parameter in lmm.named_parameters():
        assert torch.equal(drawn.get_parameter(name), parameter.to(torch.bfloat16)), name
    tower = build_tower(lmm.config.vision, Weights(seed=3), file=FILE)
    assert all(torch.equal(tower.get_parameter(name), p) for name, p in lmm.vision.named_parameters())


def test_a_runs_keys_are_held_to_be_right_and_stored_ones_pass(tiny: Callable) -> None:
    config = architecture(tiny())
    llm = replace(config.llm, config=config.llm.config | {"hidden_sizes": 3})
    with pytest.raises(UserError, match=r"^model\.llm\.config\.hidden_sizes: not a key of LlamaConfig"):
        build(replace(config, llm=llm), Weights(seed=0), dtype=torch.float32)
    build(replace(config, llm=llm), dtype=torch.float32, file=FILE)  # written by another release of transformers


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        (ConnectorPart(type="mlp", options={"dept": 3}), "connector.options.dept: unknown key; did you mean 'depth'"),
        (ConnectorPart(type="mlq"), "connector.type: unknown connector 'mlq'"),
    ],
)
def test_keys_are_named_where_they_stand(connector: ConnectorPart, message: str, tiny: Callable) -> None:
    config = replace(architecture(tiny()), connector=connector)
    for file, place in ((FILE, f"{FILE}: "), (None, "model.")):
        with pytest.raises(UserError) as caught:
            build(config, dtype=torch.float32, file=file)
        assert str(caught.value).startswith(place + message)


def test_parts_that_do_not_fit_each_other_are_named_with_the_file(tiny: Callable) -> None:
    config = replace(architecture(tiny()), connector=ConnectorPart(type="mof_mlp"))
    for file, place in ((FILE, f"{FILE}: "), (None, "")):
        with pytest.raises(UserError, match=f"^{place}model.connector: mof_mlp joins the features of two towers"):
            build(config, dtype=torch.float32, file=file)

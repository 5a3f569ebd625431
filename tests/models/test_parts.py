"""Every connector on every tower, in a whole model: a training step, what it trains, and the model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.tiny import LLAMA
from tinyllava_fast.config.schema import (
    ConnectorConfig,
    LLMConfig,
    ModelConfig,
    OptimConfig,
    RecipeConfig,
    TuneConfig,
    VisionConfig,
)
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_model
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.recipes.base import apply_recipe

LLM = LLAMA | {"num_hidden_layers": 1, "vocab_size": 61}
TOWERS = {name: VISION.get(name).tiny() for name in VISION}
WIDE = TOWERS["dinov2_with_registers"]["config"]
HALF = WIDE | {"hidden_size": 16}
CONNECTOR_OPTIONS = {name: CONNECTORS.get(name).tiny() for name in CONNECTORS}
FIELD_NAMES = [n for n in CONNECTORS if n.startswith("mlp") and n != "mlp"]
KINDS = [n for n in CONNECTORS if n not in FIELD_NAMES]
# the two that join the features of two towers stand on no other one; the field's names are one MLP
PAIRS = [(t, c) for t in TOWERS for c in KINDS if t == "mof" or not c.startswith("mof")]
PAIRS += [("siglip", c) for c in FIELD_NAMES]


def config_of(tower: str, connector: str, **vision: object) -> ModelConfig:
    return ModelConfig(
        llm=LLMConfig(config=LLM),
        vision=VisionConfig(type=tower, **(TOWERS[tower] | vision)),
        connector=ConnectorConfig(type=connector, options=CONNECTOR_OPTIONS[connector]),
    )


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a")


def test_there_are_many_pairs() -> None:
    assert len(PAIRS) >= 45


@pytest.mark.parametrize(("tower", "connector"), PAIRS)
def test_training_step_and_folder(tower: str, connector: str, ragged: Callable, pack: Callable, tmp_path: Path) -> None:
    config = config_of(tower, connector)
    lmm = build_model(config, seed=1)
    batch = pack(ragged(4), lmm.tokens_per_image).tensors()
    assert lmm.encode_images(batch["pixel_values"]).shape[1:] == (lmm.tokens_per_image, 32)
    lmm(**batch).backward()
    without = {n for n, p in lmm.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    still = {n for n, p in lmm.named_parameters() if p.grad is not None and not p.grad.any()}
    assert not without and not still, "every parameter is used"

    lmm.eval()
    processor = build_image_processor(config)
    again, _, loaded = io.load_model(io.save_model(lmm, tokenizer(), processor, tmp_path / "model"))
    assert again.config == lmm.config and loaded.to_dict() == processor.to_dict()
    assert torch.equal(again(**batch), lmm(**batch))
    weights = lmm.state_dict()
    assert all(torch.equal(weights.pop(k), v) for k, v in again.state_dict().items()) and not weights


def trainable(lmm: LMM, **tune: TuneConfig) -> set[str]:
    frozen = {part: TuneConfig(tune="frozen") for part in ("llm", "vision", "connector")}
    apply_recipe(lmm, RecipeConfig(**(frozen | tune)), OptimConfig())
    return {n for n, p in lmm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tower", TOWERS)
def test_exactly_what_the_recipe_names_gets_gradients(tower: str, ragged: Callable, pack: Callable) -> None:
    lmm = build_model(config_of(tower, "mof_mlp" if tower == "mof" else "resampler"), seed=1)
    batch = pack(ragged(4), lmm.tokens_per_image).tensors()
    everything = {n for n, _ in lmm.named_parameters()}
    for tune, wanted in (
        ({"connector": TuneConfig(tune="full")}, {n for n in everything if n.startswith("connector.")}),
        ({"vision": TuneConfig(tune="full")}, {n for n in everything if n.startswith("vision.")}),
        (
            {"vision": TuneConfig(tune="partial", from_layer=1)},
            {n for n in everything if n.startswith("vision.") and (".layers.1." in n or ".layer.1." in n)},
        ),
    ):
        lmm.zero_grad()
        assert trainable(lmm, **tune) == wanted != set()
        lmm(**batch).backward()
        assert {n for n, p in lmm.named_parameters() if p.grad is not None} == wanted


def test_whole_model_compiles_fullgraph(ragged: Callable, pack: Callable) -> None:
    """The mixture; the parts alone are compiled in vision/ and connectors/."""
    lmm = build_model(config_of("mof", "mof"), seed=1)
    batch = pack(ragged(4), lmm.tokens_per_image).tensors()
    want = lmm(**batch)
    torch.compiler.reset()
    got = torch.compile(lmm, fullgraph=True, dynamic=False, backend="aot_eager")(**batch)
    torch.testing.assert_close(got, want)
    got.backward()
    assert all(p.grad is not None for p in lmm.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("siglip", "mof_mlp"), "model.connector: mof_mlp joins .* use model.vision.type: mof"),
        (
            config_of("mof", "mof_mlp", options={"dinov2": {"config": HALF | {"hidden_size": 48}}}),
            "CLIP has 16 channels and DINOv2 48",
        ),
        (config_of("siglip", "pixel_shuffle", feature_select="patch"), "3 are one short of 4: .*cls_patch"),
        (config_of("clip", "pixel_shuffle", feature_select="cls_patch"), "5 are 1 more than 4: .*: patch"),
        (config_of("siglip", "identity", config=HALF), "they have 16 and 32 channels"),
    ],
)
def test_parts_that_do_not_fit(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(config)


def test_processor_of_pretrained_weights_is_fitted_to_the_tower(tmp_path: Path) -> None:
    """Released DINOv2 processors make 224 pixels; NaFlex ones know no size at all."""
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(**WIDE)).save_pretrained(tmp_path)
    processor = VISION.get("dinov2").image_processor(224)
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path)
    for options, side in (({}, 16), ({"image_size": 32}, 32), ({"image_size": 224}, 224)):
        config = ModelConfig(vision=VisionConfig(type="dinov2", path=str(tmp_path), options=options))
        fitted = build_image_processor(config)
        assert dict(fitted.crop_size)["height"] == side and list(fitted.image_mean) == [0.1, 0.2, 0.3]
        assert dict(fitted.size)["shortest_edge"] == round(side * 256 / 224)
    (tmp_path / "naflex").mkdir()
    for file, text in (
        ("config.json", '{"model_type": "siglip2", "vision_config": {"num_patches": 9, "patch_size": 8}}'),
        (
            "preprocessor_config.json",
            '{"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 9, "resample": 2}',
        ),
    ):
        (tmp_path / "naflex" / file).write_text(text)
    fitted = build_image_processor(ModelConfig(vision=VisionConfig(type="siglip2", path=str(tmp_path / "naflex"))))
    assert dict(fitted.size) == {"height": 24, "width": 24} and fitted.resample == 2

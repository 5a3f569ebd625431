"""Truncated towers against transformers' own hidden_states, from random and from pretrained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.vision.families import DINO, FAMILIES, MOF, SIZES, hidden_states, images, open_tower, random_tower
from tinyllava_fast.config.load import parse_into
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.vision.base import VISION

ALL = [*FAMILIES, "mof"]


def test_every_registered_tower_is_tested() -> None:
    assert {f.tower for f in FAMILIES.values()} | {"mof"} == set(VISION)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [-2, -1, 1, 0, -4])
def test_equals_hidden_states(name: str, layer: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    stock = family.stock()
    stock.save_pretrained(tmp_path)
    with torch.no_grad():
        want = hidden_states(stock, images(), layer)
        everything = open_tower(family.tower, tmp_path, layer)
        got = everything(images())
        patches = open_tower(family.tower, tmp_path, layer, "patch")
        dropped = max(1, family.prefix)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(patches(images()), want[:, dropped:], atol=1e-6, rtol=1e-5)
    tokens = 16 + family.prefix
    assert (everything.num_tokens, patches.num_tokens) == (tokens, tokens - dropped) == (got.shape[1], tokens - dropped)
    assert (everything.hidden_size, everything.image_size, everything.widths) == (24, 32, (24,))
    kept = layer if layer >= 0 else 4 + layer
    assert everything.num_layers == kept == len(everything.layers)
    names = {n for n, _ in everything.named_parameters()}
    assert names <= set(stock.state_dict()), "stock names"
    assert not any(n.startswith(("post_layernorm", "head", "layernorm")) or "mask_token" in n for n in names)


@pytest.mark.parametrize(("name", "select"), [(n, "patch" if f.prefix else "cls_patch") for n, f in FAMILIES.items()])
def test_default_selection_drops_what_is_not_a_patch(name: str, select: str) -> None:
    tower = random_tower(name, select=None)
    assert tower.feature_select == select == tower.describe().feature_select
    assert tower.num_tokens == 16 == tower(images()).shape[1]


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.whole])
def test_reads_the_tower_of_a_whole_image_text_model(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    assert family.whole is not None
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    whole, config = family.whole
    model = whole(config(vision_config=family.values, text_config=text | {"vocab_size": 40})).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = hidden_states(model.vision_model, images(1), -2)
        torch.testing.assert_close(open_tower(family.tower, tmp_path)(images(1)), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_seed_decides_the_weights(name: str) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (random_tower(name, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("name", ALL)
def test_config_round_trip(name: str) -> None:
    """The description in a model folder rebuilds the tower, whatever the layer that was selected."""
    tower = random_tower(name, layer=1, select=None)
    stored = tower.describe()
    kind = VISION.get(stored.type)
    again = kind.from_config(
        stored.config,
        feature_layer=-1,
        feature_select=stored.feature_select,
        options=parse_into(kind.Options, stored.options, "x"),
        seed=None,
        where="x",
        strict=False,
    )
    assert again.describe() == stored and again.num_layers == tower.num_layers == 1
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(images()), tower(images()))


@pytest.mark.parametrize("name", ALL)
def test_compiles_fullgraph_forward_and_backward(name: str) -> None:
    options = {"image_size": 48, "interpolation": "transformers4"} if name == "dinov2" else None
    tower = random_tower(name, options=options)
    pixels = images(side=tower.image_size)
    want = tower(pixels)
    want.square().sum().backward()
    grads = {k: p.grad.clone() for k, p in tower.named_parameters()}
    assert all(g.any() for k, g in grads.items() if not k.endswith("k_proj.bias")), "every weight that is kept is used"
    tower.zero_grad()
    torch.compiler.reset()
    got = torch.compile(tower, fullgraph=True, backend="aot_eager")(pixels)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    for key, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_parameters(name: str) -> None:
    tower = random_tower(name)
    assert {id(p) for p in tower.layer_parameters(1)} == {id(p) for p in tower.layers[1].parameters()}
    assert len(tower.layer_parameters(0)) == 2 * len(tower.layer_parameters(1)) > 0


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name: str) -> None:
    tower = random_tower(name).eval()
    want = tower(images())
    got = tower.bfloat16()(images())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0.1)


def wrong_type(tower: str, model_type: str) -> Callable[[], object]:
    return VISION.get(tower).from_config(
        {"model_type": model_type}, feature_layer=-2, feature_select=None, seed=0, where="model.vision"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_tower("siglip", layer=4), r"feature_layer: 4 is outside .* 3 layers; use -4..3"),
        (lambda: random_tower("clip", layer=-5), "feature_layer: -5"),
        (lambda: random_tower("siglip", image_size=30), "image_size 30 is not a multiple of patch_size 8"),
        (lambda: random_tower("dinov2", options={"image_size": 30}), "image_size 30 is not a multiple of patch_size 8"),
        (lambda: random_tower("siglip2_naflex", num_patches=15), "num_patches 15 is not a square"),
        (lambda: random_tower("siglip", hidden_siz=3), "model.vision.config.hidden_siz: not a key"),
        (lambda: random_tower("siglip", model_type="clip_vision_model"), "use model.vision.type: clip$"),
        (lambda: wrong_type("siglip", "siglip2_vision_model"), "use model.vision.type: siglip2$"),
        (lambda: random_tower("dinov2", model_type="dinov2_with_registers"), "type: dinov2_with_registers$"),
        (lambda: random_tower("siglip", model_type="vit"), "a vit is not a siglip tower$"),
        (lambda: random_tower("siglip", select="all"), r"model.vision.feature_select: 'all'; Known: cls_patch, patch"),
        (lambda: random_tower("dinov2", options={"interpolation": "old"}), "interpolation"),
        (lambda: open_tower("siglip", "no/such/folder"), "no such folder or file: 'no/such/folder'"),
        (lambda: VISION.get("siglp", "model.vision.type"), "did you mean 'siglip'. Known: clip, dinov2"),
    ],
)
def test_errors(call: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(("name", "weight"), [("siglip", "layers.0.mlp.fc1.weight"), ("dinov2", "layer.0.norm1.bias")])
def test_missing_weights_are_named(name: str, weight: str, tmp_path: Path) -> None:
    FAMILIES[name].stock().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(k for k in weights if k.endswith(weight))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks weights: .*{weight}"):
        open_tower(name, tmp_path)


@pytest.mark.parametrize("name", VISION.names())
def test_image_processor_without_files(name: str) -> None:
    from PIL import Image

    processor = VISION.get(name).image_processor(32)
    pixels = processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and "Pil" in type(processor).__name__


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers"])
def test_position_table_is_resized_to_the_image(name: str, tmp_path: Path) -> None:
    """At a size that the table was not made for: transformers' own numerics, and gradients into the table."""
    stock = FAMILIES[name].stock()
    stock.save_pretrained(tmp_path)
    tower = open_tower(name, tmp_path, options={"image_size": 48})
    pixels = images(side=48)
    torch.testing.assert_close(tower(pixels), hidden_states(stock, pixels, -2), atol=1e-5, rtol=1e-5)
    assert (tower.image_size, tower.num_tokens) == (48, 36 + FAMILIES[name].prefix)
    tower(pixels).square().sum().backward()
    assert (tower.embeddings.position_embeddings.grad != 0).all()


def test_old_interpolation() -> None:
    """Differs from the current one where the table is resized, and only there (its values: test_golden.py)."""
    tables = {}
    for interpolation in ("transformers4", "transformers5"):
        tower = random_tower("dinov2", options={"image_size": 48, "interpolation": interpolation})
        tables[interpolation] = tower(images(side=48))
        same = random_tower("dinov2", options={"interpolation": interpolation})
        torch.testing.assert_close(same(images()), random_tower("dinov2")(images()), atol=1e-6, rtol=1e-5)
    assert (tables["transformers4"] - tables["transformers5"]).abs().max() > 1e-3


def test_mof_is_both_towers_side_by_side(tmp_path: Path) -> None:
    for name in ("clip", "dinov2"):
        FAMILIES[name].stock().save_pretrained(tmp_path / name)
    options = {"dinov2": {"path": str(tmp_path / "dinov2"), "interpolation": "transformers4"}}
    tower = open_tower("mof", tmp_path / "clip", select=None, options=options)
    halves = [open_tower(n, tmp_path / n, select="patch") for n in ("clip", "dinov2")]
    out = tower(images())
    assert torch.equal(out, torch.cat([half(images()) for half in halves], -1))
    assert (tower.num_tokens, tower.hidden_size, tower.widths, tower.feature_select) == (16, 48, (24, 24), "patch")
    assert tower.describe().options["dinov2"]["path"] is None, "a folder needs nothing but itself"
    tuned = {n for n, p in tower.named_parameters() if any(p is q for q in tower.layer_parameters(1))}
    assert {n.partition(".1.")[0] for n in tuned} == {"clip.encoder.layers", "dinov2.encoder.layer"}
    assert len(tuned) == sum(len(h.layer_parameters(1)) for h in halves)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"dinov2": {"path": "x"}}, {}, r"options.dinov2.path: given without model.vision.path"),
        (
            {"dinov2": {"config": DINO | {"patch_size": 4}}},
            {},
            r"CLIP gives 17 tokens .* DINOv2 65; .* \(they have 8 and 4",
        ),
        (
            {"dinov2": {"config": DINO | {"patch_size": 5}}},
            {},
            r"options.dinov2.config: image_size 32 is not a multiple",
        ),
        ({"dinov2": {"config": {"mlp_rato": 4}}}, {}, r"model.vision.options.dinov2.config.mlp_rato: not a key"),
        ({"dinov3": {}}, {}, "dinov3: unknown key; did you mean 'dinov2'"),
        (MOF, {"num_hidden_layers": 14}, r"options.dinov2.feature_layer: -14 is outside"),
    ],
)
def test_mof_errors(options: object, config: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        random_tower("mof", layer=-14 if config else -2, options=options, **config)


OLD_NAMES = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.down_proj.": ".mlp.weights_out.",
}


def as_transformers_4_named_it(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not name.startswith("dinov2"):
        buffer = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
        return {f"vision_model.{k}": v for k, v in state.items()} | buffer
    old = {}
    for key, value in state.items():
        for new, before in OLD_NAMES.items():
            key = key.replace(new, before)
        if ".mlp.gate_proj." in key:
            both = torch.cat([value, state[key.replace("gate_proj", "up_proj")]])
            old[key.replace("gate_proj", "weights_in")] = both
        elif ".mlp.up_proj." not in key:
            old[key] = value
    return old


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov2_swiglu"])
def test_reference_names(name: str) -> None:
    """The names of TinyLLaVA Factory's files; those of its own checkpoints are in test_golden.py."""
    stock = FAMILIES[name].stock().state_dict()
    tower = random_tower(name, layer=-1)
    renamed = tower.from_reference_names(as_transformers_4_named_it(name, stock))
    assert renamed.keys() == tower.state_dict().keys()
    assert all(torch.equal(value, stock[key]) for key, value in renamed.items())


def test_mof_needs_both_paths(tmp_path: Path) -> None:
    FAMILIES["clip"].stock().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.vision.options.dinov2.path: missing; model.vision.path is CLIP's"):
        open_tower("mof", tmp_path)


def test_sizes_are_the_processors(tmp_path: Path) -> None:
    """``input_size`` reads configs alone and agrees with the tower that is built."""
    for name in ALL:
        tower = random_tower(name)
        kind = type(tower)
        config = SIZES if name == "mof" else FAMILIES[name].values
        if name != "mof":
            config = config | {"model_type": FAMILIES[name].config.model_type}
        options = parse_into(kind.Options, tower.describe().options, "x")
        assert kind.input_size(None, config, options, "model.vision") == tower.image_size == 32
    FAMILIES["dinov2"].stock().save_pretrained(tmp_path)
    kind = VISION.get("dinov2")
    assert kind.input_size(str(tmp_path), {}, kind.Options(image_size=48), "model.vision") == 48

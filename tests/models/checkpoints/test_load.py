"""Folders of every layout are recognized, opened in place, or refused with the reason."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tinyllava_fast
from tests.models.checkpoints.golden import LAYOUT, MODELS, folder, opened, record, sources
from tests.vectors import GOLDEN
from tinyllava_fast.config.schema import ModelConfig
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models import io
from tinyllava_fast.models.adapter import layers
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer
from tinyllava_fast.models.checkpoints._base import LAYOUTS, Folder, Sources
from tinyllava_fast.models.checkpoints._load import open_checkpoint

MONO, LEGACY, LLAVA15 = "tinyllama-clip-mlp2x_gelu-mono", "legacy-tinyllama-siglip", "llava15-tinyllama-clip"
SIGLIP, CLIP = GOLDEN / "components" / "tiny-siglip", GOLDEN / "components" / "tiny-clip"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint to change; keyword arguments replace keys of its config.json, None removes them."""

    def make(name: str, **changes: object) -> Path:
        target = tmp_path / name
        shutil.copytree(folder(name), target)
        config = json.loads((target / "config.json").read_text()) | changes
        (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return target

    return make


def same_weights(a: object, b: object) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.mark.parametrize("name", MODELS)
def test_exactly_one_layout_recognizes_it(name: str) -> None:
    at = Folder(folder(name))
    found = [layout for layout in LAYOUTS if LAYOUTS.get(layout)().recognizes(at)]
    assert found == [LAYOUT.get(record(name)["layout"], "llava15")]


def test_in_place_wherever_a_model_path_is_taken(copy: Callable[..., Path]) -> None:
    path = copy(MONO)
    shutil.copy(CLIP / "preprocessor_config.json", path)
    lmm, tokenizer, processor = io.load_model(path)
    assert not lmm.training and same_weights(lmm, opened(MONO).lmm)
    assert (lmm.config.template, lmm.config.image_mode) == ("llama", "square")
    config = ModelConfig(path=str(path))
    assert build_model(config).training
    assert build_tokenizer(config)("red").input_ids == tokenizer("red").input_ids
    assert build_image_processor(config).to_dict() == processor.to_dict()


def test_three_lines_of_python(copy: Callable[..., Path]) -> None:
    wanted = record(LEGACY)["infer"]
    model = tinyllava_fast.load(copy(LEGACY, mm_vision_tower=str(SIGLIP)), device="cpu")
    answer = model.answer(GOLDEN / wanted["image"], "What is the blue shape?", max_new_tokens=16)
    tokens = wanted["greedy"][:16]
    assert answer == opened(LEGACY).tokenizer.decode(tokens, skip_special_tokens=True).strip() and answer


def test_a_saved_model_is_ours_and_needs_nothing_else(tmp_path: Path) -> None:
    model = opened("phi-mof-mof_mlp-split")
    io.save_model(model.lmm, model.tokenizer, model.processor, tmp_path / "model")
    assert not io.is_foreign(tmp_path / "model")
    again = io.load_model(tmp_path / "model")[0]
    assert same_weights(again, model.lmm) and again.config == model.lmm.config
    assert again.config.origin["vision2"] == "mof:tiny-dinov2"


def test_without_an_image_processor_the_defaults_of_the_tower(copy: Callable[..., Path]) -> None:
    processor = io.load_processor(copy(MONO))
    wanted = json.loads((CLIP / "preprocessor_config.json").read_text())
    assert (dict(processor.size)["shortest_edge"], dict(processor.crop_size)["height"]) == (56, 56)
    assert list(processor.image_mean) == wanted["image_mean"] and processor.resample == wanted["resample"]


def test_code_beside_the_weights_is_not_executed(copy: Callable[..., Path], tmp_path: Path) -> None:
    path = copy(MONO, auto_map={"AutoConfig": "configuration.Evil", "AutoModelForCausalLM": "modeling.Evil"})
    for name in ("configuration.py", "modeling.py"):
        (path / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert same_weights(io.load_model(path)[0], opened(MONO).lmm)
    assert not (tmp_path / "executed").exists()


def test_shards_and_half_precision(copy: Callable[..., Path]) -> None:
    path = copy(MONO)
    weights = {k: v.half() for k, v in load_file(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: weights[k] for k in keys}, path / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert io.load_model(path)[0].dtype == torch.float16, "as stored"
    whole = io.load_model(path, dtype=torch.float32)[0]
    head = whole.llm.lm_head.weight
    assert head.dtype == torch.float32 and torch.equal(head, opened(MONO).lmm.llm.lm_head.weight.half().float())
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: the weights file does not exist"):
        io.load_model(path)


@pytest.mark.parametrize("inside", [True, False])
def test_legacy_pretrain(inside: bool, tmp_path: Path, copy: Callable[..., Path]) -> None:
    """mm_projector.bin; the language model from a plain folder, the tower tuned or from its own."""
    base, path = copy(LEGACY), tmp_path / "pretrain"
    weights = load_file(base / "model.safetensors")
    path.mkdir()
    shutil.copy(base / "config.json", path)
    projector = {k: v for k, v in weights.items() if "mm_projector" in k}
    torch.save(projector, path / "mm_projector.bin")
    llm = {k: v for k, v in weights.items() if k.startswith(("model.layers", "model.norm", "model.embed", "lm_head"))}
    save_file(llm, base / "model.safetensors")
    if inside:
        (path / "vision_tower").mkdir()
        prefix = "model.vision_tower.vision_tower."
        tower = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        torch.save(tower, path / "vision_tower" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"(?s)the language model .legacy-tiny.*--llm FOLDER"):
        open_checkpoint(path, sources=Sources(vision=str(SIGLIP)))
    given = Sources(vision=str(SIGLIP if inside else tower_folder(tmp_path, weights)), llm=str(base))
    model = open_checkpoint(path, sources=given)
    assert model.layout == "legacy_pretrain"
    assert same_weights(model.lmm, opened(LEGACY).lmm)
    assert model.tokenizer("red").input_ids == opened(LEGACY).tokenizer("red").input_ids


def tower_folder(tmp_path: Path, weights: dict[str, torch.Tensor], component: Path = SIGLIP) -> Path:
    """The tower of a legacy checkpoint as a folder of its own, with the layers that the checkpoint lacks."""
    from transformers import AutoConfig, AutoModel

    tower = AutoModel.from_config(AutoConfig.from_pretrained(component))
    prefix = "model.vision_tower.vision_tower.vision_model."
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    tower.load_state_dict(state, strict=False)
    target = tmp_path / "tower"
    tower.save_pretrained(target)
    shutil.copy(component / "preprocessor_config.json", target)
    return target


def test_legacy_lora(tmp_path: Path, copy: Callable[..., Path]) -> None:
    base, path = folder(LEGACY), tmp_path / "lora"
    path.mkdir()
    shutil.copy(base / "config.json", path)
    weights, rng = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=rng), torch.randn(64, 4, generator=rng)
    key = "model.layers.1.self_attn.q_proj"
    adapter = {f"base_model.model.{key}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
    save_file(adapter, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    trained = {f"base_model.model.{k}": v + 1 for k, v in weights.items() if "mm_projector" in k}
    torch.save(trained, path / "non_lora_trainables.bin")
    lmm = open_checkpoint(path, sources=Sources(vision=str(SIGLIP), llm=str(base))).lmm
    torch.testing.assert_close(lmm.llm.get_parameter(f"{key}.weight"), weights[f"{key}.weight"] + 2 * b @ a)
    assert torch.equal(lmm.connector.layers[0].bias, weights["model.mm_projector.0.bias"] + 1)
    rest = opened(LEGACY).lmm
    assert torch.equal(lmm.llm.model.layers[0].mlp.up_proj.weight, rest.llm.model.layers[0].mlp.up_proj.weight)
    (path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora is True; only plain LoRA"):
        open_checkpoint(path, sources=Sources(vision=str(SIGLIP), llm=str(base)))


def test_legacy_lora_of_the_tower_and_the_projector(tmp_path: Path) -> None:
    """Layers of the tower above the one that is read are adapted, too, and of no use."""
    base, path, tower = folder(LEGACY), tmp_path / "lora", "model.vision_tower.vision_tower.vision_model.encoder.layers"
    path.mkdir()
    shutil.copy(base / "config.json", path)
    weights, rng = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0)
    keys = [f"{tower}.0.self_attn.q_proj", "model.mm_projector.0", "model.layers.0.self_attn.q_proj"]
    adapter, updates = {}, {}
    for key in keys:
        out, inside = weights[f"{key}.weight"].shape
        a, b = torch.randn(4, inside, generator=rng), torch.randn(out, 4, generator=rng)
        adapter |= {f"base_model.model.{key}.lora_A.weight": a, f"base_model.model.{key}.lora_B.weight": b}
        updates[key] = 2 * b @ a
    for letter in "AB":
        adapter[f"base_model.model.{tower}.40.mlp.fc1.lora_{letter}.weight"] = torch.ones(4, 4)
    save_file(adapter, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"model.mm_projector.0.bias": weights["model.mm_projector.0.bias"]}, path / "non_lora_trainables.bin")
    given = Sources(vision=str(SIGLIP), llm=str(base))
    rest, lmm = opened(LEGACY).lmm, open_checkpoint(path, sources=given).lmm
    changed = {
        "vision.encoder.layers.0.self_attn.q_proj.weight": updates[keys[0]],
        "connector.layers.0.weight": updates[keys[1]],
        "llm.model.layers.0.self_attn.q_proj.weight": updates[keys[2]],
    }
    before, after = rest.state_dict(), lmm.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor + changed.get(name, 0), atol=1e-5, rtol=0)
    kept = open_checkpoint(path, sources=given, merge=False).lmm
    assert sorted(name for name, _ in layers(kept)) == sorted(name.removesuffix(".weight") for name in changed)
    save_file({"base_model.model.model.nothing.lora_A.weight": torch.ones(4, 4)}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"linear layers: base_model.model.model.nothing.*merge_and_unload"):
        open_checkpoint(path, sources=given)


def test_llava15_without_its_tower(copy: Callable[..., Path], tmp_path: Path) -> None:
    path = copy(LLAVA15)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("pytorch_model-*.bin")):
        weights |= torch.load(file, weights_only=True)
        file.unlink()
    (path / "pytorch_model.bin.index.json").unlink()
    kept = {k: v for k, v in weights.items() if "vision_tower" not in k}
    torch.save(kept, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no weights of its vision tower 'tiny-clip'.*--vision FOLDER"):
        open_checkpoint(path, sources=Sources(vision=str(CLIP)))
    given = Sources(vision=str(tower_folder(tmp_path, weights, CLIP)))
    assert same_weights(open_checkpoint(path, sources=given).lmm, opened(LLAVA15).lmm)


def test_a_known_tower_needs_no_folder(copy: Callable[..., Path]) -> None:
    """Its config is built in; the tiny weights do not fit it, which shows that it was used."""
    with pytest.raises(CheckpointError, match=r"class_embedding .* has shape \[32\], its config says \[1024\]"):
        io.load_model(copy(LLAVA15, mm_vision_tower="openai/clip-vit-large-patch14-336"))


def test_qlora_takes_its_language_model_from_where_it_came(copy: Callable[..., Path], tmp_path: Path) -> None:
    name = "tinyllama-siglip-mlp2x_gelu-lora"
    path, file = copy(name), Path("language_model/pytorch_model.bin")
    stored = torch.load(path / file, weights_only=True)
    (tmp_path / "llm").mkdir()
    plain = {k.replace(".base_layer.", "."): v for k, v in stored.items()}
    torch.save(plain, tmp_path / "llm" / "pytorch_model.bin")
    torch.save({k: v.to(torch.int8) if "proj" in k else v for k, v in stored.items()}, path / file)
    with pytest.raises(CheckpointError, match=r"is quantized and its scales are not stored.*--llm FOLDER"):
        open_checkpoint(path, sources=sources(name))
    given = Sources(vision=str(SIGLIP), llm=str(tmp_path / "llm"))
    assert same_weights(open_checkpoint(path, sources=given).lmm, opened(name).lmm)


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def test_everything_that_does_not_fit_is_listed(copy: Callable[..., Path]) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["language_model.model.norm.weight"]
        weights["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        weights["vision_tower._vision_tower.vision_model.encoder.layers.0.mlp.fc9.bias"] = torch.zeros(2)
        weights["segmenter.weight"] = torch.zeros(3)
        weights["connector._connector.2.bias"] = torch.zeros(65)
        weights["language_model.lm_head.weight"] = torch.zeros(640, 64, dtype=torch.int8)
        weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # of old releases

    path = copy(MONO)
    edit_weights(path, change)
    with pytest.raises(CheckpointError) as caught:
        io.load_model(path)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.strip() for line in lines) == [
        "connector: layers.2.bias (stored as connector._connector.2.bias) has shape [65], its config says [64]",
        "llm.lm_head.weight (stored as language_model.lm_head.weight) is torch.int8: quantized, and its scales are "
        "not stored",
        "missing: llm.model.norm.weight [64]",
        "unexpected: language_model.model.layers.7.mlp.up_proj.weight [2]",
        "unexpected: segmenter.weight",
        "unexpected: vision_tower._vision_tower.vision_model.encoder.layers.0.mlp.fc9.bias [2]",
    ]


def pickle_with_code(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (shutil.rmtree, ("/nonexistent",))

    torch.save({"lm_head.weight": torch.zeros(2), "evil": Evil()}, path)


def damage(path: Path, what: str) -> None:
    weights = path / "model.safetensors"
    match what:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "header":
            weights.write_bytes(struct.pack("<Q", 1 << 40) + weights.read_bytes()[8:])
        case "pickle":
            weights.unlink()
            pickle_with_code(path / "pytorch_model.bin")
        case "half a torch file":
            weights.unlink()
            torch.save({"a": torch.zeros(5000)}, path / "pytorch_model.bin")
            (path / "pytorch_model.bin").write_bytes((path / "pytorch_model.bin").read_bytes()[:900])
        case "not tensors":
            weights.unlink()
            torch.save({"a": torch.zeros(5), "epoch": 3}, path / "pytorch_model.bin")
        case "index":
            (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
        case "empty":
            weights.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "model.safetensors: damaged or truncated safetensors"),
        ("header", "model.safetensors: damaged or truncated safetensors"),
        ("pickle", r"holds code or objects, not only tensors \(shutil.rmtree\); it was not loaded"),
        ("half a torch file", "pytorch_model.bin: damaged"),
        ("not tensors", r"holds more than tensors: epoch \(int\)"),
        ("index", "names a shard outside its folder"),
        ("empty", r"(?s)no known model: .*'tinyllava'.*the folder holds config.json.*known:\n  factory: "),
    ],
)
def test_damage_is_named(what: str, message: str, copy: Callable[..., Path]) -> None:
    path = copy(MONO)
    damage(path, what)
    with pytest.raises(CheckpointError, match=message):
        io.load_model(path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (MONO, {"model_type": "qwen2_vl"}, r"(?s)model_type 'qwen2_vl'.*llava15: "),
        (MONO, {"connector_type": "mlp2x_relu6"}, "unknown connector type 'mlp2x_relu6'; did you mean 'mlp2x_gelu'"),
        (MONO, {"connector_type": None}, "config.json lacks connector_type"),
        (MONO, {"vision_feature_layer": -9}, "feature layer -9 of a tower with 3 layers"),
        (MONO, {"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported"),
        (MONO, {"vision_config": {"model_type": "vit"}}, "vision_config.model_type: 'vit'"),
        (LEGACY, {"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
        (LEGACY, {"mm_projector_type": "resampler"}, "TinyLLaVABench's resampler is another one"),
    ],
)
def test_configs_that_cannot_be_met(name: str, changes: dict, message: str, copy: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        open_checkpoint(copy(name, **changes), sources=sources(name))


def test_a_tower_that_is_only_named(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"vision tower 'tiny-siglip' is neither a folder.*--vision FOLDER"):
        io.load_model(copy(LEGACY))
    with pytest.raises(CheckpointError, match=r"vision tower 'tiny-dinov2' is neither a folder.*--vision2 FOLDER"):
        io.load_model(copy("phi-mof-mof_mlp-mono"))


def test_a_tower_that_config_json_names_as_a_folder(copy: Callable[..., Path]) -> None:
    assert same_weights(io.load_model(copy(LEGACY, mm_vision_tower=str(SIGLIP)))[0], opened(LEGACY).lmm)


def test_an_unknown_end_token_leaves_the_template_open(copy: Callable[..., Path]) -> None:
    path = copy(MONO)
    settings = json.loads((path / "tokenizer_config.json").read_text()) | {"eos_token": "<s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "special_tokens_map.json").unlink()
    assert open_checkpoint(path).lmm.config.template == ""
    assert open_checkpoint(path, template="llama").lmm.config.template == "llama"

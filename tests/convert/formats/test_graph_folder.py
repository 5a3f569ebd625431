"""What lies beside graphs: prompts as one text have the ids of our prompts, and the files say how pictures are made."""

from __future__ import annotations

import dataclasses
import json

import pytest
from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from tests.convert.formats.exported import export, family
from tests.vectors import GOLDEN
from tinyllava_fast.convert.formats._base import Model
from tinyllava_fast.convert.formats._graph_folder import OneText, known_tokens, one_text, write_settings
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.build import build_image_processor, build_model

TEMPLATE = {
    "llama_spm": "llama",
    "llama_spm_legacy": "llama",
    "gemma_spm": "gemma",
    "phi_bytebpe": "phi",
    "qwen2_base_bytebpe": "qwen2_base",
    "stablelm_bytebpe": "phi",
}


def model_of(tokenizer: PreTrainedTokenizerBase, template: str, vision: str = "siglip", mode: str = "square") -> Model:
    config = family("tinyllama", vision, vocab_size=704)
    lmm = build_model(config).eval()
    lmm.config = dataclasses.replace(lmm.config, template=template, image_mode=mode)
    return Model(lmm, tokenizer, build_image_processor(config), {})


def text_of(tokenizer: PreTrainedTokenizerBase, template: str) -> OneText:
    return one_text(model_of(tokenizer, template))


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_the_chat_template_writes_the_prompt(name) -> None:
    """Engines put image tokens and a line break before the question, and render the template."""
    text = text_of(load_tokenizer(GOLDEN / "tokenizers" / name), TEMPLATE[name])
    rendered = (
        Environment()
        .from_string(text.chat_template())
        .render(
            messages=[{"role": "user", "content": "<image>" * text.rows + "\nWhat is it?"}], add_generation_prompt=True
        )
    )
    assert rendered == text.prompt([("<image>\nWhat is it?", None)])
    assert rendered.count("<image>") == text.rows == 16
    assert text.agrees(lambda prompt: text.tokenizer(prompt, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(("vision", "mode"), [("siglip", "pad"), ("clip", "square")])
def test_settings(vision, mode, tmp_path) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "llama_spm")
    tokenizer.chat_template = "the language model's own"
    model = model_of(tokenizer, "llama", vision, mode)
    text = one_text(model)
    write_settings(model, text, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == text.chat_template()
    config, pictures, generation = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("config", "preprocessor_config", "generation_config")
    )
    assert config["model_type"] == "llava" and config["vision_config"]["patch_size"] == 8
    assert config["image_token_index"] == known_tokens(model) == len(load_tokenizer(tmp_path)) - 1
    assert config["prompt"].startswith("<s>") and "{question}" in config["prompt"]
    assert pictures["crop_size"] == {"height": 32, "width": 32}
    assert pictures["size"]["shortest_edge"] == 32
    assert (pictures["do_pad"], pictures["do_center_crop"]) == (mode == "pad", vision == "clip")
    assert generation["eos_token_id"] == [2] and generation["do_sample"] is False


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxscript"), ("openvino", "nncf")])
def test_an_absent_package_is_named(format, package, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(f"tinyllava_fast.convert.formats.{format}.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--format {format}: needs .*{package}.*tinyllava-fast\[exports\]"):
        export(family("tinyllama"), tmp_path, format)
    assert not (tmp_path / "theirs").exists()

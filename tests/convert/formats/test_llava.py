"""Import -> export to transformers: the same logits and tokens there, from its own classes alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin

from tests.models.checkpoints.golden import folder, opened, record, sources
from tests.vectors import GOLDEN
from tinyllava_fast.convert.convert import export_model, import_checkpoint
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models import io
from tinyllava_fast.models.checkpoints._load import Opened

EXPRESSIBLE = [
    "gemma-siglip-mlp2x_gelu-mono",
    "legacy-tinyllama-siglip",
    "llava15-tinyllama-clip",
    "qwen2-clip-mlp2x_gelu-mono",
    "qwen2-dinov2-mlp2x_gelu-mono",
    "qwen2-siglip-linear-split",
    "stablelm-siglip-mlp2x_gelu-mono",
    "tinyllama-clip-mlp2x_gelu-mono",
    "tinyllama-siglip-mlp2x_gelu-lora",
]
QUESTION = "What is the blue shape?"
STEPS = 32


def export(name: str, tmp_path: Path) -> Path:
    import_checkpoint(folder(name), tmp_path / "ours", sources=sources(name))
    return export_model(tmp_path / "ours", tmp_path / "llava", "llava")


def inputs(processor: ProcessorMixin, image: Image.Image) -> BatchFeature:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=text, images=image, return_tensors="pt")


def answer(model: Opened | tuple, image: Image.Image) -> list[int]:
    lmm, tokenizer, processor = model[:3] if isinstance(model, tuple) else (model.lmm, model.tokenizer, model.processor)
    template = TEMPLATES.get(lmm.config.template)
    engine = Engine(lmm, tokenizer, processor, template, image_mode=lmm.config.image_mode, batch_tokens=256)
    return engine.answers([Request.ask(QUESTION, image, sampling=Sampling(max_new_tokens=STEPS))])[0].tokens


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_same_logits_and_tokens(name: str, tmp_path: Path) -> None:
    path = export(name, tmp_path)
    llava = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    with Image.open(GOLDEN / "pixels" / "wide.png") as file:
        image = file.convert("RGB")
    before = answer(opened(name), image)
    batch = inputs(processor, image)
    with torch.inference_mode():
        theirs = llava(**batch).logits[0]
        tokens = llava.generate(**batch, max_new_tokens=STEPS, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokens.tolist() == before and len(before) > 3
    lmm = opened(name).lmm
    assert theirs.shape[-1] >= lmm.vocab_size
    ids = batch["input_ids"][0]
    at = (ids == llava.config.image_token_id).nonzero().flatten()
    with torch.inference_mode():
        rows = lmm.encode_images(batch["pixel_values"]).flatten(0, 1)
        embeds = lmm.embed(ids.masked_fill(ids == llava.config.image_token_id, 0), rows, at)
        bounds, prefix = torch.tensor([0, len(ids)], dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
        ours = lmm.logits(lmm.decode(embeds, torch.arange(len(ids)), cu_seqlens=bounds, prefix=prefix))
    torch.testing.assert_close(theirs[:, : lmm.vocab_size], ours, atol=2e-5, rtol=0)
    again = io.load_model(path)
    assert answer(again, image) == before
    assert (again[0].config.template, again[0].config.image_mode) == (lmm.config.template, lmm.config.image_mode)


def transformers_tokens(path: Path, image: Image.Image) -> list[int]:
    batch = inputs(AutoProcessor.from_pretrained(path), image)
    llava = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return llava.generate(**batch, max_new_tokens=STEPS, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()


def test_a_hub_release_and_a_transformers_folder(tmp_path: Path) -> None:
    """The layouts that no golden folder has: a finetuned one with code beside it, and what the first export wrote."""
    hub = tmp_path / "hub"
    shutil.copytree(folder("qwen2-clip-mlp2x_gelu-mono"), hub)
    config = json.loads((hub / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tinyllava_qwen2.TinyLlavaForConditionalGeneration"}
    (hub / "config.json").write_text(json.dumps(config))
    (hub / "modeling_tinyllava_qwen2.py").write_text("raise SystemExit('executed')")
    with Image.open(GOLDEN / "pixels" / "wide.png") as file:
        image = file.convert("RGB")
    before = answer(io.load_model(hub), image)
    first = export_model(hub, tmp_path / "first", "llava")
    import_checkpoint(first, tmp_path / "ours")
    second = export_model(tmp_path / "ours", tmp_path / "second", "llava")
    assert len(before) > 3
    assert transformers_tokens(first, image) == answer(io.load_model(first), image) == before
    assert transformers_tokens(second, image) == before


def test_settings_of_pictures_where_other_loaders_look(tmp_path: Path) -> None:
    path = export("legacy-tinyllama-siglip", tmp_path)
    found = json.loads((path / "preprocessor_config.json").read_text())
    side = json.loads((path / "config.json").read_text())["vision_config"]["image_size"]
    assert found.pop("crop_size") == {"height": side, "width": side}
    assert found.pop("processor_class") == "LlavaProcessor"
    known = json.loads((path / "processor_config.json").read_text())["image_processor"]
    assert {name: value for name, value in known.items() if name != "crop_size"} == found


def test_several_turns_and_text_alone(tmp_path: Path) -> None:
    name = "tinyllama-clip-mlp2x_gelu-mono"
    processor, model = AutoProcessor.from_pretrained(export(name, tmp_path)), opened(name)
    template = TEMPLATES.get("llama")
    turns = [("Is it raining?", "No."), ("Why  so?", None)]
    messages = []
    for question, reply in turns:
        messages.append({"role": "user", "content": question})
        if reply:
            messages.append({"role": "assistant", "content": reply})
    made = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(made["input_ids"][0]) == template.prompt(turns, model.tokenizer).ids
    with pytest.raises(Exception, match="roles user and assistant only"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}])


@pytest.mark.slow
def test_loads_where_we_are_not_installed(tmp_path: Path) -> None:
    path = export("legacy-tinyllama-siglip", tmp_path)
    code = f"""
import json, sys, torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(path)!r})
processor = AutoProcessor.from_pretrained({str(path)!r})
content = [{{"type": "image"}}, {{"type": "text", "text": {QUESTION!r}}}]
text = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
batch = processor(text=text, images=Image.open({str(GOLDEN / "pixels/wide.png")!r}).convert("RGB"), return_tensors="pt")
tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1]:].tolist()
assert not any(m.startswith("tinyllava") for m in sys.modules)
print(json.dumps(tokens))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with Image.open(GOLDEN / "pixels" / "wide.png") as image:
        assert json.loads(done.stdout.splitlines()[-1]) == answer(opened("legacy-tinyllama-siglip"), image)[:8]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phi-siglip-mlp2x_gelu-mono", r"llm: phi's output projection has a bias \(lm_head.bias\)"),
        ("openelm-clip-mlp2x_gelu-mono", "llm: openelm is not in transformers"),
        ("stablelm-clip-resampler-mono", "llava has no resampler"),
    ],
)
def test_what_llava_lacks(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export(name, tmp_path)
    assert not (tmp_path / "llava").exists()


def test_more_that_llava_lacks(tmp_path: Path) -> None:
    model = opened("phi-mof-mof_mlp-mono")
    bias = model.lmm.llm.lm_head.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.zero_()
    io.save_model(model.lmm, model.tokenizer, model.processor, tmp_path / "mof")
    with torch.no_grad():
        bias.copy_(kept)
    with pytest.raises(UserError, match=r"vision.type: mof is no tower of transformers' llava"):
        export_model(tmp_path / "mof", tmp_path / "llava", "llava")
    plain = opened("tinyllama-clip-mlp2x_gelu-mono")
    for field, value, message in (
        ("template", "pretrain", "template: pretrain has no chat form"),
        ("image_mode", "anyres", "image_mode: anyres"),
    ):
        before = plain.lmm.config
        plain.lmm.config = replace(before, **{field: value})
        io.save_model(plain.lmm, plain.tokenizer, plain.processor, tmp_path / field)
        plain.lmm.config = before
        with pytest.raises(UserError, match=message):
            export_model(tmp_path / field, tmp_path / "llava", "llava")


def test_phi_without_that_bias(tmp_path: Path) -> None:
    name = "phi-siglip-mlp2x_gelu-mono"
    model = opened(name)
    bias = model.lmm.llm.lm_head.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.zero_()
    io.save_model(model.lmm, model.tokenizer, model.processor, tmp_path / "ours")
    with Image.open(GOLDEN / record(name)["infer"]["image"]) as image:
        before = answer(model, image)
        with torch.no_grad():
            bias.copy_(kept)
        path = export_model(tmp_path / "ours", tmp_path / "llava", "llava")
        llava, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
        batch = inputs(processor, image)
        tokens = llava.generate(**batch, max_new_tokens=STEPS, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert tokens.tolist() == before == answer(io.load_model(path), image)
    assert max(before) < len(model.tokenizer), "rows of padding are suppressed"

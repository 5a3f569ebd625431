"""A Hub repository loads in transformers by its own code and answers as the model does here."""

from __future__ import annotations

import dataclasses
import json
import linecache
import re
import shutil
import subprocess
import sys
import types
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from tests.convert.formats.test_gguf import enlarged
from tests.models.llm.families import CONFIGS
from tests.models.test_matrix import fits
from tests.models.test_parts import CONNECTOR_OPTIONS, KINDS, TOWERS
from tests.tiny import make_model, make_tokenizer, tiny_config
from tests.vectors import GOLDEN
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.convert.convert import export_model
from tinyllava_fast.convert.formats._hub_code import _Copy, parts_source
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.machine import model_digest
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_model
from tinyllava_fast.models.lmm import LMM

STEPS = 8
QUESTION = "What is the blue shape?"
SIZES = {"vocab_size": 272, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
OPENELM = {"vocab_size": 272, "max_context_length": 2048}


def combinations() -> list[tuple[str, str, str]]:
    """Every tower, every connector and every language model, in as few models as that takes."""
    pairs = [(t, c) for t, c in zip(cycle(TOWERS), [*KINDS, *KINDS], strict=False) if fits(t, c)]
    pairs = pairs[: len(CONFIGS)] + [(t, "mlp") for t in TOWERS if t not in {p[0] for p in pairs[: len(CONFIGS)]}]
    pairs += [("mof", c) for c in KINDS if c not in {p[1] for p in pairs}]
    return [(llm, *pair) for llm, pair in zip(cycle(sorted(CONFIGS)), pairs, strict=False)]


def save(config: ModelConfig, folder: Path, lmm: LMM | None = None, **changes: Any) -> LMM:
    lmm = lmm or enlarged(build_model(config, seed=1))
    lmm.config = dataclasses.replace(lmm.config, template="llama", **changes)
    io.save_model(lmm, make_tokenizer(), build_image_processor(config), folder)
    return io.load_model(folder)[0]


def ours(folder: Path, images: list[Image.Image]) -> list[int]:
    lmm, tokenizer, processor = io.load_model(folder)
    template = TEMPLATES.get(lmm.config.template)
    engine = Engine(lmm, tokenizer, processor, template, image_mode=lmm.config.image_mode, batch_tokens=512)
    request = Request.ask("<image>\n" * len(images) + QUESTION, images or None, sampling=Sampling(max_new_tokens=STEPS))
    return engine.answers([request])[0].tokens


def theirs(model: Any, processor: Any, images: list[Image.Image]) -> list[int]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=text, images=images or None, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**batch, max_new_tokens=STEPS, do_sample=False)
    return made[0, batch["input_ids"].shape[1] :].tolist()


def picture(name: str) -> Image.Image:
    with Image.open(GOLDEN / "pixels" / f"{name}.png") as file:
        return file.convert("RGB")


@pytest.mark.parametrize("triple", combinations(), ids="-".join)
def test_the_same_tokens(triple: tuple[str, str, str], tmp_path: Path) -> None:
    llm, tower, connector = triple
    config = ModelConfig(
        llm=LLMConfig(type=llm, config=CONFIGS[llm] | (OPENELM if llm == "openelm" else SIZES)),
        vision=VisionConfig(type=tower, feature_layer=-1, **TOWERS[tower]),
        connector=ConnectorConfig(type=connector, options=CONNECTOR_OPTIONS[connector]),
    )
    lmm = save(config, tmp_path / "ours", image_mode="pad" if connector == "mlp" else "square")
    out = export_model(tmp_path / "ours", tmp_path / "hub", "hub")
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    assert model.state_dict().keys() == lmm.state_dict().keys()
    wide, tall = picture("wide"), picture("tall")
    answers = []
    for images in ([], [wide], [tall, wide]):
        answers.append(ours(tmp_path / "ours", images))
        assert theirs(model, processor, images) == answers[-1]
    assert len({tuple(a) for a in answers}) > 1
    assert ours(out, [wide]) == answers[1], "this toolkit opens the repository as a model folder"


def test_a_biased_head_and_several_questions_at_once(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), llm=LLMConfig(type="phi", config=CONFIGS["phi"] | SIZES))
    lmm = enlarged(build_model(config))
    with torch.no_grad():
        lmm.llm.lm_head.bias.copy_(torch.linspace(-3, 3, 272))
    save(config, tmp_path / "ours", lmm)
    out = export_model(tmp_path / "ours", tmp_path / "hub", "hub")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    images = [picture("wide"), picture("tall")]
    texts = [f"USER: <image>\n{QUESTION} ASSISTANT:", "USER: <image>\nWhy? ASSISTANT:"]
    batch = processor(text=texts, images=images)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for number in range(2):
        one = processor(text=texts[number], images=images[number])
        alone = model.generate(**one, max_new_tokens=4, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert together[number].tolist()[: len(alone)] == alone.tolist()
    with pytest.raises(ValueError, match="2 times <image>, but there are 1 pictures"):
        processor(text=texts, images=images[:1])


def test_the_code_is_the_toolkits_own(tmp_path: Path) -> None:
    """Every line of the parts is one of the module it was taken from, or a plain form that the generator states."""
    config = dataclasses.replace(
        tiny_config(), connector=ConnectorConfig(type="qformer", options=CONNECTOR_OPTIONS["qformer"])
    )
    text = parts_source(build_model(config))
    assert not re.search(r"^\s*(from|import) tinyllava_fast", text, re.MULTILINE)
    import tinyllava_fast.models.connectors.qformer as module

    source = set(Path(module.__file__).read_text().splitlines())
    start = text.index("class QFormerConnector")
    body = text[start : text.index("_TOWERS =")].splitlines()
    assert len([line for line in body if line.strip()]) > 30
    assert [line for line in body if line.strip() and line not in source] == []
    assert "def reset" not in text and "from_reference_names" not in text


@pytest.mark.slow
def test_loads_where_this_toolkit_is_absent(tmp_path: Path) -> None:
    save(tiny_config(), tmp_path / "ours")
    out = export_model(tmp_path / "ours", tmp_path / "hub", "hub")
    code = f"""
import json, sys
sys.modules["tinyllava_fast"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(out)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(out)!r}, trust_remote_code=True)
content = [{{"type": "image"}}, {{"type": "text", "text": {QUESTION!r}}}]
text = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
batch = processor(text=text, images=Image.open({str(GOLDEN / "pixels/wide.png")!r}))
made = model.generate(**batch, max_new_tokens={STEPS}, do_sample=False)
print(json.dumps(made[0, batch["input_ids"].shape[1]:].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ours(tmp_path / "ours", [picture("wide")])


def test_what_a_repository_cannot_hold(tmp_path: Path) -> None:
    config = tiny_config()
    for number, (changes, reason) in enumerate(
        [
            ({"image_mode": "anyres", "image_grid": [(32, 64)]}, "image_mode: anyres"),
            ({"template": "pretrain"}, "chat form"),
        ]
    ):
        lmm = make_model()
        folder = tmp_path / str(number)
        lmm.config = dataclasses.replace(lmm.config, **changes)
        io.save_model(lmm, make_tokenizer(), build_image_processor(config), folder)
        with pytest.raises(UserError, match=reason):
            export_model(folder, tmp_path / "out", "hub")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("head", "inside", "reason"),
    [
        ("from tinyllava_fast import fields", "", "imports tinyllava_fast, which a Hub repository lacks"),
        ("from . import fields", "", "imports [.], which a Hub repository lacks"),
        ("", "from tinyllava_fast.fields import shown", "inside a function find nothing"),
    ],
    ids=["package", "relative", "inside"],
)
def test_imports_that_a_repository_lacks_are_refused(
    head: str, inside: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part_of_a_plugin.py").write_text(f"{head}\n\ndef part():\n    {inside or 'pass'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = types.ModuleType("part_of_a_plugin")
    module.__file__ = str(tmp_path / "part_of_a_plugin.py")
    monkeypatch.setitem(sys.modules, "part_of_a_plugin", module)
    linecache.checkcache()
    with pytest.raises(UserError, match=reason):
        _Copy().add("part_of_a_plugin", "part")


def run_folder(tmp_path: Path) -> Path:
    """A run with a model, a configuration, an evaluation and its blind control."""
    run = tmp_path / "runs" / "shapes"
    save(tiny_config(), run / "final")
    (run / "config.yaml").write_text(
        "stages:\n- name: finetune\n  data: {records: /data/private/train.json}\n  epochs: 3\n"
        "  recipe: {llm: {tune: full}, connector: {tune: full}}\n  optim: {lr: 0.002}\n"
    )
    (run / "summary.json").write_text(json.dumps({"train_seconds": 600.0, "steps": 1000, "samples": 20000}))
    picture("wide").save(tmp_path / "wide.png")
    for name, value in (("eval", 99.1), ("eval-blind", 61.5)):
        folder = run / name / "easy_vqa"
        folder.mkdir(parents=True)
        metric = {"name": "accuracy", "value": value, "scale": 100.0, "stderr": 0.25, "questions": 9673, "digits": 2}
        results = {"benchmark": "easy_vqa", "title": "easy-VQA", "questions": 9673, "headline": "accuracy",
                   "metrics": [metric], "tables": {}, "counts": {},
                   "model_digest": model_digest(run / "final")}  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "run.json").write_text(json.dumps({"peak_rss_bytes": 1}))
        verdict = {"key": "1", "prompt": "what | is it?", "images": [str(tmp_path / "wide.png")], "truth": "a circle",
                   "answer": "a square", "credit": 0.0}  # fmt: skip
        (folder / "verdicts.jsonl").write_text(json.dumps(verdict) + "\n")
    return run


def test_the_model_card(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    out = export_model(run / "final", tmp_path / "hub", "hub")
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# shapes" in card
    assert "| easy-VQA | 9,673 | accuracy | 99.10 ± 0.25 | 61.50 ± 0.25 |" in card
    assert "| finetune | train.json | 3 | connector: full, llm: full | 0.002 |" in card and "/data/private" not in card
    assert "1,000 steps on 20,000 samples in 10 minutes" in card
    assert "| ![](samples/0.png) | what \\| is it? | a square | a circle |" in card
    with Image.open(out / "samples" / "0.png") as image:
        assert max(image.size) <= 256
    shutil.rmtree(run / "eval-blind")
    results = run / "eval" / "easy_vqa" / "results.json"
    results.write_text(results.read_text().replace(model_digest(run / "final"), "another"))
    other = export_model(run / "final", tmp_path / "other", "hub")
    assert "no run folder holds an evaluation of it" in (other / "README.md").read_text()
    shutil.rmtree(run / "eval")
    (run / "config.yaml").unlink()
    bare = (export_model(run / "final", tmp_path / "bare", "hub") / "README.md").read_text()
    for said in (
        "Not known: there is no run folder",
        "None: no run folder holds an evaluation of it",
        "The licence of the weights",
    ):
        assert said in bare

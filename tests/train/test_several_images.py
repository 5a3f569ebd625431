"""Samples with several images, tiles and none: packed as one by one, trained by the ordinary loop, then answered."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinyllava_fast
from tests.train.conftest import COLOURS, LLAMA, SIGLIP, write_tokenizer
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import BatchConfig, DataConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.data.anyres import tiles
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.data.images import load_image, to_pixels
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.models.build import build_image_processor, build_model
from tinyllava_fast.models.io import read_config
from tinyllava_fast.train.loop import train

SIZES = {"a": (16, 16), "b": (40, 18), "c": (17, 50), "d": (31, 33), "e": (1, 9)}
M = "<image>"
# (named image or list, turns)
RECORDS: list[tuple[Any, list[tuple[str, str]]]] = [
    (["a", "b", "c"], [(f"first {M} second {M} third {M} which ?", "green")]),
    ("b", [(f"{M}\nwhat colour ?", "red"), ("and ?", "blue it is")]),
    (None, [("say hello .", "hello ."), ("again", "hello")]),
    (["d", "a"], [(f"{M}\n{M}\nsame ?", "no"), ("why ?", "they differ"), ("", "")]),
    (["a"], [(f"in the middle {M} here", "x")]),
    ("e", [(f"one {M} or {M} two", "grey"), (f"{M} and again", "y")]),
    (["c", "c", "e"], [(f"{M} what ?", "a"), (f"see {M} now {M}", "b c d e f")]),
    (None, [("a", "b")]),
]
# What each of them is once every turn stands alone: the images of earlier turns come first.
ALONE: list[tuple[Any, list[tuple[str, str]]]] = [
    RECORDS[0],
    ("b", [(f"{M}\nwhat colour ?", "red")]),
    ("b", [(f"{M}\nand ?", "blue it is")]),
    *[(None, [turn]) for turn in RECORDS[2][1]],
    (["d", "a"], [(f"{M}\n{M}\nsame ?", "no")]),
    (["d", "a"], [(f"{M}\n{M}\nwhy ?", "they differ")]),
    (["d", "a"], [(f"{M}\n{M}\n", "")]),
    RECORDS[4],
    ("e", [(f"one {M} or {M} two", "grey")]),
    ("e", [(f"{M} and again", "y")]),
    (["c"], [(f"{M} what ?", "a")]),
    (["c", "c", "e"], [(f"{M}\nsee {M} now {M}", "b c d e f")]),
    RECORDS[7],
]


def conversation(turns):
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(t for turn in turns for t in turn)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(folder with records and images, model, tokenizer, processor)."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    rows = []
    for i, (image, turns) in enumerate(RECORDS):
        named = f"{image}.png" if isinstance(image, str) else image and [f"{name}.png" for name in image]
        rows.append({"id": str(i), "image": named, "conversations": conversation(turns)})
    (folder / "records.json").write_text(json.dumps(rows))
    write_tokenizer(folder / "tokenizer")
    config = ModelConfig(
        llm=LLMConfig(config=LLAMA, tokenizer=str(folder / "tokenizer")), vision=VisionConfig(config=SIGLIP)
    )
    return folder, build_model(config, seed=3), load_tokenizer(folder / "tokenizer"), build_image_processor(config)


def dataset_of(parts, **settings):
    folder, lmm, tokenizer, processor = parts
    data = {"records": str(folder / "records.json"), "image_folder": str(folder), **settings}
    batch = BatchConfig(tokens=2048, max_images=64, max_segments=64, image_multiple=4)
    rows = lmm.tokens_per_image
    return PackedDataset(
        DataConfig(**data), batch, tokenizer=tokenizer, processor=processor, tokens_per_image=rows, seed=0
    )


def loss_alone(parts, model, image, turns, grid):
    """SUM loss of one sample from stock modules: each image encoded alone, dense attention, dense logits."""
    folder, _, tokenizer, processor = parts
    listed = isinstance(image, list)
    [[sample]] = TEMPLATES.get("llama").encode([turns], tokenizer, interleaved=[listed])
    names = iter(image if listed else [image] * sample.ids.count(IMAGE_INDEX))
    rows, labels = [], []
    for token, label in zip(sample.ids, sample.labels(), strict=True):
        if token != IMAGE_INDEX:
            rows.append(model.llm.get_input_embeddings()(torch.tensor([token])))
            labels.append(label)
            continue
        picture = load_image(folder / f"{next(names)}.png")
        inputs = tiles(picture, grid, processor) if grid else [picture]
        for one in inputs:
            rows.append(model.connector(model.vision(to_pixels([one], processor)))[0])
        labels += [-100] * sum(len(r) for r in rows[-len(inputs) :])
    logits = model.llm(inputs_embeds=torch.cat(rows)[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("mode", ["square", "anyres"])
@pytest.mark.parametrize("turns", ["conversation", "independent"])
def test_a_pack_equals_its_samples_one_by_one(parts, mode, turns):
    lmm = parts[1]
    dataset = dataset_of(parts, image_mode=mode, turns=turns)
    batch = dataset.pack(0, range(len(RECORDS)))
    assert batch.num_samples == len(RECORDS) and len(batch.pixel_values) == -(-dataset.images.sum() // 4) * 4
    assert (dataset.images.sum() > 30) == (mode == "anyres")
    loss = lmm(**batch.tensors()) / batch.num_supervised
    lmm.zero_grad()
    loss.backward()
    got = {n: p.grad.clone() for n, p in lmm.named_parameters() if p.grad is not None}

    plain = copy.deepcopy(lmm)
    plain.zero_grad()
    plain.llm.set_attn_implementation("sdpa")
    alone = RECORDS if turns == "conversation" else ALONE
    want = (
        sum(loss_alone(parts, plain, *sample, dataset.sources[0].files.grid) for sample in alone) / batch.num_supervised
    )
    want.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
    assert len(got) > 40
    for name, parameter in plain.named_parameters():
        if name in got:
            torch.testing.assert_close(
                got[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("mode", ["square", "anyres"])
def test_the_tower_runs_only_for_packs_with_images(parts, mode, monkeypatch):
    lmm = parts[1]
    dataset = dataset_of(parts, image_mode=mode)
    calls = []
    forward = type(lmm.vision).forward
    monkeypatch.setattr(type(lmm.vision), "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    for indices, images in (([2, 7], 0), ([2, 0], int(dataset.images[0])), ([], 0), ([7], 0)):
        calls.clear()
        with torch.no_grad():
            lmm(**dataset.pack(0, indices).tensors())
        assert calls == ([-(-images // 4) * 4] if images else [])


def colour_records(folder, mode):
    """square: the second of three images is asked for. anyres: one image, whose right half is asked for."""
    rng = np.random.default_rng(1)
    names, rows = list(COLOURS), []
    for i in range(4):
        order = [names[(i + k) % 4] for k in range(3)]
        if mode == "square":
            for k, name in enumerate(order):
                Image.new("RGB", (16, 16), COLOURS[name]).save(folder / "images" / f"s{i}{k}.png")
            image, question = [f"s{i}{k}.png" for k in range(3)], f"first {M} second {M} third {M} second colour ?"
        else:
            wide = Image.new("RGB", (32, 16), COLOURS[order[0]])
            wide.paste(COLOURS[order[1]], (16, 0, 32, 16))
            wide.save(folder / "images" / f"w{i}.png")
            image, question = f"w{i}.png", f"{M}\nright colour ?"
        rows.append({"id": f"c{i}", "image": image, "conversations": conversation([(question, order[1])])})
    rows.append({"id": "t", "conversations": conversation([("say hello .", "hello .")])})
    rng.shuffle(rows)
    (folder / "records.json").write_text(json.dumps(rows))
    return rows


@pytest.mark.parametrize("mode", ["square", "anyres"])
def test_training_learns_and_the_model_answers(tiny_run, losses, mode):
    grid = [[32, 16], [16, 32]] if mode == "anyres" else []
    path = tiny_run(
        stages__pretrain__max_steps=1,
        stages__finetune__data__image_grid=grid,
        stages__finetune__max_steps=50,
        model__llm__config={**LLAMA, "initializer_range": 0.15},
        checkpoint__every_steps=0,
        stages__finetune__data__image_mode=mode,
        stages__finetune__batch={"tokens": 400, "max_segments": 8, "max_images": 16, "packs_per_step": 1},
        stages__finetune__optim={"lr": 5e-3, "warmup_ratio": 0.05},
        stages__finetune__recipe={"vision": {"tune": "full"}},
    )
    rows = colour_records(path.parent, mode)
    train(load_run(path))
    curve = [loss for _, stage, loss in losses(path.parent / "run") if stage == "finetune"]
    assert curve[-1] < 0.15 < 1 < curve[0]
    config = read_config(path.parent / "run" / "final")[0]
    assert config.image_mode == mode and config.image_grid == [tuple(size) for size in grid]
    assert read_config(path.parent / "run" / "pretrain")[0].image_grid == []
    assert load_run(path.parent / "run" / "config.yaml") == load_run(path)
    assistant = tinyllava_fast.load(path.parent / "run" / "final", device="cpu")
    for row in rows:
        question, answer = (m["value"] for m in row["conversations"])
        files = row.get("image")
        image = [path.parent / "images" / f for f in files] if isinstance(files, list) else files
        image = path.parent / "images" / image if isinstance(image, str) else image
        assert assistant.answer(image, question, max_new_tokens=4) == answer, row["id"]

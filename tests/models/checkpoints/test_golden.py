"""Every layout against what the reference computed: ids, features, logits, loss, gradients, tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.models.checkpoints.golden import (
    LAYOUT,
    MODELS,
    STORED,
    arrays,
    factory_names,
    folder,
    grad_norms,
    opened,
    record,
)
from tests.vectors import GOLDEN, shared
from tinyllava_fast.data.images import load_image, to_pixels
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.types import IMAGE_INDEX, PackedBatch
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling

STEPS = 16


def equal_tensors(mine: Path, original: Path) -> bool:
    """Return whether two weights files hold the same numbers under the same names."""
    a, b = (load_file(f) if f.suffix == ".safetensors" else torch.load(f, weights_only=True) for f in (mine, original))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", STORED)
def test_what_is_stored_is_the_original(name: str) -> None:
    """Every file and tensor of the checkpoint, and of the record what is kept of it, bit by bit."""
    original, mine = shared(f"models/{name}"), folder(name)
    files = sorted(p.relative_to(original / "checkpoint") for p in original.glob("checkpoint/**/*") if p.is_file())
    assert files == sorted(p.relative_to(mine) for p in mine.rglob("*") if p.is_file())
    for file in files:
        ours, theirs = mine / file, original / "checkpoint" / file
        weights = file.suffix in (".safetensors", ".bin")
        assert equal_tensors(ours, theirs) if weights else ours.read_bytes() == theirs.read_bytes(), file
    for file in ("record.json", "grad_norms.json"):
        assert (GOLDEN / "models" / name / file).read_bytes() == (original / file).read_bytes()
    with np.load(original / "record.npz") as whole:
        for key, value in arrays(name).items():
            if key == "batch_logits_first":
                expected = whole["batch_logits_first32"][..., : value.shape[-1]]
            elif key == "infer_logits":
                expected = whole[key][:, arrays(name)["infer_positions"]]
            else:
                expected = value.numpy() if key == "infer_positions" else whole[key]
            assert np.array_equal(value.numpy(), expected), key


@pytest.mark.parametrize("name", MODELS)
def test_one_prompt(name: str) -> None:
    model, wanted, golden = opened(name), record(name), arrays(name)
    lmm, infer = model.lmm, wanted["infer"]
    assert model.layout == LAYOUT.get(wanted["layout"], "llava15")
    assert lmm.config.template == wanted["template"]
    ids = TEMPLATES.get(lmm.config.template).prompt(infer["messages"], model.tokenizer).ids
    assert ids == infer["input_ids"]
    assert (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id) == (
        wanted["eos_token_id"],
        wanted["pad_token_id"],
    )
    image = load_image(GOLDEN / infer["image"], lmm.config.reading)
    pixels = to_pixels([image], model.processor, lmm.config.image_mode)
    torch.testing.assert_close(pixels, golden["infer_pixel_values"], atol=1e-6, rtol=0)
    with torch.inference_mode():
        features, rows = lmm.vision(pixels), lmm.encode_images(pixels)
        at, count = ids.index(IMAGE_INDEX), rows.shape[1]
        text = torch.tensor([*ids[:at], *[0] * count, *ids[at + 1 :]])
        embeds = lmm.embed(text, rows.flatten(0, 1), torch.arange(at, at + count))
        bounds, prefix = torch.tensor([0, len(text)], dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
        logits = lmm.logits(lmm.decode(embeds, torch.arange(len(text)), cu_seqlens=bounds, prefix=prefix))
    halves = [golden[k] for k in golden if k.startswith("infer_tower_features")]
    torch.testing.assert_close(features, torch.cat(halves, dim=-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows, golden["infer_connector_output"], atol=1e-4, rtol=0)
    torch.testing.assert_close(embeds, golden["infer_inputs_embeds"][0] * lmm.embedding_scale, atol=1e-3, rtol=0)
    torch.testing.assert_close(logits[golden["infer_positions"]], golden["infer_logits"][0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str) -> None:
    model, wanted = opened(name), record(name)["infer"]
    template = TEMPLATES.get(model.lmm.config.template)
    engine = Engine(
        model.lmm, model.tokenizer, model.processor, template, image_mode=model.lmm.config.image_mode, batch_tokens=256
    )
    request = Request(
        messages=wanted["messages"][:1],
        image=GOLDEN / wanted["image"],
        sampling=Sampling(max_new_tokens=STEPS),
    )
    tokens = engine.answers([request])[0].tokens
    close = [i for i, margin in enumerate(wanted["greedy_top2_margin"]) if margin < 1e-3]
    padding = [i for i, token in enumerate(wanted["greedy"]) if token >= engine.vocab]  # the reference's: never ours
    until = min([*close, *padding, STEPS])
    assert until > 3
    assert tokens[:until] == wanted["greedy"][:until]


@pytest.mark.parametrize("name", MODELS)
def test_batch(name: str, pack: Callable[..., PackedBatch]) -> None:
    lmm, wanted, golden = opened(name).lmm, record(name)["batch"], arrays(name)
    samples = []
    for row in range(3):
        mask = golden["batch_attention_mask"][row].bool()
        ids, labels = golden["batch_input_ids"][row][mask].tolist(), golden["batch_labels"][row][mask]
        has_image = IMAGE_INDEX in ids
        samples.append(
            SimpleNamespace(
                ids=[None if i == IMAGE_INDEX else i for i in ids],
                supervised=(labels != -100).tolist(),
                pixels=golden["batch_pixel_values"][row] if has_image else None,
            )
        )
    batch = pack(samples, lmm.tokens_per_image)
    assert batch.num_supervised == wanted["supervised_tokens"]
    tensors = batch.tensors()
    with torch.inference_mode():
        features = lmm.encode_images(batch.pixel_values).flatten(0, 1)
        embeds = lmm.embed(batch.input_ids, features, batch.image_slots)
        attention = {"cu_seqlens": batch.cu_seqlens, "prefix": batch.prefix}
        logits = lmm.logits(lmm.decode(embeds, batch.position_ids, **attention))
    bounds = batch.cu_seqlens.tolist()
    for row in range(3):
        mine = logits[bounds[row] : bounds[row + 1]]
        first = golden["batch_logits_first"][row][: len(mine)]
        torch.testing.assert_close(mine[:, : first.shape[1]], first, atol=1e-3, rtol=0)
        whole = golden["batch_logits_logsumexp"][row][: len(mine)]
        torch.testing.assert_close(mine.logsumexp(-1), whole, atol=1e-3, rtol=0)
    if record(name)["layout"] == "lora":
        with torch.inference_mode():
            assert float(lmm(**tensors)) / batch.num_supervised == pytest.approx(wanted["loss"], abs=1e-4)
        return  # its gradients are those of the adapter: tests/convert/formats/test_adapter.py
    lmm.zero_grad()
    loss = lmm(**tensors) / batch.num_supervised
    assert float(loss.detach()) == pytest.approx(wanted["loss"], abs=1e-4)
    loss.backward()
    norms, names, compared = grad_norms(name), factory_names(name), 0
    for ours, parameter in lmm.named_parameters():
        expected = norms.get(names[ours])
        if expected is not None:
            norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            assert norm == pytest.approx(expected, rel=1e-3, abs=1e-6), ours
            compared += 1
    lmm.zero_grad()
    assert compared > 0.9 * len(list(lmm.parameters()))

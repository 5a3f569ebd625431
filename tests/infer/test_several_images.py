"""Requests about several images, interleaved with text or in tiles, against a full recomputation for each token."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

import tinyllava_fast
from tests.tiny import make_engine, make_model, make_tokenizer, tiny_config
from tinyllava_fast.data.anyres import tiles
from tinyllava_fast.data.images import to_pixels
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import read_config, save_model
from tinyllava_fast.models.lmm import LMMConfig

GRID = [(32, 64), (64, 32), (64, 64)]


def ask(text, image=None, new=6, id=""):
    return Request.ask(text, image, sampling=Sampling(max_new_tokens=new), id=id)


@torch.no_grad()
def recompute(plain, engine, request, grid=None):
    """Greedy ids from stock transformers without any cache: the whole row again for every token."""
    lmm = engine.lmm
    conversation = request.conversation()
    prompt = engine.template.prompt_batch([conversation], engine.tokenizer, [request.interleaved])[0]
    images = [image.convert("RGB") for image in request.images]
    inputs = [tiles(image, grid, engine.processor) if grid else [image] for image in images]
    blocks = [lmm.encode_images(to_pixels(some, engine.processor)).flatten(0, 1) for some in inputs]
    order = iter(blocks if request.interleaved else blocks * prompt.ids.count(IMAGE_INDEX))
    table = plain.get_input_embeddings()
    rows = torch.cat([next(order) if i == IMAGE_INDEX else table(torch.tensor([i])) for i in prompt.ids])
    said: list[int] = []
    while len(said) < request.sampling.max_new_tokens and not engine.eos & set(said):
        logits = plain(inputs_embeds=rows[None], use_cache=False).logits[0, -1, : engine.vocab]
        said.append(int(logits.argmax()))
        rows = torch.cat([rows, table(torch.tensor(said[-1:]))])
    return said


def requests_about(images):
    a, b, c, d = images
    talk = [
        {"from": "human", "value": "First <image>, then <image>: same?"},
        {"from": "gpt", "value": "no"},
        {"from": "human", "value": "and <image>\nwhy?"},
    ]
    return [
        ask("Compare <image> with <image> and <image>.", [a, b, c]),
        ask("Compare <image> with <image> and <image>!", [a, b, c]),
        ask("<image> <image> <image> and now?", [a, b, c]),
        ask("Another order: <image><image><image>", [c, b, a]),
        ask("no marker", [a, b, c]),
        ask("no marker at all, but longer", [a, b, c]),
        ask("one of a list: <image>?", [d]),
        ask("twice <image> <image>", [d, d]),
        ask("one by name", d),
        ask("one by name, <image> in the middle", d),
        ask("text alone"),
        Request(messages=talk, image=[a, d, b], sampling=Sampling(max_new_tokens=5)),
    ]


@pytest.mark.parametrize("share", [True, False])
def test_greedy_equals_full_recomputation(plain, lmm, tokenizer, images, share):
    engine = make_engine(lmm, tokenizer)
    engine._core.scheduler.share_prefix = share
    requests = requests_about(images)
    expected = [recompute(plain, engine, r) for r in requests]
    assert [a.tokens for a in engine.answers(requests)] == expected
    assert len({tuple(e) for e in expected}) > len(expected) // 2
    assert engine.counters.images_encoded == 4


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 700, "prefill_tokens": 1}])
def test_tiles_equal_full_recomputation(plain, lmm, tokenizer, images, options):
    rng = np.random.default_rng(3)
    sizes = ((90, 100), (30, 90), (70, 30))  # (height, width): four tiles, two and two
    shapes = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    engine = make_engine(lmm, tokenizer, image_mode="anyres", image_grid=GRID, **options)
    requests = requests_about([*shapes, images[1]])
    answers = engine.answers(requests)
    assert [a.tokens for a in answers] == [recompute(plain, engine, r, GRID) for r in requests]
    square = make_engine(lmm, tokenizer).answers(requests)
    extra = [a.prompt_tokens - s.prompt_tokens for a, s in zip(answers, square, strict=True)]
    assert [extra[i] // lmm.tokens_per_image for i in (0, 8, 10)] == [4 + 2 + 2, 2, 0]


def test_questions_about_the_same_images_share_their_work(lmm, tokenizer, images):
    engine = make_engine(lmm, tokenizer)
    engine.answers([ask(f"<image> and <image>: question {i}?", images[:2]) for i in range(6)])
    counters = engine.counters
    assert counters.images_encoded == 2
    assert counters.computed_tokens < 0.6 * counters.prompt_tokens


def test_more_inputs_than_one_pass_takes(lmm, tokenizer, images, monkeypatch):
    requests = requests_about(images)
    expected = [a.tokens for a in make_engine(lmm, tokenizer, image_mode="anyres").answers(requests)]
    monkeypatch.setattr("tinyllava_fast.infer.scheduling.images.IMAGES_PER_PASS", 2)
    assert [a.tokens for a in make_engine(lmm, tokenizer, image_mode="anyres").answers(requests)] == expected


def test_bad_requests_are_named(engine, images, tmp_path, lmm, tokenizer):
    with pytest.raises(UserError, match=r"'q1': it has 2 images but its text holds 1 <image>"):
        list(engine.run([ask("<image>?", images[:2], id="q1")]))
    with pytest.raises(UserError, match=r"'q2': its text holds <image> but it has no image"):
        list(engine.run([ask("<image>?", [], id="q2")]))
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<image>"}, {"from": "human", "value": "r"}]
    with pytest.raises(UserError, match=r"'q3': an answer holds <image>"):
        list(engine.run([Request(messages=said, image=images[0], id="q3")]))
    with pytest.raises(DataError, match=r"'q4': .*gone.png: image file is missing"):
        list(engine.run([ask("?", [images[0], tmp_path / "gone.png"], id="q4")]))
    anyres = make_engine(lmm, tokenizer, image_mode="anyres")
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(DataError, match=r"'q5': .*bad.png: truncated or not an image"):
        list(anyres.run([ask("?", str(tmp_path / "bad.png"), id="q5")]))


def test_a_file_that_changes_size_is_noticed(lmm, tokenizer, images, tmp_path):
    path = tmp_path / "a.png"
    engine = make_engine(lmm, tokenizer, image_mode="anyres", image_grid=GRID)
    Image.new("RGB", (64, 32)).save(path)
    engine._images.rows(path)
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(DataError, match=r"'q': .*a.png: the size of the image has changed"):
        list(engine.run([ask("?", path, id="q")]))
    assert engine.answers([ask("?", path)])[0].tokens  # the next run looks anew


def test_an_assistant_takes_lists_and_remembers_its_tiles(lmm, tokenizer, images, tmp_path):
    old = lmm.config
    try:
        lmm.config = LMMConfig(**{**old.__dict__, "image_mode": "anyres", "image_grid": GRID})
        save_model(lmm, tokenizer, build_image_processor(tiny_config()), tmp_path / "model")
    finally:
        lmm.config = old
    assert read_config(tmp_path / "model")[0].image_grid == GRID
    assistant = tinyllava_fast.load(tmp_path / "model", device="cpu")
    images[1].save(tmp_path / "b.png")
    files = [images[0], str(tmp_path / "b.png")]
    request = Request.ask("<image> or <image>?", list(images[:2]), sampling=Sampling(max_new_tokens=6))
    expected = make_engine(lmm, tokenizer, image_mode="anyres", image_grid=GRID).answers([request])[0].text
    assert assistant.answer(files, "<image> or <image>?", max_new_tokens=6) == expected
    assert assistant.answer_many([(files, "<image> or <image>?"), (None, "b")], max_new_tokens=6)[0] == expected


def test_a_grid_needs_anyres(lmm, tokenizer):
    with pytest.raises(UserError, match=r"image_grid is for image_mode anyres only; got image_mode='square'"):
        make_engine(lmm, tokenizer, image_grid=GRID)


def test_the_tokenizers_own_template(images):
    """Its end token stops an answer and is no part of the text, though the tokenizer does not call it special."""
    tokenizer, lmm = make_tokenizer(), make_model()
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with torch.no_grad():
        lmm.llm.lm_head.weight[260] = lmm.llm.lm_head.weight[2] * 1.2
    engine = Engine(lmm, tokenizer, build_image_processor(tiny_config()), TEMPLATES.get("tokenizer"), batch_tokens=4096)
    assert 260 in engine.eos and engine.vocab == 261
    config = copy.deepcopy(lmm.llm.config)
    config._attn_implementation = "sdpa"
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    stock.load_state_dict(lmm.llm.state_dict())
    requests = requests_about(images)
    answers = engine.answers(requests)
    assert [a.tokens for a in answers] == [recompute(stock, engine, r) for r in requests]
    ended = [a for a in answers if a.tokens[-1] == 260]
    assert ended and all(a.finish == "eos" and "<|end|>" not in a.text for a in ended)


def test_old_folders_have_no_grid(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("image_grid", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder)[0].image_grid == []
    assert tinyllava_fast.load(folder, device="cpu").engine._images.grid == []

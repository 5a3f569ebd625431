"""A look inside: planted attention is found exactly, any model can be looked into, pages and pictures hold it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tinyllava_fast
from tests.models.test_matrix import TRIPLES, build
from tests.tiny import make_engine, make_model, make_tokenizer, tiny_config
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.look import cli
from tinyllava_fast.look.assistant import Assistant
from tinyllava_fast.look.curves import RANDOM, _area, _order, _replaced
from tinyllava_fast.look.looker import Looker
from tinyllava_fast.look.page import page, payload
from tinyllava_fast.look.types import ATTENTION, FEATURES, METHODS, PIXELS, RELATIVE, ROWS, Look
from tinyllava_fast.models.build import build_image_processor, build_model
from tinyllava_fast.models.io import save_model
from tinyllava_fast.models.lmm import LMM


def look_into(lmm: LMM, config: ModelConfig, image: object, **options: object) -> Look:
    """A look at one or two tokens that the model did not choose itself."""
    mode = options.pop("image_mode", "square")
    processor = build_image_processor(config)
    engine = Engine(lmm, make_tokenizer(), processor, TEMPLATES.get("llama"), image_mode=mode, batch_tokens=4096)
    request = Request.ask("why?", image, sampling=Sampling(max_new_tokens=2))
    return Looker(lmm, engine).look(request, [40, 41], **options)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SIDE = 4  # patches a side of the model below


def interpreted() -> tuple[LMM, ModelConfig]:
    """A model whose every weight has a meaning: the text looks for the bright patch, and the answer is its brightness.

    Width 8. Row 0 of a state: brightness, which only images have; row 1: 1, which only text has; row 2: what was read.
    No layer of the tower, one of the decoder, with one head and no rotation.
    """
    config = ModelConfig(
        llm=LLMConfig(
            config={
                "model_type": "smollm3", "no_rope_layers": [0], "hidden_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8,
                "vocab_size": 272, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
                "pad_token_id": None, "tie_word_embeddings": False,
            }
        ),
        vision=VisionConfig(
            type="siglip", feature_layer=0, feature_select="cls_patch",
            config={
                "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
                "image_size": 8 * SIDE, "patch_size": 8,
            },
        ),
        connector=ConnectorConfig(type="identity"),
    )  # fmt: skip
    lmm = build_model(config, seed=0).eval()
    with torch.no_grad():
        for name, parameter in lmm.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embeddings = lmm.vision.embeddings
        embeddings.patch_embedding.weight[0] = 1 / (3 * 64)
        embeddings.patch_embedding.bias[:2] = torch.tensor([1.0, 0.0])  # black is -1 once normalized
        embeddings.patch_embedding.bias[3] = 0.01  # so that dark rows have a direction
        layer = lmm.llm.model.layers[0].self_attn
        lmm.llm.model.embed_tokens.weight[:, 1] = 1
        layer.q_proj.weight[0, 1] = 100
        layer.k_proj.weight[0, 0] = 100
        layer.v_proj.weight[0, 0] = 1
        layer.o_proj.weight[2, 0] = 1
        lmm.llm.lm_head.weight[40, 2] = 4
        lmm.llm.lm_head.weight[41, 2] = 4
    return lmm, config


@pytest.mark.parametrize("patch", [0, 6, 15])
def test_planted_attention_is_found_exactly(patch: int) -> None:
    lmm, config = interpreted()
    y, x = divmod(patch, SIDE)
    pixels = np.zeros((SIDE * 20, SIDE * 20, 3), np.uint8)
    pixels[y * 20 : (y + 1) * 20, x * 20 : (x + 1) * 20] = 255
    look = look_into(lmm, config, Image.fromarray(pixels), fill=None)
    plant = np.zeros((SIDE, SIDE))
    plant[y, x] = 1
    for token in (None, 0, 1):
        assert np.array_equal(look.maps(ATTENTION, token)[0].raster(SIDE, SIDE), plant)
        for method in (RELATIVE, FEATURES, ROWS, PIXELS):
            assert np.allclose(look.maps(method, token)[0].raster(SIDE, SIDE), plant, atol=1e-6), method
    assert look.tokens[0].shares.image == pytest.approx(1)
    # whatever the neutral question looks at alike is nothing special
    assert np.allclose(look.relative[0][0][0, 0, 0][y, x], 1)


def test_the_first_cells_of_an_order_are_replaced() -> None:
    order = _order([np.array([[0.1, 0.4], [0.3, 0.2]])])
    assert order.tolist() == [1, 2, 3, 0]
    mask = np.zeros(4, bool)
    mask[order[:1]] = True
    (shown,) = _replaced([Image.new("RGB", (4, 2), "white")], [np.zeros((2, 4, 3), np.uint8)], mask, 2)
    assert np.asarray(shown)[..., 0].tolist() == [[255, 255, 0, 0], [255, 255, 255, 255]]
    assert _area(np.array([1.0, 0.0, 0.0]), np.array([0, 0.5, 1])) == pytest.approx(0.25)


def test_what_is_found_is_what_the_engine_computes() -> None:
    engine = make_engine(make_model(), make_tokenizer())
    request = Request.ask("what?", noise(40, 30), sampling=Sampling(max_new_tokens=6, logprobs=3))
    answer = engine.answer(request)
    look = Looker(engine.lmm, engine).look(request, answer.tokens)
    for token, found in zip(look.tokens, answer.logprobs, strict=True):
        assert np.log(token.probability) == pytest.approx(found.logprob, abs=1e-4)
        assert sum(vars(token.shares).values()) == pytest.approx(1, abs=1e-5)
        for method in METHODS:
            assert sum(m.values.sum() for m in token.maps[method]) == pytest.approx(1, abs=1e-4)
    said = [t for t in look.tokens if not t.ends] or look.tokens
    whole = np.prod([t.probability for t in said])
    for curve in look.curves.values():
        assert [curve.deletion[0], curve.insertion[0]] == pytest.approx([whole, curve.deletion[-1]], rel=1e-3)
    assert look.answer == answer.text and len(look.lens.texts) == 3
    assert np.allclose(np.diag(look.similarity), 1, atol=1e-5)


def test_a_look_that_is_too_large_or_no_longer_wanted() -> None:
    engine = make_engine(make_model(), make_tokenizer())
    looker, request = Looker(engine.lmm, engine), Request.ask("what?", noise(40, 30))
    needed = looker.memory(looker.prompts.prompt(request), 2)
    twice = Request.ask("what?", [noise(40, 30), noise(20, 30)])
    assert looker.memory(looker.prompts.prompt(twice), 2) > needed > 0
    assert looker.look(request, [40, 41], fill=None, most_bytes=needed).tokens
    with pytest.raises(UserError, match="show fewer pictures"):
        looker.look(request, [40, 41], most_bytes=needed - 1)
    left = iter([None] * 3)  # the passes that are let through

    def stop() -> None:
        if next(left, "none") == "none":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        looker.look(request, [40, 41], between=stop)
    assert next(left, "none") == "none"


def test_a_second_look_beside_the_engine_has_its_own_weights(folder: Path) -> None:
    assistant = Assistant.from_pretrained(folder, prepare=False)
    assert assistant.looker.lmm is assistant.engine.lmm is not assistant.separate_looker().lmm


def test_the_gradient_map_is_the_gradient() -> None:
    """Against finite differences of the answer's log-probability with the connector's rows."""
    lmm = make_model().double()
    engine = make_engine(lmm, make_tokenizer())
    request = Request.ask("what?", noise(40, 30))
    looker = Looker(lmm, engine)
    look = looker.look(request, [40], fill=None)
    prompt = looker.prompts.prompt(request)
    with torch.no_grad():
        rows = lmm.encode_images(looker.prompts.pixels(prompt.pictures))
        away = rows - rows.mean(1, keepdim=True)

        def log_p(scale: torch.Tensor) -> float:
            embeds = looker.prompts.embeds(prompt, rows + away * scale[None, :, None], [40])
            hidden = lmm.decode(
                embeds, torch.arange(len(embeds)), cu_seqlens=torch.tensor([0, len(embeds)], dtype=torch.int32)
            )
            return float(lmm.logits(hidden[-1:])[0, : looker.vocab].log_softmax(-1)[40])

        step = 2e-2 * torch.eye(rows.shape[1], dtype=torch.float64)
        slopes = np.abs([log_p(s) - log_p(-s) for s in step])
    assert np.allclose(look.maps(ROWS, 0)[0].values.ravel(), slopes / slopes.sum(), atol=2e-3)


@pytest.mark.parametrize(("llm", "tower", "connector"), TRIPLES[:12])
def test_any_model_can_be_looked_into(llm: str, tower: str, connector: str) -> None:
    config, lmm = build(llm, tower, connector)
    lmm.eval()
    vocab = lmm.vocab_size
    engine = Engine(
        lmm, small_tokenizer(vocab), build_image_processor(config), TEMPLATES.get("llama"), batch_tokens=512
    )
    look = Looker(lmm, engine).look(Request.ask("ab", noise(30, 20)), [5, 6], fill=None)
    for method in METHODS:
        (found,) = look.maps(method)
        assert np.isfinite(found.values).all() and found.values.sum() == pytest.approx(1, abs=1e-3)
    assert len(look.heads) == lmm.num_layers == len(look.lens.texts)


def small_tokenizer(vocab: int) -> object:
    """Letters only: the tiny models have 61 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(chr(97 + n) for n in range(vocab - 3))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_several_pictures_tiles_and_padding(mode: str) -> None:
    look = look_into(make_model(), tiny_config(), [noise(60, 30), noise(20, 45, 1)], image_mode=mode, fill="blur")
    assert [p.size for p in look.pictures] == [(60, 30), (20, 45)]
    for method in METHODS:
        maps = look.maps(method)
        assert sum(m.values.sum() for m in maps) == pytest.approx(1, abs=1e-4)
        for found, picture in zip(maps, look.pictures, strict=True):
            assert len(found.values) == len(found.boxes) == (1 if mode == "pad" else len(found.boxes))
            assert 0 < found.mass((0, 0, *picture.size)) < 1
    assert len(look.centers) == len(look.similarity)
    assert {p for p, _, _ in look.centers} == {0, 1}
    assert set(look.curves) == {*METHODS, RANDOM}


def test_the_page_holds_everything_and_nothing_from_outside() -> None:
    look = look_into(make_model(), tiny_config(), noise(60, 30))
    text = page(look, [("model", "a </script> b")])
    data = json.loads(re.search(r'id="look-data">(.*?)</script>', text, re.DOTALL)[1])
    assert [t["text"] for t in data["tokens"]] == [t.text for t in look.tokens]
    assert {m["name"] for m in data["methods"]} == set(METHODS) == set(data["curves"]["maps"])
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text.replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert len(data["layers"][RELATIVE]) == 3 and data["layers"][ATTENTION][0]["heads"] == 4
    assert payload(look)["pictures"][0]["boxes"] == [(0.0, 0.0, 60.0, 30.0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "final"
    save_model(make_model(), make_tokenizer(), build_image_processor(tiny_config()), path)
    return path


def test_command_and_api(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(30, 20).save(tmp_path / "a.png")
    asked = [str(folder), str(tmp_path / "a.png"), "what?", "--max-new-tokens", "3", "--fill", "none"]
    assert cli.main([*asked, "--output", str(tmp_path / "o" / "l.html"), "--png", str(tmp_path / "png")]) == 0
    said = capsys.readouterr().out
    assert "showLook" in (tmp_path / "o" / "l.html").read_text()
    assert {f"answer_{m}.png" for m in METHODS} < {p.name for p in (tmp_path / "png").iterdir()}

    assistant = tinyllava_fast.load(folder)
    assert isinstance(assistant, Assistant) and assistant.engine.model.ready
    look = assistant.look(tmp_path / "a.png", "what?", max_new_tokens=3, fill=None)
    assert look.answer == said.strip() == assistant.answer(tmp_path / "a.png", "what?", max_new_tokens=3)
    with pytest.raises(UserError, match="no picture to look at"):
        assistant.look([], "what?")
    assert cli.main([str(folder), str(tmp_path / "missing.png"), "what?"]) == 2
    with pytest.raises(UserError, match="plain weights are dense"):
        Assistant.from_pretrained(folder, prepare=False, weights="int8")

"""An adapter for each request: answers equal those of the model merged with it, whatever runs beside."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tinyllava_fast
from tests.infer.test_engine import QUESTIONS, ask
from tests.infer.test_families import make
from tests.lora import write_adapter
from tests.tiny import make_engine, make_model, tiny_config
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.adapted_linear import MIXED_ROWS, AdaptedLinear
from tinyllava_fast.infer.fast_model.prepare import prepare_model
from tinyllava_fast.infer.finish import FAILED
from tinyllava_fast.infer.live import LiveEngine, StoppedError
from tinyllava_fast.infer.types import Request
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model
from tinyllava_fast.models.lmm import LMM

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"r": 2, "lora_alpha": 3},
    {"ends": ("q_proj", "v_proj", "qkv_proj", "dense")},
    {"r": 8, "use_rslora": True},
    {"ends": ("k_proj", "down_proj", "proj_2", "fc2", "out_proj")},
    {"rank_pattern": {"q_proj": 1, "fc1": 6}, "alpha_pattern": {"v_proj": 1.5}},
    {"ends": ("gate_proj", "up_proj", "proj_1", "fc1", "o_proj")},
    {"r": 3},
)
NAMES = [f"kind {number}" for number in range(len(KINDS))]


@pytest.fixture(scope="module")
def adapted(lmm: LMM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, LMM]]:
    """Eight folders by name, and the models merged with them."""
    return adapters_of(lmm, tmp_path_factory.mktemp("adapters"))


def adapters_of(lmm: LMM, folder: Path) -> dict[str, tuple[Path, LMM]]:
    return {
        name: (folder / name, write_adapter(lmm, folder / name, seed=number, **kind))
        for number, (name, kind) in enumerate(zip(NAMES, KINDS, strict=True))
    }


def loaded(engine: Engine, adapted: dict[str, tuple[Path, LMM]]) -> Engine:
    for name, (folder, _) in adapted.items():
        engine.load_adapter(name, folder)
    return engine


def mixed(images: list[Any], names: list[str | None], new: int = 8) -> list[Request]:
    """Each question of each adapter, about the same images and none, in an order that puts adapters side by side."""
    return [
        replace(ask(question, image, new=new + number), adapter=name)
        for number, question in enumerate(QUESTIONS[:3])
        for image in (images[0], None)
        for name in names
    ]


def alone(requests: list[Request], base: LMM, adapted: dict[str, tuple[Path, LMM]], tokenizer: Any) -> list[list[int]]:
    """Tokens of each request by the model merged with its adapter."""
    engines = {name: make_engine(model, tokenizer) for name, (_, model) in adapted.items()}
    plain = make_engine(base, tokenizer)
    return [
        (engines[r.adapter] if r.adapter else plain).answers([replace(r, adapter=None)])[0].tokens for r in requests
    ]


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "as it is"])
def test_eight_together_equal_each_merged(lmm, tokenizer, images, adapted, prepared):
    requests = mixed(images, [None, *adapted])
    expected = alone(requests, lmm, adapted, tokenizer)
    assert len({tuple(tokens) for tokens in expected}) > len(expected) // 2  # each adapter matters
    model = copy.deepcopy(lmm)
    engine = loaded(make_engine(prepare_model(model) if prepared else model, tokenizer), adapted)
    assert [a.tokens for a in engine.answers(requests)] == expected
    # one by one, with what earlier requests of the same and of other adapters left in the pool
    for _ in range(2):
        assert [engine.answer(r).tokens for r in requests] == expected
    assert engine.counters.reused_tokens > 0
    # few adapters beside many, and more rows than mixed products take
    few = [r for r in requests if r.adapter in (None, "kind 0", "kind 3")]
    assert [a.tokens for a in engine.answers(few)] == [t for r, t in zip(requests, expected, strict=True) if r in few]
    assert len(requests) < MIXED_ROWS
    many = requests * 2
    assert [a.tokens for a in engine.answers(many)] == expected * 2


def test_two_that_change_different_layers(lmm, tokenizer, images, tmp_path):
    """Each layer then has one adapter of its own, beside rows of another."""
    ends = {"attention": ("q_proj", "v_proj"), "mlp": ("down_proj", "up_proj")}
    adapted = {
        name: (tmp_path / name, write_adapter(lmm, tmp_path / name, seed=seed, ends=some))
        for seed, (name, some) in enumerate(ends.items())
    }
    requests = mixed(images, [None, *adapted])
    for prepared in (True, False):
        model = copy.deepcopy(lmm)
        engine = loaded(make_engine(prepare_model(model) if prepared else model, tokenizer), adapted)
        assert [a.tokens for a in engine.answers(requests)] == alone(requests, lmm, adapted, tokenizer)


@pytest.mark.parametrize("family", ["phi", "qwen3", "openelm", "gemma2"])
def test_other_families(family, tokenizer, images, tmp_path):
    base = make(family)
    adapted = adapters_of(base, tmp_path)
    requests = mixed(images, [None, *adapted], new=4)
    engine = loaded(make_engine(prepare_model(copy.deepcopy(base)), tokenizer), adapted)
    assert [a.tokens for a in engine.answers(requests)] == alone(requests, base, adapted, tokenizer)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_beside_quantized_weights(lmm, tokenizer, images, adapted, weights):
    """The base alone is quantized: hidden states are those of its dequantized weights with the adapter merged."""
    engine = loaded(make_engine(prepare_model(copy.deepcopy(lmm), weights), tokenizer), adapted)
    requests = mixed(images, [None, *adapted])
    answers = engine.answers(requests)
    assert all(a.finish in ("eos", "length") for a in answers)
    assert [a.tokens for a in answers] == [engine.answer(r).tokens for r in requests]
    assert len({tuple(a.tokens) for a in answers}) > len(requests) // 2


def test_bfloat16(tokenizer, images, tmp_path):
    base = make_model()
    adapted = adapters_of(base, tmp_path)
    engine = loaded(make_engine(prepare_model(base.to(torch.bfloat16)), tokenizer), adapted)
    answers = engine.answers(mixed(images, [None, *adapted]))
    assert all(a.finish in ("eos", "length") for a in answers)


def test_scores(lmm, tokenizer, images, adapted):
    engine = loaded(make_engine(prepare_model(copy.deepcopy(lmm)), tokenizer), adapted)
    question, options = ask("red or blue?", images[0]), ["red", "blue", "a"]
    for scores in engine.score([(replace(question, id=n, adapter=n), options) for n in NAMES[:3]]):
        (expected,) = make_engine(adapted[scores.id][1], tokenizer).score([(question, options)])
        assert scores.sums == pytest.approx(expected.sums, abs=1e-3)


def test_without_adapters_nothing_changes(lmm, tokenizer, images, adapted):
    """Requests without one run as before, in one call a step, and the model is as it was once all are unloaded."""
    model = copy.deepcopy(lmm)
    engine = make_engine(prepare_model(model), tokenizer)
    before = [type(module) for module in model.modules()]
    requests = mixed(images, [None])
    expected = [a.tokens for a in engine.answers(requests)]
    loaded(engine, adapted)
    assert any(isinstance(module, AdaptedLinear) for module in model.modules())
    taken: list[bool] = []
    fused = engine._decoder._fused
    assert fused is not None
    engine._decoder._fused = lambda rows: taken.append(True) or fused(rows)  # type: ignore[assignment]
    engine._decoder._fused.look_again = fused.look_again  # type: ignore[attr-defined]
    assert [a.tokens for a in engine.answers(requests)] == expected and taken
    engine._decoder._fused = fused
    for name in adapted:
        engine.unload_adapter(name)
    assert [type(module) for module in model.modules()] == before
    assert [a.tokens for a in engine.answers(requests)] == expected


def test_names(lmm, tokenizer, adapted):
    engine = make_engine(copy.deepcopy(lmm), tokenizer)
    first, second = (folder for folder, _ in list(adapted.values())[:2])
    engine.load_adapter("red", first)
    for name in ("red", ""):
        with pytest.raises(UserError, match="empty or taken"):
            engine.load_adapter(name, second)
    with pytest.raises(UserError, match="request 'a': adapter 'rad' is not loaded; did you mean 'red'"):
        engine.answers([replace(ask("why", id="a"), adapter="rad")])
    with pytest.raises(UserError, match="'blue' is not loaded"):
        engine.unload_adapter("blue")
    request = replace(ask("why", new=20, id="a", eos_token_id=()), adapter="red")
    engine.add_request(request)
    engine.step()
    with pytest.raises(UserError, match="1 requests in flight use it"):
        engine.unload_adapter("red")
    (red,) = engine.step() if engine.unfinished == 0 else [a for _ in range(30) for a in engine.step()]
    engine.unload_adapter("red")
    # one that was prepared before the adapter went
    engine.load_adapter("red", first)
    late = engine.preparer()(replace(request, id="late"))
    engine.unload_adapter("red")
    engine.add(late)
    (answer,) = engine.step()
    assert answer.finish == "refused" and "was unloaded" in answer.why
    # the same name is another adapter now, and takes nothing that the first one computed
    engine.load_adapter("red", second)
    other = engine.answer(request)
    assert other.cached_tokens == 0
    assert other.tokens == make_engine(adapted[NAMES[1]][1], tokenizer).answer(replace(request, adapter=None)).tokens
    assert other.tokens != red.tokens


def test_live(lmm, tokenizer, images, adapted):
    live = LiveEngine(make_engine(prepare_model(copy.deepcopy(lmm)), tokenizer))
    try:
        plain = live.submit(ask("say more", new=60, eos_token_id=()))
        for name, (folder, _) in adapted.items():
            live.load_adapter(name, folder)
        requests = mixed(images, [None, *adapted])
        streams = [live.submit(r) for r in requests]
        expected = alone(requests, lmm, adapted, tokenizer)
        assert [stream.result(60).tokens for stream in streams] == expected
        assert plain.result(60).tokens == make_engine(lmm, tokenizer).answer(plain.request).tokens
        assert "is not loaded" in live.submit(replace(requests[0], adapter="none")).result(60).why
        live.unload_adapter(NAMES[0])
        with pytest.raises(UserError, match="is not loaded"):
            live.unload_adapter(NAMES[0])
    finally:
        live.close()
    with pytest.raises(StoppedError):
        live.load_adapter("late", adapted[NAMES[0]][0])


def test_one_whose_numbers_overflow_fails_alone(lmm, tokenizer, images, tmp_path):
    """Its requests are told so; the others of the passes are answered as without it, with guesses and scores, too."""
    write_adapter(lmm, tmp_path / "good", seed=1)
    write_adapter(lmm, tmp_path / "wild", seed=2, size=1e25)
    requests = [replace(r, id=str(n)) for n, r in enumerate(mixed(images, [None, "wild", "good"]))]
    others = [r for r in requests if r.adapter != "wild"]
    for prepared, options in ((True, {"speculate": 4}), (False, {})):
        model = copy.deepcopy(lmm)
        engine = make_engine(prepare_model(model) if prepared else model, tokenizer, **options)
        for name in ("good", "wild"):
            engine.load_adapter(name, tmp_path / name)
        expected = {a.id: a for a in engine.answers(others)}
        for request in requests:
            engine.add_request(request)
        found = {}
        while engine.unfinished:
            found |= {a.id: a for a in engine.step()}
        assert {name: found[name] for name in expected} == expected
        wild = [found[r.id] for r in requests if r.adapter == "wild"]
        assert all(a.finish == FAILED and "the numbers of adapter 'wild' overflow" in a.why for a in wild)
        assert engine.usage.running == engine.usage.waiting == 0
        with pytest.raises(CheckpointError, match="request 'x': the numbers of adapter 'wild' overflow"):
            list(engine.score([(replace(ask("red?"), id="x", adapter="wild"), ["a", "b"])]))


def settings(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return damage


FIRST = "base_model.model.llm.model.layers.0.self_attn.q_proj.lora_"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors.*not exist"),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10"), "damaged or truncated"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json"),
    "another kind": (settings(peft_type="IA3"), "only LORA is supported"),
    "dora": (settings(use_dora=True), "use_dora is True; only plain LoRA"),
    "modules": (settings(modules_to_save=["embed"]), "modules_to_save"),
    "biases": (settings(bias="all"), "bias is 'all'"),
    "no rank": (settings(r=0), r"adapter_config\.json.*r"),
    "not finite": (tensors(lambda t: t[f"{FIRST}B.weight"].fill_(torch.nan)), "q_proj: its numbers are not finite"),
    "one half": (tensors(lambda t: t.pop(f"{FIRST}B.weight")), "has only lora_A"),
    "ranks": (tensors(lambda t: t.update({f"{FIRST}B.weight": torch.ones(48, 3)})), "do not multiply"),
    "another layer": (tensors(lambda t: t.update({"llm.layers.9.x.lora_A.weight": torch.ones(1, 1)})), r"layers\.9"),
    "connector": (
        tensors(lambda t: t.update({"base_model.model.connector.net.0.lora_A.weight": torch.ones(1, 1)})),
        r"connector\.net\.0, a layer of the connector; .*tlf-convert merge",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_folders_are_refused_by_name(lmm, tokenizer, tmp_path, damage):
    write_adapter(lmm, tmp_path / "bad", seed=0)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "bad")
    engine = make_engine(copy.deepcopy(lmm), tokenizer)
    with pytest.raises(CheckpointError, match=message) as error:
        engine.load_adapter("bad", tmp_path / "bad")
    assert str(tmp_path / "bad") in str(error.value)
    assert not engine.adapters.names and not any(isinstance(m, AdaptedLinear) for m in engine.lmm.modules())


def test_another_model_and_no_folder(lmm, tokenizer, tmp_path):
    write_adapter(make_model(hidden_size=64, intermediate_size=80), tmp_path / "other", seed=0)
    write_adapter(lmm, tmp_path / "tower", seed=0, component="vision")
    engine = make_engine(copy.deepcopy(lmm), tokenizer)
    with pytest.raises(CheckpointError, match=r"down_proj: it is for a layer of \[64, 80\], the model's is \[48, 96\]"):
        engine.load_adapter("other", tmp_path / "other")
    with pytest.raises(CheckpointError, match="a layer of the vision tower"):
        engine.load_adapter("tower", tmp_path / "tower")
    with pytest.raises(CheckpointError, match="no such folder"):
        engine.load_adapter("none", tmp_path / "none")


def test_what_trained_beside_an_adapter_is_refused(lmm, tokenizer, tmp_path):
    """A model folder whose connector is not the base's, and one whose adapter alone is its own."""
    for name, part in (("same", None), ("connector", "connector"), ("norms", "llm.model.norm")):
        trained = copy.deepcopy(lmm)
        folder = tmp_path / name
        write_adapter(lmm, tmp_path / "adapter", seed=0)
        if part is not None:
            weight = next(trained.get_submodule(part).parameters())
            weight.data += 0.01
        save_model(trained, tokenizer, build_image_processor(tiny_config()), folder)
        shutil.move(tmp_path / "adapter", folder / "adapter")
    for prepared in (False, True):
        model = copy.deepcopy(lmm)
        engine = make_engine(prepare_model(model) if prepared else model, tokenizer)
        engine.load_adapter("same", tmp_path / "same")
        engine.load_adapter("inside", tmp_path / "same" / "adapter")
        for name, said in (("connector", r"connector\.\S+"), ("norms", r"llm\.model\.norm\.weight")):
            with pytest.raises(CheckpointError, match=rf"{said} is not the base model's"):
                engine.load_adapter(name, tmp_path / name)


@pytest.mark.parametrize("weights", [None, "nf4"])
def test_one_added_to_the_weights(folder, tokenizer, images, adapted, weights):
    """What tlf-chat and tlf-eval do with an adapter."""
    assistant = tinyllava_fast.load(folder, device="cpu", adapter=adapted[NAMES[0]][0], weights=weights)
    expected = make_engine(prepare_model(copy.deepcopy(adapted[NAMES[0]][1]), weights), tokenizer)
    requests = mixed(images, [None])
    assert [a.tokens for a in assistant.engine.answers(requests)] == [a.tokens for a in expected.answers(requests)]

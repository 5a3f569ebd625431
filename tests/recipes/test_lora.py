"""LoRA: peft's own layers and numbers; exactly the adapter trains; continuing, merging, and what is refused."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tinyllava_fast.config.schema import EngineConfig, LoRAConfig, OptimConfig, RecipeConfig, TuneConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models import adapter
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import apply_recipe, check_engine

FROZEN, FULL = TuneConfig(tune="frozen"), TuneConfig(tune="full")
LLM = RecipeConfig(llm=TuneConfig(tune="lora", lora=LoRAConfig(r=4, alpha=8, dropout=0.0)), connector=FROZEN)


def lora(**settings: Any) -> TuneConfig:
    return TuneConfig(tune="lora", lora=LoRAConfig(**{"r": 4, "alpha": 8, "dropout": 0.0, **settings}))


def with_llm(**settings: Any) -> RecipeConfig:
    return RecipeConfig(llm=lora(**settings), connector=FROZEN)


def noise(lmm: LMM, seed: int = 5) -> None:
    """B starts at zero; give every adapter something to say."""
    rng = torch.Generator().manual_seed(seed)
    for _, layer in adapter.layers(lmm):
        for parameter in adapter.parameters_of(layer):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)


KINDS = {
    "frozen": FROZEN,
    "full": FULL,
    "lora": lora(),
    "qlora": TuneConfig(tune="qlora", lora=LoRAConfig(r=4, alpha=8, dropout=0.0), quant="int8"),
    "partial": TuneConfig(tune="partial", from_layer=1),
}
COMBINATIONS = [
    kinds for kinds in itertools.product(KINDS, KINDS, [k for k in KINDS if k != "partial"]) if set(kinds) != {"frozen"}
]


def expected(lmm: LMM, component: str, kind: str) -> set[str]:
    names = {f"{component}.{n}" for n, _ in getattr(lmm, component).named_parameters()}
    match kind:
        case "full":
            return names
        case "partial":
            prefix = {"llm": "llm.model.layers.1.", "vision": "vision.encoder.layers.1."}[component]
            return {n for n in names if n.startswith(prefix)}
        case "lora" | "qlora":
            return {n for n in names if ".lora_A." in n or ".lora_B." in n}
    return set()


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_exactly_the_recipes_parameters_move(
    kinds: tuple[str, ...], make_lmm: Callable[..., LMM], train_steps: Callable[..., list[float]]
) -> None:
    lmm = make_lmm(attention_bias=False)
    llm, vision, connector = kinds
    recipe = RecipeConfig(llm=KINDS[llm], vision=KINDS[vision], connector=KINDS[connector])
    groups = apply_recipe(lmm, recipe, OptimConfig(lr=1e-2, weight_decay=0.1))
    if any("lora" in kind for kind in kinds):
        noise(lmm)
    before = {n: p.detach().clone() for n, p in lmm.named_parameters()}
    train_steps(lmm, groups)
    moved = {n for n, p in lmm.named_parameters() if not torch.equal(p, before[n])}
    wanted = set().union(*(expected(lmm, c, k) for c, k in zip(("llm", "vision", "connector"), kinds, strict=True)))
    constant = {n for n in wanted if n.endswith("k_proj.bias")}  # adds one number to all scores of a query
    assert moved - constant == wanted - constant and wanted
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in lmm.parameters())


def test_default_targets_are_all_linear_layers_but_the_head(make_lmm: Callable[..., LMM]) -> None:
    lmm = make_lmm()
    linear = {n for n, m in lmm.named_modules() if isinstance(m, nn.Linear)}
    apply_recipe(lmm, RecipeConfig(llm=lora(), vision=lora(), connector=lora()), OptimConfig())
    assert {n for n, _ in adapter.layers(lmm)} == linear - {"llm.lm_head"}
    assert all(type(layer) is peft.tuners.lora.layer.Linear for _, layer in adapter.layers(lmm))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"rslora": True},
    {"dora": True},
    {"target_modules": ["q_proj", "v_proj"]},
    {"rank_pattern": {"q_proj": 2, r"layers\.0\..*down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_pefts_own_model(
    settings: dict[str, Any], make_lmm: Callable[..., LMM], batch: dict[str, Tensor]
) -> None:
    ours, theirs = make_lmm(), make_lmm()
    apply_recipe(ours, with_llm(**settings), OptimConfig(), seed=3)
    names = {"rslora": "use_rslora", "dora": "use_dora"}
    targets = settings.get("target_modules") or [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=targets,
        exclude_modules=r"vision\..*",
        **{names.get(k, k): v for k, v in settings.items() if k != "target_modules"},
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(theirs, config)
    expected_names = [n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == expected_names
    noise(ours)
    theirs.config = replace(theirs.config, has_lora=True)
    noise(theirs)
    loss, reference = ours(**batch), model(**batch)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    loss.backward()
    reference.backward()
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_merging_equals_the_live_adapter(
    settings: dict[str, Any], make_lmm: Callable[..., LMM], batch: dict[str, Tensor]
) -> None:
    lmm = make_lmm().eval()
    names = [n for n, _ in lmm.named_parameters()]
    apply_recipe(lmm, with_llm(**settings), OptimConfig())
    noise(lmm)
    live = lmm(**batch)
    adapter.merge(lmm)
    assert [n for n, _ in lmm.named_parameters()] == names and not lmm.config.has_lora
    torch.testing.assert_close(lmm(**batch), live, rtol=1e-6, atol=1e-6)


def test_merging_sums_in_float32(make_lmm: Callable[..., LMM]) -> None:
    lmm = make_lmm()
    apply_recipe(lmm, LLM, OptimConfig())
    noise(lmm)
    name, layer = next(adapter.layers(lmm))
    lmm.to(torch.bfloat16)
    low = {k: v.clone() for k, v in layer.state_dict().items()}
    exact = low["base_layer.weight"].float() + 2.0 * (
        low["lora_B.default.weight"].float() @ low["lora_A.default.weight"].float()
    )
    adapter.merge(lmm)
    assert torch.equal(lmm.get_submodule(name).weight, exact.bfloat16())


def test_biases(make_lmm: Callable[..., LMM]) -> None:
    for bias, ends in (("none", ()), ("lora_only", ("q_proj.base_layer.bias",)), ("all", ("bias",))):
        lmm = make_lmm()
        apply_recipe(lmm, with_llm(target_modules=["q_proj"], bias=bias), OptimConfig())
        trains = {n for n, p in lmm.named_parameters() if p.requires_grad and "lora_" not in n}
        assert trains == {n for n, _ in lmm.named_parameters() if n.startswith("llm.") and ends and n.endswith(ends)}
        assert bool(trains) == bool(ends)


def test_each_component_has_its_own_settings(make_lmm: Callable[..., LMM]) -> None:
    lmm = make_lmm()
    vision = TuneConfig(tune="lora", lr=5e-4, lora=LoRAConfig(r=2, alpha=4, dropout=0.5, target_modules=["q_proj"]))
    groups = apply_recipe(lmm, RecipeConfig(llm=lora(), vision=vision, connector=FULL), OptimConfig(lr=1e-3))
    found = dict(adapter.layers(lmm))
    assert found["vision.encoder.layers.0.self_attn.q_proj"].r["default"] == 2
    assert found["llm.model.layers.0.self_attn.q_proj"].r["default"] == 4
    assert isinstance(found["vision.encoder.layers.1.self_attn.q_proj"].lora_dropout["default"], nn.Dropout)
    assert isinstance(found["llm.model.layers.1.mlp.up_proj"].lora_dropout["default"], nn.Identity)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert rates == {"vision": (5e-4, 0), "connector": (1e-3, 0), "connector.no_decay": (1e-3, 0), "llm": (1e-3, 0)}


def test_the_same_recipe_continues_and_another_one_merges(
    make_lmm: Callable[..., LMM],
    batch: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    lmm = make_lmm().eval()
    apply_recipe(lmm, LLM, OptimConfig())
    noise(lmm)
    before, trained = lmm(**batch), {k: v.clone() for k, v in lmm.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="tinyllava_fast"):
        apply_recipe(lmm, with_llm(dropout=0.3), OptimConfig(), seed=7)
    assert all(torch.equal(v, trained[k]) for k, v in lmm.state_dict().items())
    assert any("going on with the adapter" in m for m in caplog.messages)
    for recipe in (with_llm(r=3), with_llm(alpha=9), RecipeConfig()):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tinyllava_fast"):
            apply_recipe(lmm, recipe, OptimConfig(), seed=7)
        assert any("merging the adapter" in m for m in caplog.messages)
        torch.testing.assert_close(lmm(**batch), before, rtol=1e-6, atol=1e-6)
        if lmm.config.has_lora:
            noise(lmm)
            before = lmm(**batch)
    assert not any("lora" in n for n, _ in lmm.named_parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_fullgraph_and_gradient_checkpointing(
    dora: bool, make_lmm: Callable[..., LMM], batch: dict[str, Tensor]
) -> None:
    grads = []
    ways = ("eager", "checkpointed") if dora else ("eager", "checkpointed", "compiled")
    for way in ways:
        lmm = make_lmm(num_hidden_layers=1)
        recipe = RecipeConfig(
            llm=lora(target_modules=["q_proj"], dora=dora), vision=lora(target_modules=["fc1"], dora=dora)
        )
        apply_recipe(lmm, recipe, OptimConfig())
        noise(lmm)
        lmm.set_gradient_checkpointing(way == "checkpointed")
        compiled = torch.compile(lmm.forward, fullgraph=True, dynamic=False, backend="aot_eager")
        (compiled if way == "compiled" else lmm)(**batch).backward()
        grads.append({n: p.grad for n, p in lmm.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, msg=lambda m, n=name: f"{n}: {m}")


def test_engines_that_dora_does_not_work_in() -> None:
    recipe = with_llm(dora=True)
    with pytest.raises(UserError, match=r"stages\.x\.recipe\.llm\.lora\.dora: .*engine\.compile"):
        check_engine(recipe, EngineConfig(compile=True), "stages.x")
    with pytest.raises(UserError, match=r"stages\.x\.recipe\.llm\.lora\.dora: .*zero_stage: 3"):
        check_engine(recipe, EngineConfig(type="deepspeed", zero_stage=3), "stages.x")
    check_engine(LLM, EngineConfig(type="deepspeed", zero_stage=3, compile=True), "stages.x")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (with_llm(target_modules=["q_prj"]), r"target_modules: no linear layer .* 'q_prj'; did you mean 'q_proj'"),
        (with_llm(target_modules=["lm_head"]), r"target_modules: 'lm_head' is llm\.lm_head, whose weight is read"),
        (with_llm(target_modules=["embed_tokens"]), r"'embed_tokens' is llm\.model\.embed_tokens, a Embedding"),
        (with_llm(target_modules=[]), r"target_modules: empty"),
        (with_llm(rank_pattern={"(": 2}), r"rank_pattern: '\(' is no regular expression"),
        (with_llm(rank_pattern={"fc9": 2}), r"rank_pattern: 'fc9' matches no adapted layer"),
        (with_llm(target_modules=["q_proj"], alpha_pattern={"v_proj": 2}), r"alpha_pattern: 'v_proj' matches no"),
        (
            RecipeConfig(llm=lora(dora=True), vision=lora()),
            r"llm\.lora\.dora: True, but recipe\.vision\.lora\.dora",
        ),
        (
            RecipeConfig(llm=TuneConfig(lora=LoRAConfig(r=8))),
            r"llm\.lora: set, but recipe\.llm\.tune is 'full'",
        ),
        (RecipeConfig(llm=TuneConfig(quant="int8")), r"recipe\.llm\.quant: set, .* set tune: qlora"),
        (RecipeConfig(vision=TuneConfig(tune="frozen", from_layer=2)), r"recipe\.vision\.from_layer: set, .*partial"),
    ],
)
def test_errors(recipe: RecipeConfig, message: str, make_lmm: Callable[..., LMM]) -> None:
    with pytest.raises(UserError, match=message):
        apply_recipe(make_lmm(), recipe, OptimConfig())


def test_peft_that_is_not_installed(make_lmm: Callable[..., LMM], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"LoRA needs peft, .*tinyllava-fast\[train\]"):
        apply_recipe(make_lmm(), LLM, OptimConfig())

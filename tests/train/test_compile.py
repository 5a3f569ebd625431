import pytest
import torch
from torch import nn

from tests.models.llm.families import CONFIGS
from tests.train.conftest import LLAMA, SIGLIP
from tinyllava_fast.config.schema import (
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    RecipeConfig,
    TuneConfig,
    VisionConfig,
)
from tinyllava_fast.models.build import build_model
from tinyllava_fast.ops import _policy
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train import compile as compiling
from tinyllava_fast.train import timings
from tinyllava_fast.train.compile import CompiledForward, repays


class Net(nn.Module):
    """A stand-in with one input that LMM.forward has too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.factor = 2

    def forward(self, pixel_values):
        return (self.layer(pixel_values) * self.factor).sum()


FROZEN = TuneConfig(tune="frozen")
LORA = {"tune": "lora", "lora": LoRAConfig(r=4, alpha=8, dropout=0.0)}


def make_lmm(tower=None, **llm):
    """Widths are multiples of 64, as nf4 on a CPU needs."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 61}
    vision = VisionConfig(**(tower or {"config": {**SIGLIP, "num_hidden_layers": 4}}))
    return build_model(ModelConfig(llm=LLMConfig(config={**LLAMA, **wide, **llm}), vision=vision), seed=0)


def make_batch(seed=1, images=1):
    """Two segments, the first with an image; twenty positions."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.full((20,), -100)
    labels[6:9] = labels[11:14] = torch.tensor([5, 6, 7])
    return {
        "input_ids": torch.randint(3, 61, (20,), generator=rng),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(10), torch.arange(6), torch.arange(4)]),
        "cu_seqlens": torch.tensor([0, 10, 16, 16], dtype=torch.int32),
        "image_slots": torch.arange(1, 1 + 4 * images),
        "supervised": torch.tensor([6, 7, 8, 11, 12, 13] + [20] * 14),
        "pixel_values": torch.randn(images, 3, 16, 16, generator=rng),
    }


def gradients(lmm, batch):
    """The loss and what it gives every parameter."""
    lmm.zero_grad()
    loss = lmm(**batch)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in lmm.named_parameters() if p.grad is not None}}


def check_regions(lmm, backend="aot_eager"):
    """Two steps in compiled layers equal eager steps and make no graph the second time; returns how many were made."""
    steps = [make_batch(seed) for seed in (1, 2)]
    eager = [gradients(lmm, step) for step in steps]
    compiled = CompiledForward(lmm, layers=lmm.layers, backend=backend)
    for step, want in zip(steps, eager, strict=True):
        got = gradients(lmm, step)
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert compiled.recompiles == 0 and compiled.seconds > 0
    compiled.close()
    return compiled.graphs


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch.compiler.reset()


def test_one_graph_a_shape_and_names_untouched(caplog):
    net = Net()
    expected = net(torch.ones(4, 3))
    names = list(net.state_dict())
    compiled = CompiledForward(net, backend="eager")
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        for rows in (4, 4, 2, 4, 2):
            net(pixel_values=torch.ones(rows, 3))
    torch.testing.assert_close(net(pixel_values=torch.ones(4, 3)), expected)
    assert (compiled.graphs, compiled.recompiles) == (2, 0) and compiled.seconds > 0
    assert list(net.state_dict()) == names
    compiled.close()
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 and messages[0].startswith("compiled forward graph 1 (4 images)")


def test_packs_with_other_numbers_of_supervised_slots_share_a_graph():
    """As PackedBatch.to leaves them on a GPU."""
    lmm, batch = make_lmm(num_hidden_layers=1), make_batch()
    want = gradients(lmm, batch)
    compiled = CompiledForward(lmm, backend="aot_eager")
    for slots in (6, 9, 15):
        got = gradients(lmm, {**batch, "supervised": batch["supervised"][:slots]})
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-4, msg=name)
    assert (compiled.graphs, compiled.recompiles) == (1, 0)
    compiled.close()


def test_a_recompile_is_an_error_line_with_the_reason(caplog):
    net = Net()
    compiled = CompiledForward(net, backend="eager")
    net(pixel_values=torch.ones(4, 3))
    net.factor = 3
    net(pixel_values=torch.ones(4, 3))
    assert compiled.recompiles == 1
    (error,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "recompiled a known shape" in error and "factor" in error


def test_a_graph_break_is_an_error():
    class Breaks(Net):
        def forward(self, pixel_values):
            if pixel_values.sum().item() > 0:
                return self.layer(pixel_values).sum()
            return pixel_values.sum()

    net = Breaks()
    CompiledForward(net, backend="eager")
    with pytest.raises(Exception, match=r"(?i)data-dependent|item"):
        net(pixel_values=torch.ones(4, 3))


@pytest.mark.parametrize("depth", [1, 5])
def test_regions_do_not_grow_with_depth(depth, caplog):
    lmm = make_lmm(num_hidden_layers=depth)
    names = list(lmm.state_dict())
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        assert check_regions(lmm) == 2  # the tower's and the decoder's
    assert f"compiled 2 kinds of {3 + depth} layers (1 images)" in caplog.text
    assert list(lmm.state_dict()) == names


@pytest.mark.parametrize(("checkpointing", "graphs"), [(True, 2), ("selective", 3)])
def test_regions_recompute(checkpointing, graphs):
    lmm = make_lmm(num_hidden_layers=4)
    lmm.set_gradient_checkpointing(checkpointing)
    assert check_regions(lmm) == graphs


@pytest.mark.no_cover  # torch's compiler under coverage takes several times as long
@pytest.mark.parametrize(
    ("recipe", "graphs"),
    [
        ({"llm": FROZEN, "vision": FROZEN}, 2),
        ({"vision": TuneConfig(tune="partial", from_layer=1)}, 4),  # of the tower: frozen, first to learn, others
        ({"llm": TuneConfig(**LORA), "vision": FROZEN, "connector": FROZEN}, 3),  # no gradient into the first layer
        ({"llm": TuneConfig(**LORA), "vision": TuneConfig(**LORA)}, 3),  # nor into the tower's
        ({"llm": TuneConfig(**LORA | {"tune": "qlora"}, quant="nf4"), "vision": FROZEN}, 2),
    ],
)
def test_regions_of_every_recipe(recipe, graphs):
    lmm = make_lmm(num_hidden_layers=4)
    apply_recipe(lmm, RecipeConfig(**recipe), OptimConfig())
    assert check_regions(lmm) == graphs


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("family", "kinds"), [("gemma2", 2), ("qwen2", 2), ("auto", 2), ("phi", 1), ("stablelm", 1), ("openelm", 4)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_differ_are_kinds_of_their_own(family, kinds, checkpointing):
    """Windows of every second layer, layers without rotation, and a width for each layer."""
    config = CONFIGS[family]
    model_type = config.get("model_type", family)
    depth = "num_transformer_layers" if family == "openelm" else "num_hidden_layers"
    llm = LLMConfig(type=family, config={**config, "model_type": model_type, depth: 4})
    if family == "auto":
        llm.config["no_rope_layers"] = [1, 0, 1, 0]
    lmm = build_model(ModelConfig(llm=llm, vision=VisionConfig(config=SIGLIP)), seed=0)
    lmm.set_gradient_checkpointing(checkpointing)
    assert check_regions(lmm) == 1 + kinds


def test_regions_of_two_towers():
    clip = {**SIGLIP, "num_hidden_layers": 3}
    dinov2 = {key: value for key, value in clip.items() if key != "intermediate_size"}
    lmm = make_lmm({"type": "mof", "config": clip, "options": {"dinov2": {"config": dinov2}}})
    assert len(lmm.layers) == 2 + 2 + 2 and check_regions(lmm) == 3


def test_regions_serve_training_alone():
    """Other numbers of images need another tower graph, evaluation others of both; the feature cache runs eagerly."""
    lmm = make_lmm()
    compiled = CompiledForward(lmm, layers=lmm.layers, backend="aot_eager")
    made = [compiled.graphs]
    for images in (1, 2, 1, 2):
        gradients(lmm, make_batch(images=images))
        made.append(compiled.graphs)
        with torch.no_grad():
            lmm.vision(torch.randn(5, 3, 16, 16))
            lmm.eval()(**make_batch())
        lmm.train()
        made.append(compiled.graphs)
    assert made == [0, 2, 4, 5, 5, 5, 5, 5, 5] and compiled.recompiles == 0
    compiled.close()


@pytest.mark.slow
@pytest.mark.no_cover
def test_regions_by_inductor():
    lmm = make_lmm(num_hidden_layers=3)
    lmm.set_gradient_checkpointing("selective")
    assert check_regions(lmm, "inductor") == 3


def test_auto_compiles_when_the_steps_repay_it(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "gemm_flops_per_s", lambda dtype: 1e12)
    for name, value in (("EAGER_RATE", 0.25), ("COMPILED_SAVES", 0.25), ("COMPILE_SECONDS_A_LAYER", {"training": 2.0})):
        monkeypatch.setattr(_policy, name, value)
    step = {"flops": 0.25e12, "layers": 10, "dtype": torch.float32}  # one second
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        assert repays(80, **step) and not repays(79, **step)
    said = "auto: compiling; it would save 20 s of 80 steps (1 s each, compiled 0.75 s) and cost about 20 s (all estim"
    assert said in caplog.text


def test_auto_goes_by_what_was_measured(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("TLF_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "gemm_flops_per_s", lambda dtype: 1e12)
    kind = timings.kind_of_step(torch.device("cpu"), "float32", "full", layers=10, tokens=64, flops=1e12)
    assert timings.read(kind) == {}
    timings.write(kind, [9.0, 9.0, 2.0, 2.0], None)
    assert timings.read(kind) == {}  # two steps are no measurement
    timings.write(kind, [9.0, 9.0, 2.0, 2.5, 2.0], None)
    timings.write(kind, [9.0, 9.0, 1.5, 1.5, 1.7], 12.0)
    timings.write("another", [1.0] * 9, None)
    assert timings.read(kind) == {"eager_s": 2.0, "compiled_s": 1.5, "compile_s": 12.0}
    step = {"flops": 1e12, "layers": 10, "dtype": torch.float32, "measured": timings.read(kind)}
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        assert repays(24, **step) and not repays(23, **step)
    assert "measured: eager_s, compiled_s, compile_s" in caplog.text
    slower = {**step, "measured": {"eager_s": 1.0, "compiled_s": 1.1}}
    assert not repays(10**6, **slower)
    (tmp_path / "compile.json").write_text("{damaged")
    assert timings.read(kind) == {}

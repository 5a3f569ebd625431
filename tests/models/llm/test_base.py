"""Every language model adapter: packed equals one by one, compiled equals eager, saved equals loaded."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models.llm.families import CONFIGS, WINDOW, build, stock
from tests.tiny import IMAGE, make_tokenizer
from tinyllava_fast.config.schema import LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.architecture import LMMConfig
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.hf import config_to_dict
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.ops import linear_cross_entropy

LENGTHS = (5, 1, 9)
FAMILIES = sorted(CONFIGS)


@dataclasses.dataclass
class Case:
    """Three segments; rows 1..4 of the last one are image rows that carry no label."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    bounds: Tensor
    slots: Tensor
    features: Tensor

    @staticmethod
    def make() -> Case:
        g = torch.Generator().manual_seed(0)
        total = sum(LENGTHS)
        ids = torch.randint(0, 61, (total,), generator=g)
        labels = ids.roll(-1)
        labels[torch.tensor(LENGTHS).cumsum(0) - 1] = -100
        slots = torch.arange(7, 11)
        labels[slots] = -100
        bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])
        return Case(ids, labels, positions, bounds, slots, torch.randn(4, 32, generator=g))


def lmm_of(name: str, **changes: object) -> LMM:
    adapter, llm = build(name, **changes)
    kind, connector = VISION.get("siglip"), CONNECTORS.get("mlp")
    vision = kind.from_config(
        IMAGE, feature_layer=-1, feature_select="cls_patch", options=kind.Options(), seed=0, where="model.vision"
    )
    mapping = connector(24, 32, connector.Options())
    config = LMMConfig(llm=adapter.describe(llm), vision=vision.describe(), connector=mapping.describe())
    return LMM(llm, vision, mapping, adapter, config).eval()


def packed_loss(lmm: LMM, case: Case) -> Tensor:
    embeds = lmm.embed(case.ids, case.features, case.slots)
    hidden = lmm.decode(embeds, case.positions, cu_seqlens=case.bounds)
    weight, bias = lmm.family.head(lmm.llm)
    return linear_cross_entropy(hidden, weight, case.labels, bias=bias, softcap=lmm.logit_softcap)


def loss_one_by_one(lmm: LMM, plain: PreTrainedModel, case: Case) -> Tensor:
    rows = plain.get_input_embeddings()(case.ids)
    rows = rows.index_copy(0, case.slots, case.features * lmm.embedding_scale)
    total = rows.new_zeros(())
    for part, labels in zip(rows.split(LENGTHS), case.labels.split(LENGTHS), strict=True):
        logits = plain(inputs_embeds=part[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_training_equals_one_sequence_at_a_time(name: str) -> None:
    lmm, case = lmm_of(name), Case.make()
    plain = stock(lmm.llm)
    got, want = packed_loss(lmm, case), loss_one_by_one(lmm, plain, case)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-6)
    ours, theirs = gradients(lmm.llm, got), gradients(plain, want)
    assert ours.keys() == theirs.keys()
    for parameter, grad in theirs.items():
        torch.testing.assert_close(ours[parameter], grad, atol=3e-5, rtol=1e-4, msg=lambda m, n=parameter: f"{n}: {m}")
    with torch.no_grad():
        hidden = lmm.decode(lmm.embed(case.ids[:5], case.features[:0], case.slots[:0]), case.positions[:5], **first())
        torch.testing.assert_close(lmm.logits(hidden), plain(case.ids[None, :5]).logits[0], atol=3e-5, rtol=1e-4)


def first() -> dict[str, Tensor]:
    return {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}


@pytest.mark.parametrize(("name", "checkpointing"), [("gemma2", False), ("openelm", True), ("stablelm", True)])
def test_compiles_without_graph_breaks(name: str, checkpointing: bool) -> None:
    lmm, case = lmm_of(name), Case.make()
    want = gradients(lmm.llm, packed_loss(lmm, case))
    lmm.train().set_gradient_checkpointing(checkpointing)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: packed_loss(lmm, case), fullgraph=True, backend="aot_eager")
    for name_, grad in gradients(lmm.llm, compiled()).items():
        torch.testing.assert_close(grad, want[name_], atol=1e-5, rtol=1e-4, msg=lambda m, n=name_: f"{n}: {m}")


@pytest.mark.parametrize("name", ["openelm", "stablelm"])
def test_checkpointed_layers_run_twice(name: str) -> None:
    lmm, case, runs = lmm_of(name), Case.make(), []
    want = gradients(lmm.llm, packed_loss(lmm, case))
    lmm.train().set_gradient_checkpointing(True)
    layer = lmm.family.layers(lmm.llm)[0]
    attention = layer.attn if name == "openelm" else layer.self_attn
    attention.register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients(lmm.llm, packed_loss(lmm, case))
    assert len(runs) == 2 and all(torch.equal(got[n], g) for n, g in want.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_folder_round_trip(name: str, tmp_path: Path) -> None:
    lmm, case = lmm_of(name), Case.make()
    folder = io.save_model(lmm, make_tokenizer(), VISION.get("siglip").image_processor(16), tmp_path / "model")
    again, _, _ = io.load_model(folder)
    assert type(again.family) is LLMS.get(name) and again.config == lmm.config
    assert torch.equal(packed_loss(again, case), packed_loss(lmm, case))
    assert again.family.stop_ids(again.llm) == {2}


@pytest.mark.parametrize("name", FAMILIES)
def test_pretrained_folder_loads(name: str, tmp_path: Path) -> None:
    """A folder as save_pretrained writes it, through the adapter by name, in another dtype and back."""
    lmm = lmm_of(name)
    stock(lmm.llm).save_pretrained(tmp_path)
    config = ModelConfig(llm=LLMConfig(type=name, path=str(tmp_path)), vision=VisionConfig(config=IMAGE))
    loaded = build_model(config).eval()
    case, weights = Case.make(), loaded.llm.state_dict()
    assert all(torch.equal(weights.pop(k), v) for k, v in lmm.llm.state_dict().items()) and not weights
    assert config_to_dict(loaded.llm.config) == config_to_dict(lmm.llm.config)
    torch.testing.assert_close(packed_loss(loaded, case), packed_loss(lmm, case))  # other addresses, other sums
    half = build_model(config, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in half.llm.named_buffers() if "inv_freq" in n} <= {torch.float32}


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_tells_far_positions_apart(name: str) -> None:
    """Rotary tables stay in float32: at position 4,001 bf16 tables would be off by radians."""
    lmm = lmm_of(name)
    with torch.no_grad():
        for parameter in lmm.parameters():
            parameter.copy_(parameter.bfloat16())
    half = copy.deepcopy(lmm).bfloat16()
    case = Case.make()
    steps = torch.randint(1, 7, (15,), generator=torch.Generator().manual_seed(0)).cumsum(0)
    far = dataclasses.replace(case, positions=4001 + steps)
    want, got = packed_loss(lmm, far), packed_loss(half, far)
    torch.testing.assert_close(got, want, rtol=3e-2, atol=0)


def test_bf16_embedding_scale_is_rounded_like_gemmas() -> None:
    lmm, case = lmm_of("gemma").bfloat16(), Case.make()
    rows = lmm.embed(case.ids, case.features.bfloat16(), case.slots)
    want = lmm.llm.get_input_embeddings()(case.ids)
    text = torch.ones(15, dtype=torch.bool).index_fill(0, case.slots, False)
    assert torch.equal(rows[text], want[text])


def test_windows_refuse_longer_prefixes() -> None:
    lmm, case = lmm_of("gemma2"), Case.make()
    prefix = torch.zeros(3, 2, dtype=torch.int32)
    embeds = lmm.embed(case.ids, case.features, case.slots)
    with pytest.raises(ValueError, match=rf"Gemma2Attention sees only the last {WINDOW} tokens.*shared prefixes"):
        lmm.decode(embeds, case.positions, cu_seqlens=case.bounds, prefix=prefix)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("phi", {"model_type": "qwen2"}, r"model\.llm\.type: phi takes phi models, this one is 'qwen2'; .*type: qwen2"),
        ("qwen2", {"model_type": "llama"}, "set model.llm.type: smollm2 or tinyllama"),
        ("gemma", {"model_type": "olmo2"}, "set model.llm.type: auto"),
        ("openelm", {"ffn_multipliers": [1.0, 2.0, 3.0]}, "3 multipliers for 12 layers"),
        ("openelm", {"normalization_layer_name": "layer_norm"}, "only 'rms_norm' exists"),
        ("openelm", {"model_dims": 3}, "not a key of OpenELMConfig; did you mean 'model_dim'"),
    ],
)
def test_config_errors(name: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLMS.get(name)().from_config(config, seed=0, where="model.llm")

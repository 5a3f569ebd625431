"""The composed model against transformers' own modules run one padded sample at a time, and under torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import SiglipVisionModel

from tinyllava_fast.data.collate import collate
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IMAGE_INDEX, PackedBatch
from tinyllava_fast.models.architecture import VisionPart
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VisionTower

FULL_LAYERS = 3


@dataclass
class Sequence:
    """A sample for ``reference_loss``: ids with None for the image, which tokens are learnt, and the image."""

    ids: list[int | None]
    supervised: list[bool]
    pixels: Tensor | None


def reference_loss(lmm: LMM, sample: Sequence, padded: int) -> Tensor:
    """SUM loss of one right-padded sample: stock tower and hidden_states, sdpa with a mask, dense logits."""
    llm = lmm.llm
    ids = [i for i in sample.ids if i is not None]
    rows = llm.get_input_embeddings()(torch.tensor(ids))
    labels = torch.tensor(
        [i if s and i is not None else -100 for i, s in zip(sample.ids, sample.supervised, strict=True)]
    )
    if sample.pixels is not None:
        states = lmm.vision.stock(sample.pixels[None], output_hidden_states=True).hidden_states  # type: ignore
        image = lmm.connector(states[-2])[0] * lmm.embedding_scale
        at = sample.ids.index(None)
        rows = torch.cat([rows[:at], image, rows[at:]])
        labels = torch.cat([labels[:at], torch.full((len(image),), -100), labels[at + 1 :]])
    blank = padded - len(rows)
    rows = torch.cat([rows, rows.new_zeros(blank, rows.shape[1])])[None]
    labels = torch.cat([labels, torch.full((blank,), -100)])
    mask = (torch.arange(padded) < padded - blank).long()[None]
    logits = llm(inputs_embeds=rows, attention_mask=mask).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


class StockTower(VisionTower):
    """Stands in for the tower and shares its weights: transformers' whole model, one layer deeper."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        config = copy.deepcopy(tower.config)
        config.num_hidden_layers = FULL_LAYERS
        self.stock = SiglipVisionModel(config)
        self.stock.embeddings = tower.embeddings
        for i, layer in enumerate(tower.encoder.layers):
            self.stock.encoder.layers[i] = layer
        self.num_tokens, self.hidden_size, self.image_size = tower.num_tokens, tower.hidden_size, tower.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def layer_parameters(self, from_layer: int) -> list[nn.Parameter]:
        raise NotImplementedError

    def describe(self) -> VisionPart:
        raise NotImplementedError


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
def test_packed_training_equals_one_padded_sample_at_a_time(
    family: str, tiny: Callable, ragged: Callable, pack: Callable
) -> None:
    """Packing must not change the mathematics. Sixteen ragged samples, some of them text only, fp32."""
    extra = {"llama": {}, "gemma": {"head_dim": 8}, "phi": {"resid_pdrop": 0.0, "tie_word_embeddings": False}}[family]
    lmm = build_model(tiny(llm={"model_type": family, **extra}), seed=5)
    if family == "phi":
        torch.nn.init.normal_(lmm.llm.lm_head.bias, generator=torch.Generator().manual_seed(0))
    samples = ragged(16)
    batch = pack(samples, lmm.tokens_per_image)
    loss = lmm(**batch.tensors()) / batch.num_supervised
    loss.backward()
    got = {n: p.grad for n, p in lmm.named_parameters()}

    plain = copy.deepcopy(lmm)
    plain.zero_grad()
    plain.llm.set_attn_implementation("sdpa")
    plain.vision = StockTower(plain.vision)
    longest = max(len(s.ids) + lmm.tokens_per_image for s in samples)
    want = sum(reference_loss(plain, s, longest) for s in samples) / batch.num_supervised
    want.backward()
    assert batch.num_supervised > 30 and sum(s.pixels is None for s in samples) == 6
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
    stock = {n.replace("vision.stock", "vision"): p.grad for n, p in plain.named_parameters()}
    for name, grad in got.items():
        assert grad is not None, name
        torch.testing.assert_close(grad, stock[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_shared_prefix_equals_turns_trained_alone(tiny: Callable) -> None:
    """One image and system text, three questions that do not see each other, against three samples of their own."""
    lmm = build_model(tiny(), seed=5)
    rng = torch.Generator().manual_seed(0)
    image, head = torch.randn(3, 16, 16, generator=rng), [5, IMAGE_INDEX, 9]
    turns = [torch.randint(3, 61, (n,), generator=rng).tolist() for n in (4, 2, 7)]
    pieces = [Segment(head), *[Segment(t, [(1, len(t))], on_prefix=True) for t in turns], Segment([7, 8, 9], [(1, 3)])]
    batch = collate(
        [pieces[:4], pieces[4:]], image[None], tokens=40, max_segments=8, tokens_per_image=lmm.tokens_per_image
    )
    got = grads_of(lmm, lmm(**batch.tensors()))
    loss = lmm(**batch.tensors())

    plain = copy.deepcopy(lmm)
    plain.llm.set_attn_implementation("sdpa")
    plain.vision = StockTower(plain.vision)
    ids = [None if i == IMAGE_INDEX else i for i in head]
    alone = [Sequence([*ids, *t], [False] * 4 + [True] * (len(t) - 1), image) for t in turns]
    alone.append(Sequence([7, 8, 9], [False, True, True], None))
    want = sum(reference_loss(plain, s, 20) for s in alone)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-6)
    stock = {n.replace("vision.stock", "vision"): g for n, g in grads_of(plain, want).items()}  # type: ignore[arg-type]
    assert_same(got, {n: stock[n] for n in got})


def grads_of(lmm: LMM, loss: Tensor) -> dict[str, Tensor]:
    lmm.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in lmm.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and got
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def batch_of(lmm: LMM, ragged: Callable, pack: Callable, count: int = 5, seed: int = 0) -> PackedBatch:
    return pack(ragged(count, seed=seed), lmm.tokens_per_image)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_fullgraph_forward_and_backward(
    checkpointing: bool, tiny: Callable, ragged: Callable, pack: Callable
) -> None:
    lmm = build_model(tiny(), seed=1)
    batch = batch_of(lmm, ragged, pack)
    want = grads_of(lmm, lmm(**batch.tensors()))
    lmm.set_gradient_checkpointing(checkpointing)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lmm, fullgraph=True, dynamic=False, backend=counter)
    assert_same(grads_of(lmm, compiled(**batch.tensors())), want)
    values = dict(batch.tensors(), labels=batch.labels.roll(0), pixel_values=batch.pixel_values * 2)
    compiled(**values)
    assert counter.frame_count == 1, "one graph per shape"


@pytest.mark.slow
@pytest.mark.no_cover
def test_inductor_agrees(tiny: Callable, ragged: Callable, pack: Callable) -> None:
    lmm = build_model(tiny(llm={"num_hidden_layers": 1}, vision={"num_hidden_layers": 2}), seed=1)
    lmm.vision.requires_grad_(False)
    batch = batch_of(lmm, ragged, pack)
    want = grads_of(lmm, lmm(**batch.tensors()))
    torch._dynamo.reset()
    assert_same(grads_of(lmm, torch.compile(lmm, fullgraph=True, dynamic=False)(**batch.tensors())), want)


def test_gradient_checkpointing_gives_the_same_gradients(tiny: Callable, ragged: Callable, pack: Callable) -> None:
    lmm = build_model(tiny(), seed=1)
    batch = batch_of(lmm, ragged, pack)
    want = grads_of(lmm, lmm(**batch.tensors()))
    runs = []
    layer = lmm.family.layers(lmm.llm)[0]
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    lmm.set_gradient_checkpointing(True)
    assert_same(grads_of(lmm, lmm(**batch.tensors())), want)
    assert len(runs) == 2, "the layer runs again in the backward pass"
    lmm.set_gradient_checkpointing(False)
    assert_same(grads_of(lmm, lmm(**batch.tensors())), want)
    assert len(runs) == 3


def test_selective_checkpointing_recomputes_every_second_layer(
    tiny: Callable, ragged: Callable, pack: Callable
) -> None:
    lmm = build_model(tiny(), seed=1)
    batch = batch_of(lmm, ragged, pack)
    want = grads_of(lmm, lmm(**batch.tensors()))
    runs: list[int] = []
    layers = list(lmm.family.layers(lmm.llm))
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    lmm.set_gradient_checkpointing("selective")
    assert_same(grads_of(lmm, lmm(**batch.tensors())), want)
    assert [runs.count(i) for i in range(len(layers))] == [2 - i % 2 for i in range(len(layers))]


def test_no_image_never_calls_a_frozen_tower(
    tiny: Callable, ragged: Callable, pack: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmm = build_model(tiny(), seed=1)
    lmm.vision.requires_grad_(False)
    text = [s for s in ragged(7) if s.pixels is None]
    batch = pack(text, lmm.tokens_per_image)

    def fail(*_: object) -> Tensor:
        raise AssertionError("the tower ran")

    monkeypatch.setattr(type(lmm.vision), "forward", fail)
    grads = grads_of(lmm, lmm(**batch.tensors()))
    zero = grads["connector.layers.0.weight"]
    assert zero.shape == (32, 24) and not zero.any()
    assert any(g.any() for n, g in grads.items() if n.startswith("llm."))


def test_dtype_changes_spare_rotary_frequencies(tiny: Callable) -> None:
    lmm = build_model(tiny(), seed=1)
    before = lmm.llm.model.rotary_emb.inv_freq.clone()
    lmm.bfloat16()
    assert {p.dtype for p in lmm.parameters()} == {torch.bfloat16} and lmm.dtype == torch.bfloat16
    assert lmm.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(lmm.llm.model.rotary_emb.inv_freq, before)
    lmm.to("meta")
    assert lmm.llm.model.rotary_emb.inv_freq.is_meta and lmm.device.type == "meta"


def test_bf16_loss_is_near_fp32(tiny: Callable, ragged: Callable, pack: Callable) -> None:
    batch = batch_of(build_model(tiny(), seed=1), ragged, pack)
    losses = [build_model(tiny(), seed=1, dtype=d)(**batch.tensors()) for d in (torch.float32, torch.bfloat16)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


def test_label_smoothing_and_z_loss_are_of_the_training_loss(tiny: Callable, ragged: Callable, pack: Callable) -> None:
    lmm = build_model(tiny(), seed=1)
    batch = batch_of(lmm, ragged, pack)
    inputs = batch.tensors()
    features = lmm.encode_images(batch.pixel_values).flatten(0, 1)
    embeds = lmm.embed(batch.input_ids, features, batch.image_slots)
    hidden = lmm.decode(embeds, batch.position_ids, cu_seqlens=batch.cu_seqlens, prefix=batch.prefix)
    kept = batch.labels != -100
    logits, labels = lmm.logits(hidden[kept]), batch.labels[kept]
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(lmm(**inputs), plain)
    lmm.set_loss(label_smoothing=0.2, z_loss=0.01)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(lmm(**inputs), smoothed + 0.01 * (torch.logsumexp(logits, -1) ** 2).sum())


def test_the_loss_of_each_segment(tiny: Callable, ragged: Callable, pack: Callable) -> None:
    lmm = build_model(tiny(), seed=1)
    samples = ragged(4, seed=3)
    batch = pack(samples, lmm.tokens_per_image)
    plain = lmm(**batch.tensors())
    want = grads_of(lmm, plain)
    lmm.set_loss(label_smoothing=0.0, z_loss=0.0, by_segment=True)
    losses = lmm(**batch.tensors())
    assert losses.shape == batch.cu_seqlens.shape and torch.equal(losses[0], plain)
    got = grads_of(lmm, losses[0])
    assert all(torch.equal(got[name], want[name]) for name in want)
    alone = [lmm(**pack([sample], lmm.tokens_per_image).tensors())[0] for sample in samples]
    torch.testing.assert_close(losses[1:5], torch.stack(alone), atol=1e-4, rtol=1e-5)
    assert not losses[5:].any()
    torch._dynamo.reset()
    compiled = torch.compile(lmm, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch.tensors()), losses)


def test_logits_and_parameters(tiny: Callable) -> None:
    lmm = build_model(tiny(), seed=1)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lmm.logits(hidden), lmm.llm.lm_head(hidden))
    assert lmm.vocab_size == 61 and lmm.num_kv_heads == [2, 2] and lmm.head_dim == 8 and lmm.num_layers == 2
    assert [id(p) for p in lmm.external_parameters()] == [id(lmm.llm.lm_head.weight)], "tied: once"
    parts = lmm.component_parameters()
    assert sum(len(v) for v in parts.values()) == len(list(lmm.parameters()))
    untied = build_model(tiny(llm={"tie_word_embeddings": False}), seed=1)
    assert len(untied.external_parameters()) == 2 and untied.tied_names() == {}

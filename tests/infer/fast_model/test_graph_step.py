"""The step that chooses tokens on the device, its graphs replaced by plain calls: the tokens of the other ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.infer.test_engine import ask
from tests.tiny import make_engine, make_model
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.infer import device_sampling
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.graph_step import BUCKETS, GraphStep
from tinyllava_fast.infer.fast_model.prepare import PreparedModel, prepare_model
from tinyllava_fast.infer.sampling import next_tokens
from tinyllava_fast.infer.types import Request, Sampling

DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.3, "seed": 4, "min_p": 0.05},
    {"temperature": 1.1, "seed": 5, "top_k": 7},
    {"temperature": 1.1, "seed": 6, "top_p": 0.8},
    {"temperature": 1.1, "seed": 7, "top_k": 30, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 1e-6, "seed": 8},
]


def on_device(engine: Engine) -> list[tuple[int, int]]:
    """Let an engine choose tokens as on a GPU. Returns the sizes of its steps, (sequences, rows), as they come."""
    engine._decoder.use_graphs(engine.model, capture=False)
    steps: list[tuple[int, int]] = []
    graphs = engine._decoder.graphs
    assert graphs is not None
    compute = graphs.compute
    graphs.compute = lambda key: (steps.append(key[:2]), compute(key))[1]
    return steps


def requests(images: list[Any]) -> list[Request]:
    return [ask(f"what {i}?", images[i % 2] if i % 3 else None, new=6 + i, **d) for i, d in enumerate(DRAWS)]


@pytest.mark.parametrize("kind", ["llama", "made ready", "windowed", "capped"])
def test_tokens_are_those_of_other_engines(kind: str, lmm, tokenizer, images) -> None:
    """Requests leave the batch one after the other, so that it crosses buckets."""
    if kind == "windowed":
        lmm = make_model(model_type="mistral", sliding_window=20)
    if kind == "capped":
        lmm = make_model(
            model_type="gemma2", head_dim=12, attn_logit_softcapping=5.0, final_logit_softcapping=9.0,
            query_pre_attn_scalar=12, layer_types=["full_attention"] * 3, sliding_window=64,
        )  # fmt: skip
    model = prepare_model(copy.deepcopy(lmm)) if kind == "made ready" else PreparedModel(lmm)
    expected = [a.tokens for a in make_engine(model, tokenizer).answers(requests(images))]
    engine = make_engine(model, tokenizer)
    steps = on_device(engine)
    assert [a.tokens for a in engine.answers(requests(images))] == expected
    assert {size for size, _ in steps} >= {1, 2, 8} and (8, True) in steps
    assert engine.counters.decode_steps == len(steps)


def test_what_the_device_does_not_know_goes_the_other_way(lmm, tokenizer) -> None:
    engine = make_engine(lmm, tokenizer)
    steps = on_device(engine)
    shaped = [ask("why?", presence_penalty=1.0), ask("and?", logprobs=1)]
    assert [a.tokens for a in engine.answers(shaped)] == [a.tokens for a in make_engine(lmm, tokenizer).answers(shaped)]
    many = [ask(f"{i}", new=2) for i in range(BUCKETS[-1] + 1)]
    assert len(engine.answers(many)) == len(many) and not steps


def test_logits_that_are_no_numbers_are_refused(lmm, tokenizer) -> None:
    broken = copy.deepcopy(lmm)
    engine = make_engine(broken, tokenizer, source="runs/broken")
    on_device(engine)
    engine.add_request(ask("what?", id="q"))
    engine.step()
    broken.llm.model.norm.weight.data[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"runs/broken: the model's numbers are not finite .* request 'q'"):
        for _ in range(3):
            engine.step()
    engine.step()  # returns the request that has failed
    assert engine._decoder.pool.rows.free_rows == engine.batch_tokens


@pytest.mark.parametrize("spread", [0.02, 3.0])
@pytest.mark.parametrize("vocab", [200, 1500])
def test_device_and_host_choose_alike(vocab: int, spread: float) -> None:
    """Wide nuclei, beyond what the host sorts at first, and narrow ones."""
    logits = spread * torch.randn(len(DRAWS) * 8, vocab, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(**d) for d in DRAWS for _ in range(8)]
    places = list(range(len(samplings)))
    rows = device_sampling.draw_rows(samplings, places)
    draws = device_sampling.Draws(*torch.from_numpy(rows).unbind(1))
    found = device_sampling.tokens(logits, draws, order=device_sampling.needs_order(rows))
    assert found.tolist() == next_tokens(logits.clone(), samplings, places)


def test_a_replaced_weight_is_noticed(lmm, tokenizer, monkeypatch) -> None:
    """Graphs read addresses: those recorded from others are dropped."""
    engine = make_engine(copy.deepcopy(lmm), tokenizer)
    engine._decoder.use_graphs(engine.model, capture=True)
    graphs = engine._decoder.graphs
    assert graphs is not None
    recorded: list[tuple[int, bool, int]] = []

    class Replayed:
        def __init__(self, key: Any) -> None:
            self.key = key

        def replay(self) -> None:
            for kept, new in zip(graphs._graphs[self.key][1:], graphs.compute(self.key), strict=True):
                kept.copy_(new)

    def record(self: GraphStep, key: Any) -> Any:
        recorded.append(key)
        return (Replayed(key), *(t.clone() for t in self.compute(key)))

    monkeypatch.setattr(GraphStep, "_record", record)
    first = engine.answers([ask("what?")])
    assert engine.answers([ask("what?")])[0].tokens == first[0].tokens and len(recorded) == 1
    norm = engine.lmm.llm.model.norm.weight
    norm.data = norm.data * torch.linspace(-1, 1, len(norm))
    changed = engine.answers([ask("what?")])[0].tokens
    assert len(recorded) == 2 and changed == make_engine(engine.lmm, tokenizer).answers([ask("what?")])[0].tokens


def test_what_cannot_be_recorded_is_called_and_said(lmm, tokenizer, monkeypatch, said) -> None:
    def record(self: GraphStep, key: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(GraphStep, "_record", record)
    engine = make_engine(lmm, tokenizer)
    engine._decoder.use_graphs(engine.model, capture=True)
    found = engine.answers([ask("what?")])[0].tokens
    assert found == make_engine(lmm, tokenizer).answers([ask("what?")])[0].tokens
    (line,) = {r.getMessage() for r in said.records if "kernel by kernel" in r.getMessage()}
    assert line.endswith("stream is capturing")

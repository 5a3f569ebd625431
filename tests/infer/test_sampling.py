"""Sampled tokens: the candidates are transformers', the draws are the distribution, and nothing else decides them."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.infer.test_engine import ask
from tests.tiny import make_engine
from tinyllava_fast.infer.sampling import NUCLEUS_GUESS, candidates, draw, next_tokens
from tinyllava_fast.infer.types import Sampling


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize("min_p", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (7, 0.6), (0, 1e-6), (2000, 0.9), (1, 1.0)])
def test_candidates_are_those_of_transformers(top_k, top_p, min_p, spread):
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(3)) * spread
    kept = logits
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    if min_p:
        kept = MinPLogitsWarper(min_p)(None, kept)
    expected = kept[0].softmax(-1)
    ids, probabilities = candidates(logits[0], top_k, top_p, min_p)
    ours = torch.zeros(1000)
    ours[ids if ids is not None else slice(None)] = probabilities / probabilities.sum()
    torch.testing.assert_close(ours, expected)
    if min_p:
        return
    flat = spread < 1 and not top_k and top_p == 0.7
    assert (len(probabilities) > NUCLEUS_GUESS) == (
        flat or (not top_k and top_p == 1) or (top_k == 2000 and spread < 1)
    )


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = [draw(logits, Sampling(temperature=0.5, seed=7), place) for place in range(4000)]
    share = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    torch.testing.assert_close(share, (logits / 0.5).softmax(-1), atol=0.025, rtol=0)


def test_almost_no_temperature_is_greedy():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 20
    for temperature in (1e-40, 1e-6, 1e-4):
        assert next_tokens(logits, [Sampling(temperature=temperature)] * 2, [0, 0]) == logits.argmax(-1).tolist()


def test_rows_do_not_decide_for_one_another():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    warm, cold = Sampling(temperature=1.0, seed=5, top_p=0.9), Sampling()
    alone = next_tokens(logits[1:2], [warm], [4])
    assert next_tokens(logits, [cold, warm, cold], [0, 4, 9])[1:2] == alone
    assert next_tokens(logits, [cold] * 3, [0] * 3) == logits.argmax(-1).tolist()
    assert len({next_tokens(logits[1:2], [warm], [place])[0] for place in range(20)}) > 3


def test_answers_do_not_depend_on_the_batch(lmm, tokenizer, engine, images):
    options = {"temperature": 1.2, "top_k": 40, "top_p": 0.95}
    warm = [ask("say", images[0], seed=s, **options) for s in (1, 2, 1)]
    once = [a.tokens for a in engine.answers(warm)]
    assert once[0] == once[2] != once[1]
    small = make_engine(lmm, tokenizer, batch_tokens=220, prefill_tokens=1)  # so small that sequences start anew
    mixed = small.answers([ask("other", images[1]), *warm[::-1], ask("more", temperature=0.7)])
    assert [a.tokens for a in mixed[1:4]] == once[::-1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"logit_bias": {7: float("inf")}}, "logit_bias is inf for token 7"),
        ({"logit_bias": {-7: 1.0}}, "logit_bias is 1.0 for token -7"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": ["x", ""]}, "stop holds an empty"),
    ],
)
def test_bad_values(values, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**values)

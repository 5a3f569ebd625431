"""Penalties, bias and log-probabilities: the formulas, on random logits and on what a model says."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tests.infer.test_engine import ask
from tests.tiny import make_engine
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.sampling import next_tokens
from tinyllava_fast.infer.scheduling import scheduler
from tinyllava_fast.infer.scheduling.admission import requeue
from tinyllava_fast.infer.shaping import Shaper, Shaping, choose
from tinyllava_fast.infer.types import Sampling, TokenLogprob

V = 260
PROMPT = [1, 40, 41, -1, -1, 40, 99, 259]
SAID = [41, 7, 7, 200, 7, 41, 3]
REPETITION, PRESENCE, FREQUENCY, BIAS = 1.3, 0.7, -0.4, {7: -3.0, 99: 2.0, 250: 4.5}
ALL = {
    "repetition_penalty": REPETITION,
    "presence_penalty": PRESENCE,
    "frequency_penalty": FREQUENCY,
    "logit_bias": BIAS,
}


def shaped(tokenizer, said: list[int] = SAID, **settings: object) -> Shaping | None:
    shaping = Shaper(tokenizer).shaping(ask("why?", **settings), PROMPT, frozenset())
    for token in said if shaping else ():
        assert shaping.push(token) is False
    return shaping


def changed(logits: torch.Tensor, shapings: list[Shaping | None]) -> torch.Tensor:
    """What choose makes of the logits."""
    own = logits.clone()
    count = len(shapings)
    choose(own, [Sampling()] * count, [0] * count, shapings)
    return own


def expected(logits: torch.Tensor, tokens: list[int], said: list[int]) -> torch.Tensor:
    """The same for one row, token by token, with transformers' repetition penalty."""
    seen = torch.tensor([[t for t in tokens if t >= 0]])
    out = RepetitionPenaltyLogitsProcessor(REPETITION)(seen, logits[None].clone())[0]
    for token in set(said):
        out[token] -= PRESENCE + FREQUENCY * said.count(token)
    for token, bias in BIAS.items():
        out[token] += bias
    return out


def random_logits(rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 3


def test_penalties_and_bias_are_the_formulas(tokenizer):
    logits = random_logits(4)
    found = changed(
        logits, [shaped(tokenizer, **ALL), None, shaped(tokenizer, [], **ALL), shaped(tokenizer, logprobs=1)]
    )
    torch.testing.assert_close(found[0], expected(logits[0], PROMPT + SAID, SAID))
    torch.testing.assert_close(found[2], expected(logits[2], PROMPT, []))
    assert torch.equal(found[1], logits[1]) and torch.equal(found[3], logits[3])


@pytest.mark.parametrize("name", list(ALL))
def test_each_alone(tokenizer, name):
    logits = random_logits(1)
    found = changed(logits, [shaped(tokenizer, **{name: ALL[name]})])
    moved = set((found[0] != logits[0]).nonzero().flatten().tolist())
    tokens = {"repetition_penalty": PROMPT + SAID, "logit_bias": list(BIAS)}.get(name, SAID)
    assert moved == {t for t in tokens if t >= 0}


def test_nobody_asks_for_anything(tokenizer):
    assert shaped(tokenizer) is None and shaped(tokenizer, temperature=1.0, top_p=0.5, min_p=0.1, stop="x") is None


def test_half_precision_is_not_rounded_again(tokenizer):
    logits = torch.full((1, V), 100.0, dtype=torch.bfloat16)
    logits[0, 9] = 100.5
    sampling = Sampling(logit_bias={12: 0.5001})  # 0.0001 is nothing beside 100 in bfloat16
    shaping = shaped(tokenizer, [], logit_bias=sampling.logit_bias)
    assert next_tokens(logits, [sampling], [0]) == [9]
    assert choose(logits, [sampling], [0], [shaping]) == [12]


def test_a_bias_on_no_token(tokenizer):
    with pytest.raises(UserError, match="the question: logit_bias names token 260, but the last one is 259"):
        shaped(tokenizer, logit_bias={260: 1.0})


@torch.no_grad()
def own_logits(plain, engine, request, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
    """The prompt's ids and stock transformers' logits after it and these tokens."""
    prompt = engine.template.prompt(request.conversation(), engine.tokenizer).ids
    ids = torch.tensor([prompt + tokens])
    return prompt, plain(input_ids=ids).logits[0, -1, : engine.vocab].double()


def test_greedy_with_penalties_takes_the_greatest(plain, engine):
    request = ask("what is this?", new=10, eos_token_id=(), **ALL)
    (answer,) = engine.answers([request])
    for place, token in enumerate(answer.tokens):
        said = answer.tokens[:place]
        prompt, logits = own_logits(plain, engine, request, said)
        assert token == int(expected(logits, prompt + said, said).argmax())
    assert answer.tokens != engine.answers([ask("what is this?", new=10, eos_token_id=())])[0].tokens


def test_logprobs_are_those_of_the_models_own_logits(plain, engine, images):
    settings = {"temperature": 1.5, "seed": 4, **ALL}
    request = ask("what is this?", new=8, logprobs=3, **settings)
    others = [ask("so?", images[0], logprobs=0), ask("why?"), ask("and?", logprobs=20, eos_token_id=())]
    answer, none, without, many = engine.answers([request, *others])
    assert len(answer.logprobs) == len(answer.tokens) > 3
    for place, told in enumerate(answer.logprobs):
        _, logits = own_logits(plain, engine, request, answer.tokens[:place])
        own = logits.log_softmax(-1)
        values, ids = own.topk(3)
        assert told.id == answer.tokens[place] and told.logprob == pytest.approx(float(own[told.id]), abs=1e-4)
        assert [i for i, _ in told.top] == ids.tolist()
        assert [p for _, p in told.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert {len(t.top) for t in none.logprobs} == {0} and without.logprobs == []
    assert [len(t.top) for t in many.logprobs] == [20] * 12
    for t in many.logprobs:  # greedy: the likeliest is the token itself
        assert t == TokenLogprob(t.id, t.top[0][1], t.top) and t.top[0][0] == t.id


def test_asking_for_logprobs_changes_no_answer(engine, images):
    requests = [ask("say", images[0], temperature=t, seed=3) for t in (0, 1.3)]
    told = [ask("say", images[0], temperature=t, seed=3, logprobs=2) for t in (0, 1.3)]
    assert [a.tokens for a in engine.answers([*requests, *told])] == [a.tokens for a in engine.answers(requests)] * 2


def test_sequences_that_start_anew_say_the_same(lmm, tokenizer, engine, images, monkeypatch):
    warm = {"temperature": 1.2, "min_p": 0.02, "logprobs": 2, "new": 60, "eos_token_id": (), **ALL}
    requests = [ask(q, images[i % 2], seed=i, **warm) for i, q in enumerate(("say", "tell", "why", "so"))]
    requests += [ask("plain", images[1], new=60, eos_token_id=()), ask("cold", new=60, eos_token_id=(), **ALL)]
    once = engine.answers(requests)
    anew: list[object] = []
    monkeypatch.setattr(scheduler, "requeue", lambda some, rows: anew.extend(some) or requeue(some, rows))
    again = make_engine(lmm, tokenizer, batch_tokens=560).answers(requests)
    assert anew  # the pool is so small that some have to
    assert [a.tokens for a in again] == [a.tokens for a in once]
    for one, other in zip(once, again, strict=True):
        assert [t.logprob for t in one.logprobs] == pytest.approx([t.logprob for t in other.logprobs], abs=1e-4)


def test_stop_tokens_and_no_end_tokens(engine):
    (free,) = engine.answers([ask("what is this?", new=40, eos_token_id=())])
    assert free.finish == "length" and len(free.tokens) == 40
    place = next(i for i in range(3, 40) if free.tokens[i] not in free.tokens[:i])
    stop = free.tokens[place]
    pieces: list[str] = []
    for on_token in (None, lambda _, piece: pieces.append(piece)):
        request = ask("what is this?", new=40, eos_token_id=(), stop_token_ids=[stop])
        (answer,) = engine.answers([request], on_token)
        assert (answer.tokens, answer.finish) == (free.tokens[: place + 1], "stop")
        assert answer.text == engine.tokenizer.decode(free.tokens[:place], skip_special_tokens=True).strip()
    assert "".join(pieces) == answer.text

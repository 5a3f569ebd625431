"""The engine's greedy answers equal transformers' generate, request by request, whatever is batched with what."""

from __future__ import annotations

from itertools import repeat

import pytest
import torch
from PIL import Image

from tests.tiny import make_engine, make_model
from tinyllava_fast.data.images import to_pixels
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.scheduling.prompts import expand
from tinyllava_fast.infer.types import Request, Sampling

QUESTIONS = ("what is this?", "what colour?", "why", "is there a circle in the image?", "describe the scene in detail")


def ask(text: str, image: Image.Image | None = None, new: int = 12, id: str = "", **kw: float) -> Request:
    return Request.ask(text, image, sampling=Sampling(max_new_tokens=new, **kw), id=id)


@torch.no_grad()
def generate(plain, engine: Engine, request: Request) -> list[int]:
    """transformers' greedy ids for one request, one at a time, from input embeddings."""
    lmm = engine.lmm
    prompt = engine.template.prompt(request.conversation(), engine.tokenizer)
    rows = torch.tensor(expand(prompt.ids, repeat((0, lmm.tokens_per_image)))[0])
    embeds = plain.get_input_embeddings()(rows.clamp(min=0))
    if (rows < 0).any():
        features = lmm.encode_images(to_pixels([request.image.convert("RGB")], engine.processor))[0]
        embeds[rows < 0] = features.repeat(int((rows < 0).sum()) // len(features), 1) * lmm.embedding_scale
    out = plain.generate(
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(rows), dtype=torch.long),
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=3,
        suppress_tokens=list(range(engine.vocab, lmm.vocab_size)),
        use_cache=True,
    )
    return out[0].tolist()


def mixed_requests(images: list[Image.Image]) -> list[Request]:
    requests = [ask(q, image, new=5 + 4 * i) for image in images[:3] for i, q in enumerate(QUESTIONS)]
    requests += [ask(q) for q in QUESTIONS]
    requests.append(ask("one question only", images[3]))
    turns = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "why?"},
    ]
    requests.append(Request(messages=turns, image=images[0], sampling=Sampling(max_new_tokens=9)))
    twice = [turns[0], turns[1], {"from": "human", "value": "<image>\nand this?"}]
    requests.append(Request(messages=twice, image=images[0], sampling=Sampling(max_new_tokens=9)))
    return requests


def test_greedy_equals_generate(plain, engine, images):
    requests = mixed_requests(images)
    answers = engine.answers(requests)
    expected = [generate(plain, engine, r) for r in requests]
    assert [a.tokens for a in answers] == expected
    # The comparison means something: answers differ from one another, some end early and some do not.
    assert len({tuple(e) for e in expected}) > len(expected) // 2
    assert {a.finish for a in answers} == {"eos", "length"}


@pytest.mark.parametrize("options", [{"batch_tokens": 300, "prefill_tokens": 128}, {"prefill_tokens": 1}])
def test_small_budgets_change_nothing(lmm, tokenizer, engine, images, options):
    requests = mixed_requests(images)
    small = make_engine(lmm, tokenizer, **options)
    assert [a.tokens for a in small.answers(requests)] == [a.tokens for a in engine.answers(requests)]
    assert small._decoder.pool.rows.free_rows == small.batch_tokens


def test_shared_work_is_done_once(engine, images):
    engine.answers([ask(q, image) for q in QUESTIONS for image in images[:2]])
    counters = engine.counters
    assert counters.requests == 10 and counters.images_encoded == 2
    assert counters.computed_tokens < 0.6 * counters.prompt_tokens
    assert counters.generated_tokens <= 120 and counters.decode_steps <= 11


def test_without_prefix_sharing(engine, lmm, tokenizer, images):
    alone = make_engine(lmm, tokenizer)
    alone._core.scheduler.share_prefix = False
    requests = mixed_requests(images)
    assert [a.tokens for a in alone.answers(requests)] == [a.tokens for a in engine.answers(requests)]


def test_window_models_do_not_share_prefixes(tokenizer):
    windowed = make_model(
        model_type="qwen2", use_sliding_window=True, sliding_window=16, layer_types=["sliding_attention"] * 3
    )
    engine = make_engine(windowed, tokenizer)
    assert not engine.share_prefix
    assert len(engine.answers([ask(q, new=4) for q in QUESTIONS])) == len(QUESTIONS)


def test_padded_vocabulary_is_never_chosen(tokenizer):
    lmm = make_model(vocab_size=300)
    with torch.no_grad():
        lmm.llm.lm_head.weight[260:] = lmm.llm.lm_head.weight[:40] * 50
    engine = make_engine(lmm, tokenizer)
    assert engine.vocab == 260
    assert max(t for a in engine.answers([ask(q) for q in QUESTIONS]) for t in a.tokens) < 260


def test_streaming_order_and_ids(engine, images):
    requests = [ask("a", images[0], new=20, id="long"), ask("b", images[0], new=1, id="short")]
    first = next(run := engine.run(requests))
    assert first.id == "short" and len(first.tokens) == 1
    run.close()  # a consumer that stops early leaves the pool empty
    assert engine._decoder.pool.rows.free_rows == engine.batch_tokens
    assert [a.id for a in engine.answers(requests)] == ["long", "short"]


def test_queue_is_read_lazily(engine):
    small = make_engine(engine.lmm, engine.tokenizer, batch_tokens=1024, prefill_tokens=256, lookahead=8)
    taken = []

    def queue():
        for i in range(200):
            taken.append(i)
            yield ask(f"question {i}", new=2, id=str(i))

    run = small.run(queue())
    next(run)
    assert len(taken) < 100
    assert len(list(run)) == 199


def test_sampling_is_seeded_per_request(engine, images):
    warm = [ask("say", images[0], temperature=1.5, seed=s) for s in (1, 2, 1)]
    once = [a.tokens for a in engine.answers(warm)]
    assert once[0] == once[2] != once[1]
    mixed = engine.answers([ask("other", images[1]), *warm[::-1]])
    assert [a.tokens for a in mixed[1:]] == once[::-1]


def test_image_without_marker_and_text_only(engine, images):
    marked = engine.answers([ask("<image>\nwhat?", images[0]), ask("what?", images[0]), ask("what?")])
    assert marked[0].tokens == marked[1].tokens
    assert marked[0].prompt_tokens == marked[2].prompt_tokens + engine.lmm.tokens_per_image + 1


def test_bad_requests(engine, tmp_path):
    with pytest.raises(UserError, match=r"'q7'.*holds <image> but it has no image"):
        list(engine.run([ask("<image>\nwhat?", id="q7")]))
    with pytest.raises(UserError, match=r"'q8'.*context of 2048"):
        list(engine.run([ask("x" * 3000, id="q8")]))
    with pytest.raises(UserError, match=r"'q9'.*raise it to \d+"):
        list(make_engine(engine.lmm, engine.tokenizer, batch_tokens=256).run([ask("x" * 300, id="q9")]))
    with pytest.raises(DataError, match=r"gone\.png"):
        engine.answers([ask("what?", tmp_path / "gone.png")])
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sampling(max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1.0)
    assert engine._decoder.pool.rows.free_rows == engine.batch_tokens
    assert list(engine.run([])) == []


def test_messages_call_requests_by_their_ids(engine, tmp_path):
    """Their numbers stand in for ids that are missing or not unique; one question alone has neither."""
    bad, good = tmp_path / "gone.png", Image.new("RGB", (9, 9))
    for requests, said in (
        ([ask("a", good), ask("b", bad)], "request '1': .*gone"),
        ([ask("a", good, id="x"), ask("b", bad, id="mine")], "request 'mine': .*gone"),
        ([ask("a", good, id="x"), ask("b", bad, id="x")], "request '1': .*gone"),
        ([ask("a", good, id="1"), ask("b", bad, id="1")], "request '1\\'': .*gone|request \"1'\": .*gone"),
        ([ask("b", bad)], "^the question: .*gone"),
        ([ask("b", bad, id="mine")], "^request 'mine': .*gone"),
        ([ask("x" * 9000)], "^the question: 9"),
        ([ask("<image>")], "^the question: its text holds <image> but it has no image"),
    ):
        with pytest.raises(UserError, match=said):
            engine.answers(requests)


def test_answers_have_the_ids_and_the_order_of_their_requests(engine):
    requests = [ask(q, id=id) for q, id in zip(QUESTIONS, ("b", "", "b", "1", "a"), strict=True)]
    pieces: dict[str, str] = {}
    found = engine.answers(iter(requests), lambda id, piece: pieces.__setitem__(id, pieces.get(id, "") + piece))
    assert [a.id for a in found] == [r.id for r in requests] and engine.answers([]) == []
    assert [a.text for a in found] == [engine.answers([r])[0].text for r in requests]
    assert pieces["a"] == found[4].text and pieces["1"] == found[3].text

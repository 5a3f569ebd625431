"""Scores of options equal a plain transformers forward over each prompt with its option."""

from __future__ import annotations

from itertools import repeat

import pytest
import torch

import tinyllava_fast
from tests.infer.test_engine import ask
from tests.tiny import make_engine
from tinyllava_fast.data.images import to_pixels
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.scheduling.prompts import expand

OPTIONS = [("yes", "no", "not at all"), ("A", "B", "C", "D"), ("a long answer of many tokens", "x")]


@torch.no_grad()
def plain_scores(plain, engine, request, option: str) -> tuple[float, int, bool]:
    lmm, tokenizer = engine.lmm, engine.tokenizer
    prompt = engine.template.prompt(request.conversation(), tokenizer)
    answer = tokenizer.encode(" " + option, add_special_tokens=False)
    rows = torch.tensor(expand(prompt.ids, repeat((0, lmm.tokens_per_image)))[0] + answer)
    embeds = plain.get_input_embeddings()(rows.clamp(min=0))
    if request.image is not None:
        embeds[rows < 0] = lmm.encode_images(to_pixels([request.image.convert("RGB")], engine.processor))[0]
    logits = plain(inputs_embeds=embeds[None]).logits[0, -len(answer) - 1 : -1]
    each = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    greedy = logits[:, : engine.vocab].argmax(-1).tolist() == answer
    return float(each.sum()), len(answer), greedy


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 260, "prefill_tokens": 1, "lookahead": 2}])
def test_scores_equal_a_plain_forward(plain, lmm, tokenizer, images, options):
    engine = make_engine(lmm, tokenizer, **options)
    requests = [ask(q, i, id=f"{q}{n}") for n, i in enumerate((images[0], images[1], None)) for q in ("is it?", "why?")]
    questions = [(r, o) for r, o in zip(requests, OPTIONS * 2, strict=True)]
    scores = {s.id: s for s in engine.score(iter(questions))}
    assert len(scores) == len(requests)
    for request, options_ in questions:
        found = scores[request.id]
        expected = [plain_scores(plain, engine, request, option) for option in options_]
        torch.testing.assert_close(found.sums, [e[0] for e in expected], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.means, [e[0] / e[1] for e in expected], atol=1e-4, rtol=0)
        assert found.greedy == [e[2] for e in expected] and found.options == options_
        assert found.best == max(range(len(expected)), key=lambda i: expected[i][0])
        assert found.prompt_tokens == len(next(engine._prompts.sequences([request])).prompt)
    assert engine._decoder.pool.rows.free_rows == engine.batch_tokens
    if not options:
        assert engine.counters.computed_tokens < 0.5 * sum(
            s.prompt_tokens * len(s.options) for s in scores.values()
        )  # prefixes were shared


def test_the_greedy_answer_is_the_greedy_option(folder, images):
    assistant = tinyllava_fast.load(folder, device="cpu")
    (answer,) = assistant.engine.answers([ask("what?", images[0], new=3)])
    said = assistant.engine.tokenizer.decode(answer.tokens)
    scores = assistant.score(images[0], "what?", ["yes", said.removeprefix(" ")])
    if said.startswith(" "):
        assert scores.greedy == [False, True] and scores.best == 1
    else:  # trained answers begin with a space, this one did not
        assert scores.greedy == [False, False]
    assert scores.id == "" and all(s < 0 for s in scores.sums)


def test_bad_questions(engine, images):
    with pytest.raises(UserError, match=r"'q1'.*no options"):
        list(engine.score([(ask("what?", id="q1"), ())]))
    with pytest.raises(UserError, match=r"'q2'.*context of 2048"):
        list(engine.score([(ask("what?", id="q2"), ["x" * 3000])]))
    assert list(engine.score([])) == []

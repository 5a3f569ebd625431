"""Each end of an answer has its status; the engine's words reach the client only where they are about its request."""

from __future__ import annotations

import pytest

from tests.tiny import make_engine, make_model, make_tokenizer
from tinyllava_fast.infer.finish import ABORTED, CONTEXT, FAILED, REFUSED, TOO_LONG, UNREADABLE
from tinyllava_fast.infer.types import Answer, Request, Sampling
from tinyllava_fast.serve.problems import ApiError
from tinyllava_fast.serve.replies import Reply, check


def ended(finish: str, why: str = "") -> Answer:
    return Answer(id="a", text="", tokens=[], finish=finish, prompt_tokens=0, why=why)


@pytest.mark.parametrize(
    ("answer", "status", "said", "code"),
    [
        (ended(ABORTED), 503, "the server is stopping", None),
        (ended(TOO_LONG, "request 'a 7': too long"), 400, "too long", "context_length_exceeded"),
        (ended(UNREADABLE, "request 'a 7': it's damaged"), 400, "it's damaged", "invalid_image"),
        (ended(REFUSED, "request 'a 7': no"), 400, "no", None),
        (ended(FAILED, "/a/secret/path: not finite"), 500, "the model could not answer this request", None),
    ],
)
def test_what_cannot_be_answered(answer, status, said, code):
    with pytest.raises(ApiError) as found:
        check(answer)
    assert (found.value.status, found.value.message, found.value.code) == (status, said, code)


def test_a_prompt_that_the_memory_is_too_small_for_is_the_clients():
    engine = make_engine(make_model(), make_tokenizer(), batch_tokens=300)
    engine.add_request(Request.ask("x" * 200, sampling=Sampling(max_new_tokens=9), id="a"))
    (answer,) = engine.step()
    assert answer.finish == FAILED
    with pytest.raises(ApiError, match="more than this server holds") as found:
        check(answer)
    assert found.value.status == 400


def test_usage_counts_each_prompt_once():
    def one(prompt: int, new: int) -> Answer:
        return Answer(id="", text="", tokens=[1] * new, finish="eos", prompt_tokens=prompt, cached_tokens=prompt - 1)

    for finish in ("eos", "stop", "length", CONTEXT):
        check(ended(finish))
    reply = Reply("text", "id", "m", None, logprobs=False, prompts=2)
    usage = reply.usage([one(5, 1), one(5, 2), one(7, 3), one(7, 4)])
    assert usage == {
        "prompt_tokens": 12,
        "completion_tokens": 10,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 10},
    }

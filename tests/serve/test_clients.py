"""Another client than OpenAI's against the real server: Hugging Face's InferenceClient, with a code of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from PIL import Image

from tests.serve.conftest import Running, data_uri, image_part, saved, text_part
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import IMAGE, Answer, Message, Request, Sampling

KEY = "sk-of-this-test"


@pytest.fixture(scope="module")
def client(start: Callable[..., Running], folder) -> InferenceClient:
    server = start("--models", f"tiny={folder}", key=KEY)
    return InferenceClient(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, timeout=60)


@pytest.fixture
def right(engine: Engine) -> Callable[..., Answer]:
    """What the engine answers greedily to a question after a system text."""

    def answered(value: list[Any], images: list[Image.Image] | None = None, *before: Message) -> Answer:
        messages = [*before, {"from": "human", "value": value}]
        return engine.answers([Request(messages=messages, image=images, sampling=Sampling(max_new_tokens=12))])[0]

    return answered


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


SETTINGS: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0.0}


def test_an_answer_and_its_usage(client, right):
    system = {"role": "system", "content": "Be brief."}
    found = client.chat_completion([system, *user("why?")], **SETTINGS)
    expected = right(["why?"], None, {"from": "system", "value": "Be brief."})
    assert found.choices[0].message.content == expected.text and found.model == "tiny"
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.tokens)


def test_a_stream_about_two_images(client, right, pictures):
    parts = [text_part("this:"), image_part(data_uri(saved(pictures[0]))), image_part(data_uri(saved(pictures[1])))]
    chunks = list(client.chat_completion(user(parts), **SETTINGS, stream=True, stream_options={"include_usage": True}))
    expected = right([IMAGE, "\n", IMAGE, "\n", "this:"], pictures[:2])
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)


def test_log_probabilities_seeds_and_forms(client):
    found = client.chat_completion(user("why?"), **SETTINGS, logprobs=True, top_logprobs=2)
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in found.choices[0].logprobs.content)
    asked = SETTINGS | {"temperature": 1.0, "seed": 5}
    texts = [client.chat_completion(user("why?"), **asked).choices[0].message.content for _ in range(2)]
    assert texts[0] == texts[1]
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    said = client.chat_completion(user("why?"), **asked, extra_body=choice).choices[0].message.content
    assert said in ("yes", "no")


def test_errors(client):
    with pytest.raises(BadRequestError, match="max_tokens"):
        client.chat_completion(user("why?"), **SETTINGS | {"max_tokens": 10**9})
    with pytest.raises(BadRequestError, match="base64 is damaged"):
        client.chat_completion(user([image_part("data:image/png;base64,?")]), **SETTINGS)
    with pytest.raises(HfHubHTTPError) as error:
        client.chat_completion(user("why?"), **SETTINGS | {"model": "none"})
    assert error.value.response.status_code == 404
    other = InferenceClient(base_url=client.model, api_key="sk-wrong", timeout=60)
    with pytest.raises(HfHubHTTPError) as error:
        other.chat_completion(user("why?"), **SETTINGS)
    assert error.value.response.status_code == 401

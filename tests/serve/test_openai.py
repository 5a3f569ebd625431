"""The contract as OpenAI's own client, curl and a browser's absence of manners speak it; answers equal the engine's."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
from PIL import Image

from tests.serve.conftest import Running, data_uri, image_part, saved, text_part
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import IMAGE, Answer, Request, Sampling

CHAT = "/v1/chat/completions"
REASON = {"eos": "stop", "length": "length"}


@pytest.fixture(scope="module")
def server(start: Callable[..., Running], folder) -> Running:
    return start("--models", f"tiny={folder}", f"other={folder}", "--max-waiting", "40")


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=60)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def right(engine: Engine) -> Callable[..., Answer]:
    """What the engine answers to turns of parts, greedily."""

    def answered(*values: Sequence[Any], images: Sequence[Image.Image] = (), new: int = 12, **sampling: Any) -> Answer:
        roles = ("human", "gpt")
        messages = [{"from": roles[i % 2], "value": list(value)} for i, value in enumerate(values)]
        request = Request(
            messages=messages, image=list(images) or None, sampling=Sampling(max_new_tokens=new, **sampling)
        )
        return engine.answers([request])[0]

    return answered


def test_a_chat_is_answered_as_by_the_engine(client, right):
    found = client.chat.completions.create(model="tiny", messages=user("why?"), max_tokens=12, temperature=0)
    expected = right(["why?"])
    (choice,) = found.choices
    assert (found.object, found.model, choice.message.role) == ("chat.completion", "tiny", "assistant")
    assert choice.message.content == expected.text and choice.finish_reason == REASON[expected.finish]
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, len(expected.tokens))
    assert (
        usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
        and usage.prompt_tokens_details.cached_tokens >= 0
    )


def test_a_stream_adds_up_to_the_answer(client, right):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=user("tell me"),
            max_completion_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    expected = right(["tell me"], new=30)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == REASON[expected.finish] and not any(reasons[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert len({c.id for c in chunks}) == 1


def test_images_stand_before_a_text_and_between_texts(client, right, pictures):
    urls = [data_uri(saved(p)) for p in pictures]
    create = client.chat.completions.create
    after = create(model="tiny", messages=user([text_part("what?"), image_part(urls[0])]), max_tokens=12, temperature=0)
    assert after.choices[0].message.content == right([IMAGE, "\n", "what?"], images=pictures[:1]).text
    content = [text_part("this:"), image_part(urls[0]), text_part("and this:"), image_part(urls[1])]
    between = create(model="tiny", messages=user(content), max_tokens=12, temperature=0)
    parts = ["this:", "\n", IMAGE, "\n", "and this:", "\n", IMAGE]
    assert between.choices[0].message.content == right(parts, images=pictures[:2]).text
    assert (
        after.choices[0].message.content
        != create(model="tiny", messages=user("what?"), max_tokens=12, temperature=0).choices[0].message.content
    )


def test_several_turns(client, right, pictures):
    messages = [
        *user([image_part(data_uri(saved(pictures[0], "JPEG", quality=95), "jpeg")), text_part("what?")]),
        {"role": "assistant", "content": "a cat"},
        *user("and this?"),
        *user([image_part(data_uri(saved(pictures[1])))]),
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    first = Image.open(io.BytesIO(saved(pictures[0], "JPEG", quality=95)))
    expected = right([IMAGE, "\n", "what?"], ["a cat"], ["and this?", "\n", IMAGE], images=[first, pictures[1]])
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens


def test_choices_differ_by_their_seeds(client, right):
    def asked(**more: Any) -> list[str]:
        found = client.chat.completions.create(model="tiny", messages=user("why?"), max_tokens=8, seed=5, n=3, **more)
        if not more.get("stream"):
            return [choice.message.content for choice in found.choices]
        texts = ["", "", ""]
        for chunk in found:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    expected = [right(["why?"], new=8, temperature=1.0, seed=5 + i).text for i in range(3)]
    assert asked() == asked(stream=True) == expected and len(set(expected)) == 3


def test_stop_texts_and_ids(client, right):
    answer = right(["why?"], new=30)
    stop = answer.text[5:7]
    found = client.chat.completions.create(
        model="tiny", messages=user("why?"), max_tokens=30, temperature=0, stop=[stop, "never"]
    )
    assert found.choices[0].message.content == right(["why?"], new=30, stop=stop).text
    assert found.choices[0].finish_reason == "stop"


def test_completions_have_no_template(client, engine):
    def expected(text: str) -> Answer:
        messages = [{"from": "prompt", "value": [text]}]
        return engine.answers([Request(messages=messages, sampling=Sampling(max_new_tokens=8))])[0]

    found = client.completions.create(model="tiny", prompt=["a </s>", "b"], max_tokens=8, temperature=0, n=2)
    answers = [expected("a </s>"), expected("b")]
    assert [c.text for c in found.choices] == [a.text for a in answers for _ in range(2)]
    assert found.usage.prompt_tokens == 1 + 6 + 1 + 1 == sum(a.prompt_tokens for a in answers)
    chunks = client.completions.create(model="tiny", prompt="b", max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == answers[1].text


def test_tokens_and_back(server):
    assert server.ask("POST", "/tokenize", {"prompt": "a</s>"})[1]["tokens"][0] == 1
    tokens = server.ask("POST", "/tokenize", {"model": "other", "prompt": "caf\u00e9 </s>"})[1]
    assert tokens["count"] == len("caf\u00e9 </s>".encode()) + 1 and tokens["max_model_len"] == 2048
    assert server.ask("POST", "/detokenize", {"tokens": tokens["tokens"][1:]})[1] == {"prompt": "caf\u00e9 </s>"}
    assert server.ask("POST", "/detokenize", {"tokens": [10**6]})[0] == 400


def test_a_system_message_replaces_the_template_s(client, engine):
    messages = [{"from": "system", "value": ["Be brief. <image>"]}, {"from": "human", "value": ["why?"]}]
    expected = engine.answers([Request(messages=messages, sampling=Sampling(max_new_tokens=8))])[0]
    said = [{"role": "system", "content": "Be brief. <image>"}, *user("why?")]
    found = client.chat.completions.create(model="tiny", messages=said, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens


def test_log_probabilities(client, engine):
    sampling = Sampling(max_new_tokens=6, logprobs=3)
    expected = engine.answers([Request(messages=[{"from": "human", "value": ["why?"]}], sampling=sampling)])[0]
    create = client.chat.completions.create
    asked = {"model": "tiny", "messages": user("why?"), "max_tokens": 6, "temperature": 0}
    whole = create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    parts = [c.choices[0].logprobs for c in create(**asked, logprobs=True, top_logprobs=3, stream=True) if c.choices]
    streamed = [one for part in parts if part for one in part.content]
    for found in (whole, streamed):
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-4)
        assert [len(one.top_logprobs) for one in found] == [3] * len(expected.tokens)
    # the tokens themselves: by their text, or where that is part of a character by their probability alone
    texts = [engine.tokenizer.decode([token]) for token in expected.tokens]
    assert [one.token for one in whole] == texts
    assert all(one.bytes == list(text.encode()) for one, text in zip(whole, texts, strict=True) if "\ufffd" not in text)
    assert create(**asked).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_the_form_of_an_answer(server, client, stream):
    """Even an untrained model's answers have it."""
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}

    def said(**more: Any) -> str:
        asked = {"model": "tiny", "messages": user("why?"), "max_tokens": 60, "temperature": 1, "seed": 3, **more}
        found = client.chat.completions.create(**asked, stream=stream)
        if not stream:
            return found.choices[0].message.content
        return "".join(c.choices[0].delta.content or "" for c in found)

    found = json.loads(said(response_format=wanted))
    assert found["colour"] in ("red", "blue") and 0 <= found["count"] <= 9
    assert said(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")
    assert re.fullmatch("[ab]{3}", said(extra_body={"structured_outputs": {"regex": "[ab]{3}"}}))


@pytest.mark.parametrize(
    "outputs",
    [{"regex": "("}, {"regex": "(?=a)b"}, {"json": {"type": "nothing"}}, {"json": {"$ref": "#/nowhere"}}],
    ids=str,
)
def test_forms_that_are_none(server, outputs):
    for stream in (True, False):
        status, body, _ = server.chat(structured_outputs=outputs, stream=stream)
        assert status == 400 and body["error"]["type"] == "invalid_request_error"
    assert server.chat()[0] == 200


def test_models(client):
    assert [m.id for m in client.models.list().data] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "tinyllava_fast"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("none")


def test_a_prompt_that_is_too_long_is_named(client):
    for size in (1950, 10**5):  # found when it is a sequence, and by its characters
        with pytest.raises(openai.BadRequestError) as found:
            client.completions.create(model="tiny", prompt="x" * size * 2, max_tokens=8)
        assert (found.value.param, found.value.code) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"colour": "red"}, 400, "colour"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"stop": ""}, 400, "stop"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"n": 10**6}, 400, "n"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "chat_template_kwargs"),
        ({"continue_final_message": True}, 400, "continue_final_message"),
        ({"chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False}, 200, None),
        ({"model": "none"}, 404, "model"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": []}, 400, "messages"),
        ({"user": "u", "store": False, "tools": [], "service_tier": "auto", "seed": None}, 200, None),
    ],
)
def test_parameters(server, more, status, param):
    found, body, _ = server.chat(**more)
    assert found == status
    if status != 200:
        assert body["error"]["param"] == param and body["error"]["type"] and body["error"]["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server, right):
    body = json.dumps({"model": "tiny", "messages": user("why?"), "max_tokens": 12, "temperature": 0, "stream": True})
    command = ["curl", "-sN", f"http://localhost:{server.port}{CHAT}", "-H", "Content-Type: application/json"]
    lines = subprocess.run([*command, "-d", body], capture_output=True, text=True, check=True).stdout.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert text == right(["why?"]).text


def test_a_client_that_has_gone_is_not_answered(server):
    before = server.metric("tlf_aborted_total")
    for stream in (True, False):
        body = json.dumps(
            {"messages": user("go on"), "max_tokens": 1800, "ignore_eos": True, "stream": stream}
        ).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                assert b"200 OK" in raw.recv(4096)
            else:
                time.sleep(0.3)
    deadline = time.monotonic() + 20
    while server.metric("tlf_aborted_total") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("tlf_aborted_total") == before + 2 and server.metric("tlf_running") == 0


def test_a_full_queue_says_when_to_come_back(server):
    body = {"messages": user("go on"), "max_tokens": 300, "ignore_eos": True, "n": 8, "temperature": 0}
    found: list[tuple[int, Any, dict[str, str]]] = []
    asking = [threading.Thread(target=lambda: found.append(server.ask("POST", CHAT, body))) for _ in range(12)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert {status for status, _, _ in found} == {200, 429}
    assert all(headers["retry-after"] == "1" for status, _, headers in found if status == 429)


def test_an_end_that_finishes_what_runs(start, folder):
    server = start(str(folder))
    found: list[tuple[int, Any, dict[str, str]]] = []
    thread = threading.Thread(target=lambda: found.append(server.chat("go on", max_tokens=900, ignore_eos=True)))
    thread.start()
    deadline = time.monotonic() + 20
    while not server.metric("tlf_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    server.process.terminate()
    time.sleep(0.2)
    assert server.ask("GET", "/health/live")[0] == 200 and server.ask("GET", "/health/ready")[0] == 503
    assert server.chat("more")[0] == 503
    thread.join()
    assert found[0][0] == 200 and found[0][1]["usage"]["completion_tokens"] == 900
    assert server.process.wait(30) == 0

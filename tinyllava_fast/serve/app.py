"""The routes: OpenAI's contract for chats and completions, models, health, metrics, tokens."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.types import Answer, Sampling
from tinyllava_fast.infer.types import Request as Question
from tinyllava_fast.look.looker import Looker
from tinyllava_fast.look.page import payload
from tinyllava_fast.serve.answering import Choices, OneByOne, unless_gone
from tinyllava_fast.serve.auth import Guard
from tinyllava_fast.serve.limits import ServerLimits, read_object
from tinyllava_fast.serve.media import Media
from tinyllava_fast.serve.memory import Memory, Share, share_of
from tinyllava_fast.serve.metrics import TYPE, Metrics
from tinyllava_fast.serve.problems import ApiError, ClientGoneError, bad
from tinyllava_fast.serve.prompts import Ask, check_length, image_urls, texts, turns
from tinyllava_fast.serve.replies import Reply, check
from tinyllava_fast.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    LookRequest,
    TokenizeRequest,
    read_as,
)
from tinyllava_fast.serve.served import Served, find

PAGE = Path(__file__).parent / "page"
VIEWER = Path(__file__).parents[1] / "look"


@dataclass(frozen=True)
class Api:
    """The routes, and what they share."""

    models: Mapping[str, Served]
    limits: ServerLimits
    media: Media
    metrics: Metrics
    looking: OneByOne

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = read_as(ChatRequest, await read_object(request, self.limits))
        return await unless_gone(request, self._chat(body, share_of(request.scope)))

    async def _chat(self, body: ChatRequest, share: Share) -> Response:
        ask = Ask(body, find(self.models, body.model), self.limits)
        check_length([texts(body.messages)], ask.served, "messages")
        urls = image_urls(body.messages, self.limits)
        messages = turns(body.messages, self.limits)
        images = await self.media.pictures(urls, share)
        name = f"chatcmpl-{secrets.token_hex(12)}"
        reply = Reply("chat", name, ask.served.name, ask.served.engine.tokenizer, body.top_count is not None)
        return await self._answer(body, ask.served, reply, ask.requests(messages, images, name))

    async def _answer(self, body: Generation, served: Served, reply: Reply, questions: Sequence[Question]) -> Response:
        """The answer to a checked request, whole or as a stream that begins once nothing can be refused any more."""
        choices = Choices(served, questions, self.metrics)
        if not body.stream:
            async with aclosing(choices.events()) as events:
                async for _, event in events:
                    if isinstance(event, Answer):
                        check(event, reply.param)
            return JSONResponse(reply.whole(_complete(choices)))
        chunks = stream(choices, reply, body.wants_usage)
        first = await anext(chunks)
        return StreamingResponse(_after(first, chunks), media_type="text/event-stream")

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions: texts without a chat template."""
        body = read_as(CompletionRequest, await read_object(request, self.limits))
        return await unless_gone(request, self._complete(body))

    async def _complete(self, body: CompletionRequest) -> Response:
        ask = Ask(body, find(self.models, body.model), self.limits)
        check_length(body.prompts, ask.served, "prompt")
        name = f"cmpl-{secrets.token_hex(12)}"
        if len(body.prompts) * (body.n or 1) > self.limits.choices:
            raise bad(f"at most {self.limits.choices} choices of all prompts are made at once", "n")
        questions = [
            question
            for number, text in enumerate(body.prompts)
            for question in ask.requests([{"from": "prompt", "value": [text]}], [], f"{name}-{number}")
        ]
        tokenizer = ask.served.engine.tokenizer
        reply = Reply("text", name, ask.served.name, tokenizer, body.top_count is not None, len(body.prompts))
        return await self._answer(body, ask.served, reply, questions)

    async def look(self, request: Request) -> Response:
        """POST /v1/look."""
        body = read_as(LookRequest, await read_object(request, self.limits))
        served = find(self.models, body.model)
        if served.looker is None:
            said = "looks inside are off" if served.base is None else "an adapter's answers are not looked into"
            raise ApiError(404, f"{said}; the server is started with --look for those of a model", param="model")
        check_length([texts(body.messages)], served, "messages")
        self.looking.check_room()
        return await unless_gone(request, self._look(body, served, served.looker, share_of(request.scope)))

    async def _look(self, body: LookRequest, served: Served, looker: Looker, share: Share) -> Response:
        messages = turns(body.messages, self.limits)
        images = await self.media.pictures(image_urls(body.messages, self.limits), share)
        if not images:
            raise bad("there is no picture to look at", "messages")
        new = min(body.max_tokens, self.limits.new_tokens)
        question = Question(messages=messages, image=list(images), sampling=Sampling(max_new_tokens=new))
        choices = Choices(served, [replace(question, id=f"look-{secrets.token_hex(12)}")], self.metrics)
        async with aclosing(choices.events()) as events:
            async for _, event in events:
                if isinstance(event, Answer):
                    check(event, "messages")
        (answer,) = _complete(choices)

        def work(check_client: Callable[[], None]) -> Response:
            most = self.limits.look_bytes
            found = looker.look(question, answer.tokens, most_bytes=most, between=check_client)
            return JSONResponse(payload(found))  # megabytes, so they are encoded in this thread, too

        try:
            return await self.looking.run(work)
        except UserError as error:
            raise bad(str(error), "messages") from None

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = read_as(TokenizeRequest, await read_object(request, self.limits))
        served = find(self.models, body.model)
        try:
            ids = await served.live.literal_ids(body.prompt)
        except UserError as error:
            raise bad(str(error), "prompt") from None
        return JSONResponse({"count": len(ids), "max_model_len": served.context, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = read_as(DetokenizeRequest, await read_object(request, self.limits))
        served = find(self.models, body.model)
        if wrong := next((i for i in body.tokens if i >= served.engine.vocab), None):
            raise bad(f"{wrong} is no token of this model", "tokens")
        text = await asyncio.to_thread(served.engine.tokenizer.decode, list(body.tokens))
        return JSONResponse({"prompt": text})

    async def list_models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [_described(served) for served in self.models.values()]})

    async def one_model(self, name: str) -> Response:
        """GET /v1/models/NAME."""
        return JSONResponse(_described(find(self.models, name)))

    async def show_metrics(self) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), headers={"content-type": TYPE})


async def stream(choices: Choices, reply: Reply, with_usage: bool) -> AsyncGenerator[str, None]:
    """Yield the server-sent events of a streamed answer. ApiError before the first one if it cannot be given.

    What goes wrong later is the last event.
    """
    opened: set[int] = set()
    try:
        async with aclosing(choices.events()) as events:
            async for index, event in events:
                if isinstance(event, Answer):
                    check(event, reply.param)
                if index not in opened:
                    opened.add(index)
                    if (head := reply.first(index)) is not None:
                        yield _event(head)
                if isinstance(event, Answer):
                    yield _event(reply.last(index, event))
                elif event.text or event.logprobs:
                    yield _event(reply.piece(index, event))
    except ApiError as error:
        if not opened:
            raise
        yield _event(error.body())
        return
    if with_usage:
        yield _event(reply.counted(_complete(choices)))
    yield "data: [DONE]\n\n"


async def _after(first: str, chunks: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(chunks):
        yield first
        async for chunk in chunks:
            yield chunk


def _complete(choices: Choices) -> list[Answer]:
    return [answer for answer in choices.answers if answer is not None]


def _event(found: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(found, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _described(served: Served) -> dict[str, object]:
    parent = {} if served.base is None else {"parent": served.base.name}
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "tinyllava_fast",
        "max_model_len": served.context,
        **parent,
        **({} if served.looker is None else {"look": True}),
    }


def build_app(
    models: Mapping[str, Served], *, limits: ServerLimits, media: Media, key: str | None, hosts: Sequence[str]
) -> Guard:
    """Return the application behind its guard."""
    memory = Memory(limits.memory_bytes)
    metrics = Metrics(models, memory)
    api = Api(models, limits, media, metrics, OneByOne())
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for kind, handler in (
        (HTTPException, _no_route),
        (ApiError, _told),
        (ClientGoneError, _gone),
        (Exception, _failed),
    ):
        app.add_exception_handler(kind, handler)
    guard = Guard(app, metrics, memory, key=key, hosts=hosts)
    routes = APIRouter()
    for path, answer in (
        ("/v1/chat/completions", api.chat),
        ("/v1/completions", api.complete),
        ("/v1/look", api.look),
        ("/tokenize", api.tokenize),
        ("/detokenize", api.detokenize),
    ):
        routes.add_api_route(path, answer, methods=["POST"])
        routes.add_api_route(path, _other_method, methods=["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
    routes.add_api_route("/v1/models", api.list_models, methods=["GET", "HEAD"])
    routes.add_api_route("/v1/models/{name:path}", api.one_model, methods=["GET", "HEAD"])
    routes.add_api_route("/metrics", api.show_metrics, methods=["GET", "HEAD"])
    routes.add_api_route("/health/live", _alive, methods=["GET", "HEAD"])
    for path in ("/health", "/health/ready"):
        routes.add_api_route(path, _ready(guard), methods=["GET", "HEAD"])
    for name, media_type in (("viewer.js", "text/javascript"), ("viewer.css", "text/css")):
        routes.add_api_route(f"/look/{name}", _file(VIEWER / name, media_type), methods=["GET", "HEAD"])
    app.include_router(routes)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    return guard


async def _other_method() -> Response:
    raise HTTPException(405, headers={"Allow": "POST"})  # the files of the page would say that there is nothing


async def _alive() -> Response:
    return JSONResponse({"status": "live"})


def _file(path: Path, kind: str) -> Callable[[], Any]:
    async def content() -> Response:
        return FileResponse(path, media_type=kind)

    return content


def _ready(guard: Guard) -> Callable[[], Any]:
    async def ready() -> Response:
        if guard.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    return ready


async def _no_route(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    known = {404: "there is nothing here", 405: "this route has another method; see the header Allow"}
    return ApiError(
        error.status_code, known.get(error.status_code, "the request is refused"), headers=error.headers
    ).response()


async def _told(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error.response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the counters alone


async def _failed(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed on this request").response()

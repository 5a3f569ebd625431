"""A server as the answerer of an evaluation: any that speaks OpenAI's chat completions.

Each question is one request: its pictures as they are, as data URIs, its prompt as text; greedy, with the benchmark's
limit of tokens. The chat template and its system text are the server's.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from queue import SimpleQueue

from PIL import Image

from tinyllava_fast.client.content import Content, content_of, data_uri, drawn_uri, image_part, text_part
from tinyllava_fast.client.endpoint import Endpoint, NoReplyError, RefusedError
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval.answerer import Effort, Reply
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.prompts import IMAGE_MARKER
from tinyllava_fast.eval.types import Facts
from tinyllava_fast.infer.finish import FAILED, REFUSED, TOO_LONG, UNREADABLE

BLANK_SIDE = 224  # pixels of the grey picture that stands for a blank one
IN_A_ROW = 8  # pictures, or questions without any, that fail before the server is given up
_FINISH = {"stop": "eos", "": "eos", "length": "length"}
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")
_GO_ON = "the answers so far are kept; run the same command again to go on"
_KEY = "give its key by --api-key-env"
_ROUTE = "check --endpoint and --model"
_OF_ALL = {401: _KEY, 402: _KEY, 403: _KEY, 404: _ROUTE, 405: _ROUTE}
"""Statuses that every question would get, and the remedy."""


class EndpointModel:
    """A model behind an endpoint. concurrency: requests in flight.

    Its weights cannot be seen: answers belong to the URL and the model's name.
    """

    asked_again: Collection[str] = (REFUSED, TOO_LONG, FAILED)

    def __init__(self, endpoint: Endpoint, concurrency: int = 8) -> None:
        self.endpoint = endpoint
        self.concurrency = concurrency
        digest = hashlib.sha256(f"{endpoint.url}\0{endpoint.model}".encode("utf-8", "surrogateescape")).hexdigest()
        self.facts: Facts = {"model": endpoint.model, "model_digest": digest, "endpoint": endpoint.url}

    def replies(
        self, questions: Sequence[Question], max_new_tokens: int, *, blind: bool, resumed: bool = False
    ) -> Generator[Reply, None, None]:
        """See Answerer. Questions about one image are asked next to each other.

        One that the server refuses, or fails on while it answers others, costs that one, and so do all about an image
        that it fails on. Raises UserError for a server that cannot be reached, refuses everything, or only fails.
        """
        left = deque(sorted(questions, key=lambda q: (q.cluster, q.key)))
        found: SimpleQueue[_Found] = SimpleQueue()
        stopped = threading.Event()

        def pause(seconds: float) -> None:
            if stopped.wait(seconds):
                raise _StoppedError

        def work() -> None:
            endpoint = replace(self.endpoint, sleep=pause)
            while not stopped.is_set():
                try:
                    question = left.popleft()
                except IndexError:
                    return
                try:
                    found.put((question, _reply(endpoint, question, max_new_tokens, blind)))
                except _StoppedError:
                    return
                except Exception as error:
                    found.put((question, error))
                    return

        for _ in range(min(self.concurrency, len(left))):
            threading.Thread(target=work, daemon=True).start()  # whose reply nobody waits for after Ctrl-C
        try:
            yield from _counted(found, len(questions), resumed)
        finally:
            stopped.set()

    def effort(self) -> Effort:
        """See Answerer."""
        return Effort(counters={})


class _StoppedError(Exception):
    """Nobody reads the replies any more."""


_Found = tuple[Question, Reply | Exception]


def _counted(found: SimpleQueue[_Found], total: int, answered: bool) -> Generator[Reply, None, None]:
    """The replies, while some of them are answers. answered: whether there were others before."""
    failed = 0  # in a row
    about: set[object] = set()  # their pictures
    for number in range(1, total + 1):
        question, reply = found.get()
        if isinstance(reply, Exception):
            raise reply
        yield reply
        if reply.finish == FAILED:
            failed += 1
            about.add(question.images or question.key)
        else:
            failed, answered = 0, True
            about.clear()
        if len(about) >= IN_A_ROW or (number == total and not answered):
            raise UserError(f"{failed} questions in a row failed on the server, the last: {reply.why}; {_GO_ON}")


def _reply(endpoint: Endpoint, question: Question, max_new_tokens: int, blind: bool) -> Reply:
    named = f"question {question.key!r}"
    try:
        content = _content(question, blind)
    except DataError:
        return Reply(key=question.key, text="", finish=UNREADABLE)
    except UserError as error:
        return Reply(key=question.key, text="", finish=REFUSED, why=f"{named}: {error}")
    messages = [{"role": "user", "content": content}]
    try:
        done = endpoint.chat({"messages": messages, "temperature": 0, "max_tokens": max_new_tokens})
    except RefusedError as error:
        if 300 <= error.status < 400 or error.status in _OF_ALL:
            remedy = _OF_ALL.get(error.status)
            raise UserError(f"{error}; {remedy}" if remedy else str(error)) from None
        finish = TOO_LONG if any(kind in _TOO_LONG for kind in error.kinds) else REFUSED
        return Reply(key=question.key, text="", finish=finish, why=f"{named}: {error.reason}")
    except NoReplyError as error:
        if not error.reached or error.status == 429:
            raise UserError(f"{error}; {_GO_ON}") from None
        why = f"{named}: no answer after {endpoint.attempts} attempts; the last: {error.reason}"
        return Reply(key=question.key, text="", finish=FAILED, why=why)
    if done.finish not in _FINISH:
        why = f"{named}: the server ended its answer with {done.finish!r}"
        return Reply(key=question.key, text="", finish=REFUSED, latency=done.seconds, why=why)
    return Reply(
        key=question.key,
        text=done.text.strip(),
        finish=_FINISH[done.finish],
        tokens=done.tokens,
        latency=done.seconds,
    )


def _content(question: Question, blind: bool) -> Content:
    """The prompt, in which pictures stand where its markers do, or else before it.

    DataError for a picture that cannot be read, UserError for another number of markers than of pictures.
    """
    uris = [_blank() if blind else data_uri(path) for path in question.images]
    pieces = re.split(rf"\n?{IMAGE_MARKER}\n?", question.prompt)  # servers put parts on lines of their own
    if len(pieces) == 1:
        return content_of([*map(image_part, uris), text_part(question.prompt)])
    if len(uris) == 1:
        uris *= len(pieces) - 1
    if len(uris) != len(pieces) - 1:
        raise UserError(f"its prompt holds {len(pieces) - 1} {IMAGE_MARKER} for {len(uris)} images")
    parts = []
    for number, text in enumerate(pieces):
        parts += [text_part(text)] * bool(text) + [image_part(uri) for uri in uris[number : number + 1]]
    return content_of(parts)


def _blank() -> str:
    return drawn_uri(Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), (127, 127, 127)))

"""Ask a server that speaks OpenAI's chat completions: tlf-serve, vLLM, llama.cpp, a judge.

Requests go to the endpoint and nowhere else: redirects are not followed. Proxies are those that the environment names
(HTTPS_PROXY, NO_PROXY, ...), as httpx2 reads them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from tinyllava_fast.errors import LazyModule, UserError
from tinyllava_fast.fields import Fields, decode
from tinyllava_fast.log import log

if TYPE_CHECKING:
    import httpx2
else:
    httpx2 = LazyModule("httpx2", "a chat server's client")

T = TypeVar("T")
Body = Mapping[str, object]

BACKOFF_S = (1.0, 60.0)  # the first pause and the longest
BUSY = (408, 409, 425, 429)
CONNECT_S = 10.0
LARGEST_REPLY = 64 * 2**20
_LONGEST_REASON = 300


class EndpointError(UserError):
    """The endpoint gave no usable reply. reason: what happened, without the endpoint's name."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class RefusedError(EndpointError):
    """The endpoint refused the request; the same one would be refused again. kinds: its code and type, if it says."""

    def __init__(self, url: str, status: int, reason: str, kinds: tuple[str, ...] = ()) -> None:
        super().__init__(f"{url}: {reason}", reason)
        self.status = status
        self.kinds = kinds


class NoReplyError(EndpointError):
    """No attempt was answered. status: of the last reply, if there was one. reached: whether the server was there."""

    def __init__(self, url: str, attempts: int, reason: str, status: int | None, reached: bool) -> None:
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        super().__init__(f"{url}: no reply after {tried}; the last: {reason}", reason)
        self.status = status
        self.reached = reached


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    model: str
    """As the server names it."""
    finish: str
    """As the server says: "stop", "length", ...; "" if it does not."""
    tokens: int
    """Generated; 0 if the server does not say."""
    seconds: float
    """Of the attempt that was answered."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    url: up to and including /v1. model: as the server names it. key: sent as a bearer token unless it is empty.
    timeout_s: of one attempt; of a stream, of each piece. attempts: how often a request is sent while the server cannot
    be reached, is busy, fails, stalls or replies with something that is no completion. sleep: between them.
    Raises UserError for a URL that is none.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 60.0
    attempts: int = 6
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        check_url(self.url)

    def chat(self, body: Body) -> Completion:
        """Return the answer to a body of /chat/completions, to which the model's name is added.

        Raises RefusedError for a request that the server does not take, NoReplyError when all attempts have failed.
        """
        started = 0.0

        def read(response: httpx2.Response) -> Completion:
            with closing(response):
                return self._completion(_content(response, self.timeout_s), time.monotonic() - started)

        def send() -> httpx2.Response:
            nonlocal started
            started = time.monotonic()
            return self._post(body)

        return self._attempted(send, read)

    def stream(self, body: Body) -> Generator[str, None, None]:
        """Yield the pieces of an answer as they come. Closed early, it hangs up, which ends the answer.

        Raises as ``chat`` before the first piece, and EndpointError for an answer that is cut off.
        """
        response = self._attempted(lambda: self._post({**body, "stream": True}), lambda response: response)
        with closing(response):
            yield from self._pieces(response)

    def models(self) -> list[str]:
        """Return the names of the server's models. Raises as ``chat``."""

        def read(response: httpx2.Response) -> list[str]:
            with closing(response):
                reply = Fields.of(decode(_content(response, self.timeout_s).decode(), "reply"), "reply")
                return [model.text("id") for model in reply.mappings("data", empty=True)]

        return self._attempted(lambda: self._send("GET", "/models", None), read, "list of models")

    @cached_property
    def _client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx2.Timeout(self.timeout_s, connect=min(self.timeout_s, CONNECT_S), pool=None)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            return httpx2.Client(headers=headers, timeout=timeout, limits=limits)
        except (ValueError, httpx2.InvalidURL) as error:
            raise UserError(f"the proxy that the environment names cannot be used: {error}; mend or unset it") from None

    def _post(self, body: Body) -> httpx2.Response:
        return self._send("POST", "/chat/completions", {"model": self.model, **body})

    def _send(self, method: str, route: str, body: Body | None) -> httpx2.Response:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = self._client.build_request(method, self.url.rstrip("/") + route, content=content, headers=headers)
        return self._client.send(request, stream=True)

    def _attempted(
        self, send: Callable[[], httpx2.Response], read: Callable[[httpx2.Response], T], what: str = "chat completion"
    ) -> T:
        """Return what ``read`` makes of the response, as soon as an attempt gives one."""
        pause, reason, status, reached = BACKOFF_S[0], "", None, False
        for attempt in range(self.attempts):
            if attempt:
                log.info("%s: %s; trying again in %.0f s", self.url, reason, pause)
                self.sleep(pause)
                pause = min(2 * pause, BACKOFF_S[1])
            status, reached = None, True
            try:
                response = send()
                status = response.status_code
                if status == 200:
                    return read(response)
                with closing(response):
                    reason, kinds = _detail(response)
                if status < 500 and status not in BUSY:
                    raise RefusedError(self.url, status, reason, kinds)
                pause = max(pause, _retry_after(response))
            except (httpx2.RequestError, OSError) as error:  # not reached, reset, cut short, timed out
                reason, status, reached = f"{type(error).__name__}: {error}", None, not _not_reached(error)
            except RefusedError:
                raise
            except ValueError as error:  # not UTF-8, not JSON, or a field of another kind
                reason = f"the reply is no {what} ({error})"
        raise NoReplyError(self.url, self.attempts, reason, status, reached)

    def _completion(self, content: bytes, seconds: float) -> Completion:
        reply = Fields.of(decode(content.decode(), "reply"), "reply")
        choice = reply.mappings("choices")[0]
        usage = reply.mapping("usage", None)
        return Completion(
            text=choice.mapping("message").text("content", "", empty=True),
            model=reply.text("model", self.model, empty=True),
            finish=choice.text("finish_reason", "", empty=True),
            tokens=0 if usage is None else usage.integer("completion_tokens", 0, least=0),
            seconds=seconds,
        )

    def _pieces(self, response: httpx2.Response) -> Generator[str, None, None]:
        finished = False
        try:
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                chunk = Fields.of(decode(event.data, "event"), "event")
                if "error" in chunk:
                    raise EndpointError(f"{self.url}: the server ended the answer: {_plain(_told(chunk.values)[0])}")
                for choice in chunk.mappings("choices", [], empty=True)[:1]:
                    delta = choice.mapping("delta", None)
                    if delta is not None and (piece := delta.text("content", "", empty=True)):
                        yield piece
                    finished = finished or "finish_reason" in choice
        except EndpointError:
            raise
        except (httpx2.RequestError, OSError, ValueError) as error:
            raise EndpointError(f"{self.url}: the answer was cut off: {error}") from None
        if not finished:
            raise EndpointError(f"{self.url}: the answer was cut off before its end; ask again")


def check_url(url: str) -> None:
    """Raise UserError for a URL that no endpoint can have."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        known = False
    if not known or any(c.isspace() for c in url):
        raise UserError(f"{url!r} is no URL of a server; write it as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"the URL of the server at {parts.hostname} holds a name, a password, ? or #; write scheme, host, port and "
            "path alone, and give a key by the name of a variable"
        )


def at(
    url: str, model: str | None, *, key_variable: str | None, timeout_s: float = 300.0, attempts: int = 6
) -> Endpoint:
    """Return the endpoint of a command line. A URL without a path gets /v1.

    model: None asks the server, which must have one alone. key_variable: the environment variable that holds the key.
    Raises UserError for a URL that is none, a variable that holds no key, and as ``Endpoint.models``.
    """
    check_url(url)
    base = url.rstrip("/")
    base += "" if urlsplit(base).path else "/v1"
    key = _key(key_variable) if key_variable else ""
    if model is None:
        found = Endpoint(base, "", key, timeout_s, attempts).models()
        if len(found) != 1:
            listed = ", ".join(found[:10]) or "none"
            raise UserError(f"{base}: name one of its models by --model; it has {listed}")
        (model,) = found
    return Endpoint(base, model, key, timeout_s, attempts)


def _key(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        what = "is not set" if not key else "holds something that is no key"
        raise UserError(f"the variable {variable} {what}; put the server's key into it")
    return key


def _not_reached(error: Exception) -> bool:
    return isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError))


def _content(response: httpx2.Response, timeout_s: float) -> bytes:
    """The body of a response. ValueError for one that is too large, TimeoutError for one that trickles."""
    deadline, parts, size = time.monotonic() + timeout_s, [], 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY:
            raise ValueError(f"it is larger than {LARGEST_REPLY:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the reply was not complete after {timeout_s:g} s")
    return b"".join(parts)


def _detail(response: httpx2.Response) -> tuple[str, tuple[str, ...]]:
    """Return the words of a reply other than 200, and its code and type as OpenAI's errors have them."""
    status = response.status_code
    if 300 <= status < 400:
        where = _plain(response.headers.get("location", "nowhere"))
        return f"HTTP {status}: it redirects to {where}, which is not followed; give that URL", ()
    try:
        text = _content(response, CONNECT_S).decode("utf-8", "replace").strip()
    except (httpx2.RequestError, OSError, ValueError):
        text = ""
    try:
        values = decode(text, "reply")
    except ValueError:
        values = None
    said, kinds = _told(values) if isinstance(values, dict) else (text, ())
    return f"HTTP {status}: {_plain(said or response.reason_phrase)}", kinds


def _told(values: Mapping[str, object]) -> tuple[str, tuple[str, ...]]:
    """Message, and code and type, of an error in OpenAI's form or one of its kin."""
    found = values.get("error", values)
    if not isinstance(found, dict):
        return str(found), ()
    message = found.get("message", found.get("detail"))
    kinds = tuple(kind for kind in (found.get("code"), found.get("type")) if isinstance(kind, str))
    return message if isinstance(message, str) else json.dumps(found), kinds


def _plain(text: str) -> str:
    """Return what a server says, for one line of a terminal."""
    line = " ".join(text.split())[:_LONGEST_REASON]
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that a reply asks to wait, as a number or a date; at most the longest pause, 0 if it does not say."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), BACKOFF_S[1]) if seconds == seconds else 0.0

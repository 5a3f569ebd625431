"""The limits of the server, and the reading of a request's body within them: size, time, form."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import Request

from tinyllava_fast.serve.memory import parsed_bytes, share_of
from tinyllava_fast.serve.problems import ApiError, ClientGoneError, bad

MB = 2**20
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_LARGE = 64 * 1024  # bodies above are parsed in a thread


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """The most that is taken from one client, where nothing else is said. Times are in seconds."""

    body_bytes: int = 64 * MB
    image_bytes: int = 20 * MB
    pixels: int = 2**26
    """Width times height of a picture, by its header."""
    frames: int = 256
    """Frames of a picture, of which the first is shown."""
    images: int = 16
    new_tokens: int = 2048
    """Most new tokens of an answer, and how many are generated where the request names no number."""
    choices: int = 16
    messages: int = 1024
    connections: int = 1024
    memory_bytes: int = 2048 * MB
    """For bodies and decoded pictures of all requests together."""
    look_bytes: int = 8192 * MB
    """For a look inside, of which one runs at a time."""
    client_seconds: float = 30
    """For sending the head of a request, for sending its body, and for taking what is sent back."""
    fetch_seconds: float = 10
    drain_seconds: float = 60


async def read_object(request: Request, limits: ServerLimits) -> dict[str, object]:
    """Return the JSON object of a body. ApiError: 415 for another type, 413, 429, 408, 400 for what is none.

    JSON's type is insisted on: browsers send it to another origin only after asking, which is refused.
    """
    kinds = request.headers.getlist("content-type")
    if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with one header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not taken; send it without Content-Encoding")
    try:
        body = await asyncio.wait_for(_read(request, limits.body_bytes), limits.client_seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.client_seconds:g} seconds") from None
    share_of(request.scope).take(parsed_bytes(body))
    return parse_object(body) if len(body) < _LARGE else await asyncio.to_thread(parse_object, body)


async def _read(request: Request, most: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {most:,} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > most:
        raise too_large
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise too_large
        share_of(request.scope).take(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def parse_object(body: bytes) -> dict[str, object]:
    """Return a JSON object. ApiError 400 for other JSON, duplicate keys, NaN, lone surrogates, what is nested too deep.

    >>> parse_object(b'{"n": 1}')
    {'n': 1}
    """
    try:
        found = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
        if _HALF_PAIR.search(body):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise bad("the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise bad("a text of the body holds half of a surrogate pair") from None
    except RecursionError:
        raise bad("the body is nested too deep") from None
    except json.JSONDecodeError as error:
        raise bad(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # an integer of thousands of digits
        raise bad("the body holds a number that is too long") from None
    if not isinstance(found, dict):
        raise bad("the body must be a JSON object")
    return found


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise bad("a key stands twice in one object of the body", param=key[:80])
        found[key] = value
    return found


def _no_number(name: str) -> float:
    raise bad(f"the body holds {name}, which JSON does not know")

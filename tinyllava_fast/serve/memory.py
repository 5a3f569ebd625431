"""The memory that requests take together: their bodies, and their pictures as they will be decoded.

Other limits are of one request; as many of them as may wait could still be more than a machine has.
"""

from __future__ import annotations

from starlette.types import Scope

from tinyllava_fast.serve.problems import ApiError, busy

PIXEL_BYTES = 4
"""Of a decoded picture, as Pillow holds it in most modes."""
_SCOPE = "tinyllava_fast.share"


class Memory:
    """The bytes that all requests hold, of ``most``. For one thread, that of the event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0


class Share:
    """What one request holds of the memory, until it is answered."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.held = 0

    def take(self, count: int) -> None:
        """Hold so many bytes more. ApiError 429 if others hold too many, 413 if that can never be."""
        memory = self.memory
        if self.held + count > memory.most:
            raise ApiError(
                413,
                f"the request takes more than the {memory.most:,} bytes of memory that this server has for requests; "
                "send fewer or smaller pictures",
            )
        if memory.held + count > memory.most:
            raise busy("other requests hold the memory that this one needs; try again", status=429)
        memory.held += count
        self.held += count

    def release(self) -> None:
        """Hold nothing any more."""
        self.memory.held -= self.held
        self.held = 0

    def put(self, scope: Scope) -> None:
        """Let the routes find it."""
        scope[_SCOPE] = self


def share_of(scope: Scope) -> Share:
    """Return what the request of this scope holds."""
    share = scope[_SCOPE]
    assert isinstance(share, Share)  # noqa: S101 the guard has put it there
    return share


def parsed_bytes(body: bytes) -> int:
    """Return an estimate of what the objects of a JSON text take beside its strings of plain letters.

    One character beyond Latin-1 makes each of its string take four bytes.

    >>> parsed_bytes(b'{"a": [[], []]}')
    512
    """
    wide = 0 if body.isascii() and b"\\u" not in body else 4 * len(body)
    return 64 * (body.count(b",") + body.count(b"[")) + 256 * body.count(b"{") + wide

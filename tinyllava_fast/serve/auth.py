"""The guard of the server: the key, and no page of another origin in somebody's browser.

A page elsewhere can make a browser send requests here. Those carry an Origin or Sec-Fetch-Site header that says so; and
where the page's own name has been made to resolve to this machine, the Host header is a name that is not ours. (One
that is an address cannot have been made to resolve.)
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyllava_fast.log import log, place_of
from tinyllava_fast.serve.memory import Memory, Share
from tinyllava_fast.serve.metrics import Metrics
from tinyllava_fast.serve.problems import ApiError, bad, busy

ROUTES = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/look", "/v1/models", "/metrics", "/tokenize", "/detokenize"}
)
OPEN_ROUTES = frozenset({"/health", "/health/live", "/health/ready"})
"""They tell nothing that needs a key."""
WORK = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/look"})
_SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Guard:
    """Stands before the application: refuses who may not talk to it, counts what runs, and lets no error out.

    key: what clients have to know; None: nothing. hosts: names of this server beside localhost.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, memory: Memory, *, key: str | None, hosts: Iterable[str] = ()
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.memory = memory
        self.digest = None if key is None else _digest(key)
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.active = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":  # nothing else is spoken here
            return
        path, began, status = scope["path"], time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY.items():
                    headers[name] = value
                headers["cache-control"] = "no-store" if path in ROUTES else "no-cache"
            await send(message)

        self.active += path in WORK
        share = Share(self.memory)
        share.put(scope)
        try:
            self.check(path, Headers(scope=scope))
            await self.app(scope, receive, sending)
        except ApiError as error:
            await error.response()(scope, receive, sending)
        except asyncio.CancelledError:  # the process ends at once
            if not status:
                await busy("the server is stopping").response()(scope, receive, sending)
            raise
        except Exception as error:  # its text may hold what a user wrote: only its kind and place are logged
            log.error("%s: %s", path if path in ROUTES else "other", place_of(error))
            if not status:
                await ApiError(500, "the server failed on this request").response()(scope, receive, sending)
        finally:
            share.release()
            self.active -= path in WORK
            route = path if path in ROUTES or path in OPEN_ROUTES else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            if path in ROUTES:
                log.info("%s %s %d %.0f ms", scope["method"], route, status, 1000 * (time.perf_counter() - began))

    def check(self, path: str, headers: Headers) -> None:
        """Raise ApiError for a request that may not be answered, or not any more."""
        self._check_origin(headers)
        if path in ROUTES or path.startswith("/v1/"):
            self._check_key(headers)
        if self.draining and path in WORK:
            raise busy("the server is stopping")

    def _check_origin(self, headers: Headers) -> None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) > 1 or len(origins) > 1:
            raise bad("a header stands twice")
        host = hosts[0].lower() if hosts else ""
        if hosts and not self._is_ours(host):
            raise ApiError(403, "this server does not go by the name in the Host header; see --host-name")
        if origins and urlsplit(origins[0].lower()).netloc != host:
            raise ApiError(403, "requests of pages from another origin are refused")
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        if site not in ("none", "same-origin") and mode != "navigate":
            raise ApiError(403, "requests of pages from another origin are refused")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_key(self, headers: Headers) -> None:
        if self.digest is None:
            return
        given = headers.getlist("authorization")
        kind, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Digests: comparing them takes as long for a key of any length.
        right = hmac.compare_digest(_digest(key), self.digest)
        if not right or kind.lower() != "bearer":
            raise ApiError(
                401,
                "a key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

"""Fetching pictures from hosts that the operator allows, and from nowhere else.

A name is looked up once; all its addresses must be public, and the connection goes to the one that was checked, so a
second look-up with another answer has no effect. Every redirect begins anew. One deadline covers all of it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from tinyllava_fast.serve.problems import bad

REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host and port."""

_SHARED_V6 = tuple(
    map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "fec0::/10"))
)
# which hold an address of version 4, or are local


def is_public(address: str) -> bool:
    """Return whether an address is one of the public internet, and not another one's other form.

    >>> is_public("93.184.216.34"), is_public("::ffff:127.0.0.1"), is_public("169.254.169.254")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _SHARED_V6):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


async def look_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class Fetcher:
    """Fetches http(s) URLs of some hosts.

    hosts: exact names, "host" for the usual ports or "host:port". most: bytes. seconds: for the whole of it.
    resolve, allowed: how names are looked up, and which addresses may be connected to.
    """

    hosts: frozenset[str]
    most: int
    seconds: float
    resolve: Resolve = look_up
    allowed: Callable[[str], bool] = is_public

    async def __call__(self, url: str) -> bytes:
        """Return what the URL holds. ApiError 400 for hosts and addresses that are not allowed, and what goes wrong."""
        try:
            return await asyncio.wait_for(self._follow(url), self.seconds)
        except asyncio.TimeoutError:
            raise bad(f"its host took longer than {self.seconds:g} seconds") from None
        except (OSError, ssl.SSLError, h11.ProtocolError, UnicodeError):
            raise bad("its host could not be read from") from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(REDIRECTS + 1):
            parts, host, port = self._checked(url)
            status, location, content = await self._get(parts, host, port)
            if status == 200:
                return content
            if status not in (301, 302, 303, 307, 308) or not location:
                raise bad("its host did not answer with a file")
            url = urljoin(url, location)
        raise bad("its host redirects too often")

    def _checked(self, url: str) -> tuple[SplitResult, str, int]:
        """The parts of a URL whose host is allowed, its name and port."""
        refused = bad("its host is not one that this server fetches from")
        if not url.isascii() or any(c <= " " or c == "\\" or c == "\x7f" for c in url):
            raise refused
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise refused from None
        if parts.scheme not in _PORTS or parts.username is not None or parts.password is not None:
            raise refused
        usual = _PORTS[parts.scheme]
        name = host if port in (None, usual) else f"{host}:{port}"
        if not host or name not in self.hosts:
            raise refused
        return parts, host, port or usual

    async def _get(self, parts: SplitResult, host: str, port: int) -> tuple[int, str, bytes]:
        """Status, location and content of one request."""
        addresses = await self.resolve(host, port)
        if not addresses or not all(map(self.allowed, addresses)):
            raise bad("its host is not one that this server fetches from")
        context = ssl.create_default_context() if parts.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            addresses[0], port, ssl=context, server_hostname=host if context else None
        )
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            return await self._exchange(reader, writer, host if port in _PORTS.values() else f"{host}:{port}", target)
        finally:
            writer.transport.abort()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, target: str
    ) -> tuple[int, str, bytes]:
        peer = h11.Connection(h11.CLIENT)
        headers = [("Host", host), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
        writer.write(peer.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        writer.write(peer.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        status, location, content = 0, "", bytearray()
        while True:
            event = peer.next_event()
            if event is h11.NEED_DATA:
                peer.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                status, found = event.status_code, dict(event.headers)
                location = found.get(b"location", b"").decode("latin-1")
                if found.get(b"content-encoding", b"identity") != b"identity":
                    raise bad("its host did not answer with a file")
                if status != 200:
                    return status, location, b""
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > self.most:
                    raise bad(f"an image of more than {self.most:,} bytes")
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                return status, location, bytes(content)

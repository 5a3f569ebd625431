"""Pictures are fetched from allowed names at public addresses, over the connection that was checked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tinyllava_fast.serve.fetch import Fetcher, is_public
from tinyllava_fast.serve.problems import ApiError

Handler = Callable[[str], bytes]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture"


def fetched(answers: dict[str, bytes | list[bytes]], path: str = "/a", seconds: float = 5, **options: object) -> bytes:
    """What a fetcher gets from a server at a "public" address; looked counts the look-ups of each name."""
    looked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wanted = (await reader.readline()).split()[1].decode()
        while (await reader.readline()).strip():
            pass
        answer = answers[wanted]
        for part in answer if isinstance(answer, list) else [answer]:
            writer.write(part)
            await asyncio.sleep(0.02 if isinstance(answer, list) else 0)
        if not isinstance(answer, list):
            writer.close()

    async def main() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]

        async def resolve(host: str, _: int) -> list[str]:
            looked.append(host)
            # the second look-up of a name gives another address: one may be made for each connection
            known = {
                "public.test": ["127.0.0.1"],
                "private.test": ["10.0.0.1"],
                "mixed.test": ["127.0.0.1", "10.0.0.1"],
            }
            return known[host] if looked.count(host) < 3 else ["10.0.0.1"]

        names = ("public.test", "private.test", "mixed.test")
        hosts = frozenset(f"{name}:{port}" for name in names)
        fetcher = Fetcher(hosts, 1000, seconds, resolve=resolve, allowed=lambda address: address == "127.0.0.1")
        for key in list(answers):
            value = answers[key]
            if isinstance(value, bytes):
                answers[key] = value.replace(b"PORT", str(port).encode())
        try:
            return await fetcher(str(options.get("url", "http://public.test:{port}")).format(port=port) + path)
        finally:
            server.close()

    return asyncio.run(main())


def refused(why: str, *arguments: object, **options: object) -> None:
    with pytest.raises(ApiError, match=why) as found:
        fetched(*arguments, **options)  # type: ignore[arg-type]
    assert found.value.status == 400


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_picture_is_fetched():
    assert fetched({"/a": OK}) == b"picture"
    assert fetched({"/a?b=c": OK}, "/a?b=c#d") == b"picture"
    assert fetched({"/a": redirect("/b"), "/b": OK}) == b"picture"
    assert fetched({"/a": b"HTTP/1.0 200 OK\r\n\r\nuntil the end"}) == b"until the end"


@pytest.mark.parametrize(
    "to",
    [
        "http://private.test:PORT/b",
        "http://mixed.test:PORT/b",
        "http://127.0.0.1:PORT/b",
        "http://other.test/b",
        "file:///etc/passwd",
        "gopher://public.test:PORT/b",
        "http://public.test:22/b",
    ],
)
def test_redirects_are_checked_anew(to):
    refused("not one that this server fetches from", {"/a": redirect(to), "/b": OK})


def test_every_address_of_a_name_is_checked():
    for name in ("private.test", "mixed.test"):
        refused("not one that this server fetches from", {"/a": OK}, url=f"http://{name}:{{port}}")


def test_a_name_that_changes_its_address_is_refused_from_then_on():
    refused("not one", {"/a": redirect("/b"), "/b": redirect("/c"), "/c": OK})


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (redirect("/a"), "not one that|too often"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "did not answer with a file"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + bytes(2000), "more than 1,000 bytes"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 7\r\n\r\npicture",
            "did not answer with a file",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npicture", "could not be read"),
        (b"SSH-2.0-OpenSSH\r\n", "could not be read"),
        (b"", "could not be read"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", *[b"x"] * 60], "longer than"),
        ([b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 60], "longer than"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_answers_that_are_none(answer, why):
    refused(why, {"/a": answer}, seconds=0.4)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:1::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


def test_the_deadline_covers_the_look_up():
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.sleep(5)
        return []

    fetcher: Callable[[str], Awaitable[bytes]] = Fetcher(frozenset({"a.test"}), 10, 0.05, resolve=slow)
    with pytest.raises(ApiError, match="longer than"):
        asyncio.run(fetcher("http://a.test/"))

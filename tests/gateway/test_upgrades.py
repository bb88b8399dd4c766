"""Clients that offer another protocol, or speak an older one, are answered as HTTP/1.1 has it.

The JDK's HttpClient offers h2c with its first request, and `curl --http2` with each. httptools
drops the body of such a request.
"""

import asyncio
import json
import random

import pytest

from services.gateway.generation import Began, Piece
from tests.gateway.fake_core import FOREVER, FakeCore, http_server
from tests.security.test_http_door import connect, send

OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n",
    "TLS": b"upgrade: TLS/1.2, HTTP/1.1\r\nconnection: upgrade\r\n",
    "no connection": b"Upgrade: h2c\r\n",
    "two lines": b"Connection: upgrade\r\nConnection: keep-alive\r\nUpgrade: x\r\nUpgrade: y\r\n",
}
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
CLOSE = b"GET /livez HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n"


def head(fields: bytes, offer: bytes = OFFERS["h2c"], version: bytes = b"1.1") -> bytes:
    start = b"POST /v1/chat/completions HTTP/" + version + b"\r\nhost: here\r\n"
    return start + offer + fields + b"\r\n"


def with_length(offer: bytes, body: bytes = BODY) -> tuple[bytes, bytes]:
    return head(b"content-length: %d\r\n" % len(body), offer), body


def in_chunks(offer: bytes) -> tuple[bytes, bytes]:
    chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(p), p) for p in (BODY[:7], BODY[7:]))
    return head(b"transfer-encoding: chunked\r\n", offer), chunks + b"0\r\nt: u\r\n\r\n"


def cut(data: bytes, seed: int) -> list[bytes]:
    """Return the data in some pieces."""
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, len(data)), 5))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("form", [with_length, in_chunks])
async def test_an_offer_to_upgrade_is_ignored(offer: str, form: object) -> None:
    core = FakeCore()
    assert callable(form)
    one = b"".join(form(OFFERS[offer]))
    async with http_server(core) as port, asyncio.timeout(30):
        for pieces in ([one, CLOSE], [one * 3 + CLOSE], cut(one * 2 + CLOSE, seed=1)):
            before = len(core.requests)
            answer = await send(await connect(port), *pieces)
            asked = len(core.requests) - before
            assert asked == max(1, b"".join(pieces).count(b"POST"))
            assert answer.count(b"HTTP/1.1 200") == asked + 1, "each request, and /livez"
            assert answer.count(b'"content":"Hello"') == asked


async def test_an_offer_without_a_body_is_ignored() -> None:
    get = b"GET /livez HTTP/1.1\r\nhost: here\r\n" + OFFERS["h2c"] + b"\r\n"
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        answer = await send(await connect(port), get * 2 + CLOSE)
        assert answer.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    ("first", "more", "status"),
    [
        (head(b"transfer-encoding: chunked\r\n"), b"1\r\nx\r\n" * 10_000, b"400"),
        (head(b"transfer-encoding: chunked\r\n") + b"1;", b"a" * 1000, b"400"),
        (head(b"transfer-encoding: chunked\r\n") + b"1\r\nx\r\n0\r\n", b"a: b\r\n" * 1000, b"431"),
        (head(b"content-length: 0\r\n")[:-2], b"a: b\r\n" * 1000, b"431"),
        (head(b"content-length: 2\r\ntransfer-encoding: chunked\r\n"), b"", b"400"),
        (head(b"transfer-encoding: chunked\r\n") + b"zz\r\n", b"", b"400"),
        (b"CONNECT here:80 HTTP/1.1\r\nhost: here:80\r\n\r\n", b"", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"", b"505"),
    ],
    ids=["chunks", "extension", "trailers", "head", "two lengths", "no chunk", "CONNECT", "HTTP/2"],
)
async def test_what_offers_an_upgrade_has_the_same_bounds(
    first: bytes, more: bytes, status: bytes
) -> None:
    core = FakeCore()
    async with http_server(core) as port, asyncio.timeout(30):
        answer = await send(await connect(port), first, *[more] * 200)
        assert answer.split(b" ")[1] == status
        assert not core.requests


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    stream = BODY[:-1] + b', "stream": true}'
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        for body in (BODY, stream):
            start = head(b"content-length: %d\r\n" % len(body), b"", b"1.0")
            answer = await send(await connect(port), start + body)
            answer_head, _, content = answer.partition(b"\r\n\r\n")
            assert answer_head.startswith(b"HTTP/1.1 200") and b"chunked" not in answer_head
            assert b"connection: close" in answer_head
            if body is BODY:
                assert json.loads(content)["choices"]
            else:
                assert content.startswith(b"data: {") and content.endswith(b"data: [DONE]\n\n")
        refused = await send(await connect(port), b"GET /nothing HTTP/1.0\r\n\r\n")
        assert b"content-length" in refused and json.loads(refused.partition(b"\r\n\r\n")[2])


async def test_a_stream_to_a_client_of_http_1_0_is_aborted_when_it_disconnects() -> None:
    core = FakeCore(Began(None), Piece(0, [1], "x", []), FOREVER)
    body = BODY[:-1] + b', "stream": true}'
    async with http_server(core) as port, asyncio.timeout(10):
        reader, writer = await connect(port)
        writer.write(head(b"content-length: %d\r\n" % len(body), b"", b"1.0") + body)
        await reader.readuntil(b'"content":"x"')
        writer.close()
        await writer.wait_closed()
        await core.aborted.wait()

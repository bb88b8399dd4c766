"""A request is aborted as soon as its client disconnects, whatever it waits for.

A client that only ends its side, right after it asked for a whole answer, still gets the answer.
"""

import asyncio
import json
from typing import Any

import pytest

from services.gateway.generation import Began, Piece
from services.gateway.http_protocol import BoundedProtocol
from tests.gateway.fake_core import FOREVER, HELLO, FakeCore, http_server

BEFORE_THE_FIRST_TOKEN = (FOREVER,)
IN_THE_MIDDLE = (Began(None), Piece(0, [1], "x", []), FOREVER)


def request(path: str = "chat/completions", **body: Any) -> bytes:
    content = json.dumps({"messages": [{"role": "user", "content": "hi"}], **body}).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: here\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [BEFORE_THE_FIRST_TOKEN, IN_THE_MIDDLE])
async def test_a_request_is_aborted_when_its_client_disconnects(
    monkeypatch: pytest.MonkeyPatch, script: tuple[Any, ...], stream: bool
) -> None:
    if not stream:
        monkeypatch.setattr(BoundedProtocol, "half_close_seconds", -1.0)
    core = FakeCore(*script)
    async with http_server(core) as port, asyncio.timeout(10):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(stream=stream))
        await core.waiting.wait()
        assert not core.aborted.is_set()
        writer.close()
        await writer.wait_closed()
        await core.aborted.wait()


@pytest.mark.parametrize("path", ["classify", "embeddings"])
async def test_a_request_for_no_text_is_aborted_when_its_client_disconnects(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(BoundedProtocol, "half_close_seconds", -1.0)
    core = FakeCore(Began(None), FOREVER)
    async with http_server(core) as port, asyncio.timeout(10):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(path))
        await core.waiting.wait()
        writer.close()
        await writer.wait_closed()
        await core.aborted.wait()


async def test_the_status_of_a_stream_comes_with_the_first_token() -> None:
    core = FakeCore(*IN_THE_MIDDLE)
    async with http_server(core) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(stream=True))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and b"text/event-stream" in head
        assert b'"content":"x"' in await reader.readuntil(b'"x"')
        writer.close()
        await writer.wait_closed()
        await core.aborted.wait()


async def test_an_incomplete_body_does_not_reach_the_core() -> None:
    core = FakeCore()
    async with http_server(core) as port, asyncio.timeout(10):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request()[:-5])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    assert core.requests == []


async def test_a_connection_serves_one_request_after_the_other() -> None:
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(request(stream=True))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert (await reader.readuntil(b"0\r\n\r\n")).count(b"[DONE]") == 1
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("num_requests", [1, 3])
async def test_a_client_that_only_ends_its_side_gets_a_whole_answer(num_requests: int) -> None:
    go_on = asyncio.Event()
    core = FakeCore(Began(None), go_on, *HELLO[1:])
    async with http_server(core) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request() * num_requests)
        writer.write_eof()
        await core.waiting.wait()
        go_on.set()
        assert (await reader.read()).count(b'"content":"Hello"') == num_requests
        writer.close()
        await writer.wait_closed()
    assert not core.aborted.is_set()


async def test_a_client_of_a_stream_that_ends_its_side_has_hung_up() -> None:
    core = FakeCore(*IN_THE_MIDDLE)
    async with http_server(core) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(stream=True))
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert not core.requests or core.aborted.is_set()

"""Clients that do not read their answers are cut off. What is kept for them is bounded, and they do
not block other clients."""

import asyncio
import select
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import grpc
import pytest

from common.errors import Exhausted
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway import grpc_api
from services.gateway.core import MAX_UNREAD_EVENTS
from services.gateway.generation import Began, Piece
from services.gateway.slow_readers import MIN_READ_BYTES, READ_SECONDS, ReadDeadlineProtocol
from tests.gateway.builders import Gateway, delta, error_of, request, routed
from tests.gateway.fake_core import HELLO, FakeCore, grpc_server, http_server
from tests.gateway.test_http_disconnect import request as http_request

LARGE = "x" * 100_000
ENDLESS = (Began(None), *(Piece(n, [1], LARGE, []) for n in range(1000)))
"""100 MB, which is more than sockets and flow control hold."""


@asynccontextmanager
async def client_with_little_room(port: int) -> AsyncIterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        yield client


@pytest.mark.parametrize("stream", [True, False])
async def test_an_http_client_that_does_not_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(ReadDeadlineProtocol, "read_seconds", 0.05)
    core = FakeCore(*(ENDLESS if stream else [*ENDLESS[:101], HELLO[-1]]))
    async with (
        http_server(core) as port,
        asyncio.timeout(20),
        client_with_little_room(port) as client,
    ):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, http_request(stream=stream))
        if stream:
            await core.aborted.wait()
        hung_up = select.poll()
        hung_up.register(client, 0)
        assert await asyncio.to_thread(hung_up.poll, 20_000), (
            "the connection was reset, though the client read nothing"
        )


class Transport:
    """A transport that reports the next number of unread bytes at each call."""

    def __init__(self, *unread: int) -> None:
        self.unread = list(unread)
        self.is_aborted = False
        self.socket = Mock()

    def get_write_buffer_size(self) -> int:
        return self.unread.pop(0)

    def get_extra_info(self, name: str) -> Any:
        return self.socket

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize(
    ("unread", "cut_off"),
    [
        ((9 * MIN_READ_BYTES, 8 * MIN_READ_BYTES, 7 * MIN_READ_BYTES, 5), False),
        ((9 * MIN_READ_BYTES, 8 * MIN_READ_BYTES, 7 * MIN_READ_BYTES + 1), True),
        ((MIN_READ_BYTES - 1, MIN_READ_BYTES - 2), True),
    ],
)
def test_a_client_must_read_a_minimum_of_bytes_per_interval(
    unread: tuple[int, ...], cut_off: bool
) -> None:
    protocol = ReadDeadlineProtocol.__new__(ReadDeadlineProtocol)
    transport = Transport(*unread)
    later = Mock()
    protocol.transport = transport
    protocol.loop = later
    protocol.flow = Mock()
    protocol.pause_writing()
    while transport.unread:
        seconds, look, before = later.call_later.call_args[0]
        assert seconds == READ_SECONDS
        look(before)
    assert transport.is_aborted == cut_off
    protocol.resume_writing()
    later.call_later.return_value.cancel.assert_called_once()


async def test_an_http_client_that_does_not_read_does_not_block_others() -> None:
    core = FakeCore(*ENDLESS)
    async with (
        http_server(core) as port,
        asyncio.timeout(20),
        client_with_little_room(port) as client,
    ):
        await asyncio.get_running_loop().sock_sendall(client, http_request(stream=True))
        while not core.requests:
            await asyncio.sleep(0)
        core.script = HELLO
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(http_request(stream=True))
        assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")
        assert not core.aborted.is_set()
        writer.close()
        await writer.wait_closed()


async def test_a_grpc_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_api, "READ_SECONDS", 0.5)
    core = FakeCore(*ENDLESS)
    async with (
        grpc_server(core) as address,
        asyncio.timeout(20),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
            inference_pb2.GenerateStreamRequest(text="hi")
        )
        await call.read()
        await core.aborted.wait()
        with pytest.raises(grpc.aio.AioRpcError) as cut_off:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert cut_off.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "0.5 s" in (
            cut_off.value.details() or ""
        )


async def test_an_answer_with_too_many_unread_events_fails() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed(), *(delta(n, [n], "") for n in range(MAX_UNREAD_EVENTS)))
        error = await error_of(events)
    assert isinstance(error, Exhausted) and "faster than its client reads" in error.message
    assert gateway.aborts() == [("preprocess-1", "r"), ("llm-1", "r")] and gateway.is_idle

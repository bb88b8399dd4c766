"""Attacks on the HTTP server that cost it memory, time, connections or descriptors."""

import asyncio
import contextlib
import errno
import json
import socket
import threading
from typing import Any
from unittest.mock import Mock

import pytest

from common.errors import NotFound
from services.gateway import acceptor, bodies, chat_http
from services.gateway.acceptor import Acceptor
from services.gateway.bodies import Bodies, next_deadline
from services.gateway.body_budget import BodyBudget
from services.gateway.connection_limits import ConnectionLimits
from services.gateway.core import GatewayCore
from services.gateway.http_protocol import BoundedProtocol
from services.gateway.limits import (
    BODY_PATIENCE_SECONDS,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
    MIN_BODY_BYTES_PER_SECOND,
)
from services.gateway.schema import ChatRequest, parse_chat
from tests.gateway.fake_core import FOREVER, FakeCore, http_server
from tests.gateway.test_http_disconnect import request

LIVEZ = b"GET /livez HTTP/1.1\r\nhost: here\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
OTHERS = "127.0.0.2"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(port: int, source: str = "127.0.0.1") -> Connection:
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def send(connection: Connection, *pieces: bytes) -> bytes:
    """Send the pieces until the server hangs up, and return all that it sent."""
    reader, writer = connection
    answer = asyncio.ensure_future(reader.read())
    try:
        for piece in pieces:
            if answer.done():
                break
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass
    received = await answer
    await hang_up(writer)
    return received


async def is_served(port: int, source: str = OTHERS) -> bool:
    answer = await send(await connect(port, source), LIVEZ + b"connection: close\r\n\r\n")
    return answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("first", "more", "status"),
    [
        (LIVEZ + b"x-a: ", b"a" * 10_000, b"431"),
        (LIVEZ, b"a: b\r\n" * 1000, b"431"),
        (b"GET /", b"a" * 10_000, b"431"),
        (b"", b"\r\n" * 5000, b"431"),
        (LIVEZ + b"x-a: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", b"", b"431"),
        (CHUNKED + b"1;", b"a" * 1000, b"400"),
        (CHUNKED, b"1;" + b"a" * 100 + b"\r\nx\r\n", b"400"),
        (CHUNKED + b"1\r\nx\r\n0\r\n", b"a: b\r\n" * 1000, b"431"),
        (CHUNKED + b"1\r\nx\r\n0\r\na: ", b"a" * 10_000, b"431"),
        (CHUNKED, b"1\r\nx\r\n" * 10_000, b"400"),
    ],
    ids=[
        "header",
        "headers",
        "path",
        "empty lines",
        "a long head at once",
        "chunk extension",
        "chunk extensions",
        "trailers",
        "trailer",
        "chunks",
    ],
)
async def test_what_has_no_end_is_refused(first: bytes, more: bytes, status: bytes) -> None:
    core = FakeCore()
    async with http_server(core) as port, asyncio.timeout(30):
        answer = await send(await connect(port), first, *[more] * 200)
        assert answer.split(b" ")[1] == status
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert await is_served(port) and not core.requests


async def test_a_long_head_and_extensions_within_the_bounds_are_accepted() -> None:
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        body = request().partition(b"\r\n\r\n")[2]
        head = POST + b"x-a: " + b"a" * 60_000 + b"\r\nconnection: close\r\n"
        chunks = b"".join(b"1;name=value\r\n%c\r\n" % byte for byte in body)
        trailers = b"a: b\r\n" * 5000
        answer = await send(
            await connect(port),
            head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailers + b"\r\n",
        )
        assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "status"), [(b"", b""), (LIVEZ, b"HTTP/1.1 408"), (b"\r\n", b"HTTP/1.1 408")]
)
async def test_a_head_must_be_complete_in_time(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, status: bytes
) -> None:
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.05)
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        assert (await send(await connect(port), sent))[:12] == status


async def test_the_second_head_of_a_connection_must_be_complete_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.05)
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        connection = await connect(port)
        connection[1].write(LIVEZ + b"\r\n")
        assert (await connection[0].readline()).startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 408" in await send(connection, LIVEZ)


@pytest.mark.parametrize("head", [b"content-length: 100000\r\n\r\n{", b""])
async def test_a_body_that_does_not_come_is_answered_408(
    monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(bodies, "BODY_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(bodies, "DROP_PATIENCE_SECONDS", 0.05)
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        answer = await send(await connect(port), POST + head if head else CHUNKED)
        assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("path", [b"/livez", b"/nothing"])
async def test_a_body_that_nobody_wants_holds_no_connection(
    monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    monkeypatch.setattr(bodies, "DROP_PATIENCE_SECONDS", 0.05)
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        head = b"POST %b HTTP/1.1\r\nhost: here\r\ncontent-length: 100000\r\n\r\n{" % path
        assert (await send(await connect(port), head)).startswith(b"HTTP/1.1 40")


def test_a_body_at_the_least_rate_is_in_time() -> None:
    now = 0.0
    deadline = now + BODY_PATIENCE_SECONDS
    for _ in range(4000):
        now += 1.0
        assert now < deadline
        deadline = next_deadline(deadline, MIN_BODY_BYTES_PER_SECOND, now, BODY_PATIENCE_SECONDS)
    deadline = next_deadline(deadline, 10**9, now, BODY_PATIENCE_SECONDS)
    assert deadline == now + BODY_PATIENCE_SECONDS, "what came fast does not excuse a long pause"


async def test_a_client_that_still_sends_sees_that_there_is_no_room() -> None:
    budget = BodyBudget(0)
    content = b"x" * 900_000
    async with http_server(FakeCore(), budget) as port, asyncio.timeout(10):
        for head in (b"content-length: 900000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"):
            body = content if b"length" in head else b"dbba0\r\n" + content + b"\r\n0\r\n\r\n"
            reader, writer = await connect(port)
            writer.write(POST + head + body)
            await writer.drain()  # As a client does that reads only after it has sent.
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in answer
            await hang_up(writer)
        small = await send(await connect(port), request() + LIVEZ + b"connection: close\r\n\r\n")
        assert small.startswith(b"HTTP/1.1 200"), "small bodies always fit"
        assert budget.num_held == 0


@pytest.mark.parametrize(
    "content",
    [
        b'{"messages":[' + b'{"role":"","content":""},' * 34_000 + b"{}]}",
        b'{"messages":[{"role":"user","content":"a"}],"x":[' + b"[]," * 100_000 + b"[]]}",
        b'{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema",'
        b'"json_schema":{"schema":{"enum":[' + b"[]," * 100_000 + b"[]]}}}}",
        b'{"messages":[{"role":"user","content":"a"}],"x":' + b"[" * 70 + b"]" * 70 + b"}",
    ],
    ids=["messages", "unknown field", "schema", "depth"],
)
async def test_a_body_of_many_values_is_refused_before_objects_are_built(
    monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(ChatRequest, "model_validate_json", Mock(side_effect=AssertionError))
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        head = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(content)
        answer = await send(await connect(port), head + content)
        assert answer.startswith(b"HTTP/1.1 400") and b"the body has more than" in answer


@pytest.mark.parametrize("text", ["a" * 100_000, "[]," * 5000], ids=["large", "many values"])
async def test_a_body_is_parsed_while_others_are_served(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    began = threading.Event()
    go_on = threading.Event()

    def parse_slowly(body: bytearray) -> ChatRequest:
        if len(body) > 1000:
            began.set()
            assert go_on.wait(10)
        return parse_chat(body)

    monkeypatch.setattr(chat_http, "parse_chat", parse_slowly)
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        reader, writer = await connect(port)
        writer.write(request(messages=[{"role": "user", "content": text}]))
        assert await asyncio.to_thread(began.wait, 10)
        assert await is_served(port)
        small = request().replace(b"host: here", b"host: here\r\nconnection: close", 1)
        assert (await send(await connect(port, OTHERS), small)).startswith(b"HTTP/1.1 200")
        go_on.set()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await hang_up(writer)


async def test_small_bodies_do_not_wait_for_large_ones() -> None:
    work = Bodies(10**6, BodyBudget()).work
    go_on = threading.Event()
    scope = {"client": ("127.0.0.1", 1)}
    large = asyncio.create_task(work(scope, bytearray(10**5), lambda: go_on.wait(10)))
    async with asyncio.timeout(10):
        main = threading.get_ident()
        assert await work(scope, bytearray(b"," * 5000), threading.get_ident) != main
        go_on.set()
        assert await large


async def test_unfinished_bodies_of_one_client_leave_room_for_another() -> None:
    budget = BodyBudget(2 * 10**6)
    unfinished = POST + b"content-length: 900000\r\n\r\n{"
    async with http_server(FakeCore(), budget) as port, asyncio.timeout(10):
        holder = await connect(port)
        holder[1].write(unfinished)
        while not budget.num_held:
            await asyncio.sleep(0)
        forged = POST + b"x-forwarded-for: 10.0.0.9\r\ncontent-length: 900000\r\n\r\n"
        assert b" 429 " in (await send(await connect(port), forged + b"x" * 900_000))[:20]
        other = await connect(port, OTHERS)
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 500_000}]}).encode()
        other[1].write(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert (await other[0].readline()).startswith(b"HTTP/1.1 200")
        for _, writer in (holder, other):
            await hang_up(writer)
        while budget.num_held:
            await asyncio.sleep(0)


async def test_requests_that_wait_on_one_connection_are_few() -> None:
    core = FakeCore(FOREVER)
    async with http_server(core) as port, asyncio.timeout(10):
        assert await send(await connect(port), request() * (MAX_PIPELINED + 2)) == b""
        await core.aborted.wait()
        assert len(core.requests) == 1


async def test_a_disconnect_ends_the_first_of_several_requests_of_a_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BoundedProtocol, "half_close_seconds", -1.0)
    core = FakeCore(FOREVER)
    async with http_server(core) as port, asyncio.timeout(10):
        _, writer = await connect(port)
        writer.write(request() * 3)
        await core.waiting.wait()
        await hang_up(writer)
        await core.aborted.wait()
        assert len(core.requests) == 1


async def test_connections_of_one_client_leave_room_for_another() -> None:
    async with http_server(FakeCore(), limits=ConnectionLimits(8)) as port, asyncio.timeout(10):
        held = [await connect(port) for _ in range(50)]
        assert await is_served(port)
        ended = [asyncio.ensure_future(reader.read()) for reader, _ in held]
        while sum(future.done() for future in ended) < 46:
            await asyncio.sleep(0)
        for _, writer in held:
            await hang_up(writer)
        await asyncio.gather(*ended)
        assert await is_served(port, "127.0.0.1")


async def test_connections_that_are_answered_are_not_evicted_but_further_ones_refused() -> None:
    core = FakeCore(FOREVER)
    async with http_server(core, limits=ConnectionLimits(8)) as port, asyncio.timeout(10):
        held = [await connect(port) for _ in range(4)]
        for _, writer in held:
            writer.write(request())
        while len(core.requests) < 4:
            await asyncio.sleep(0)
        assert (await send(await connect(port))).startswith(b"HTTP/1.1 429")
        assert await is_served(port) and not core.aborted.is_set()
        for _, writer in held:
            await hang_up(writer)


class Exhausted(socket.socket):
    """A listening socket that finds no descriptor a few times."""

    failures = 3

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_accepting_rests_when_descriptors_are_used_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor, "REST_SECONDS", 0.01)
    log = Mock()
    monkeypatch.setattr(acceptor, "get_logger", lambda: log)
    accepted = asyncio.Event()

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.set()
            transport.close()

    with Exhausted() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        door = Acceptor(listener, ConnectionLimits(8), lambda client: Protocol())
        async with asyncio.timeout(10):
            _, writer = await connect(listener.getsockname()[1])
            await accepted.wait()
            await hang_up(writer)
        door.close()
        await door.wait_closed()
    assert log.warning.call_count == 3, "once for each attempt, and attempts are rare"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n",
        request(messages=[{"role": "r" * 500_000, "content": ""}]),
        request(messages=[{"role": "user", "content": [{"type": "t" * 500_000}]}]),
        request(response_format={"type": "t" * 500_000}),
        request(temperature="t" * 500_000),
        request(tools="t" * 500_000),
        request(**{"k" * 500_000: 1, "stop": {"k" * 500_000: 1}}),
        request(stream_options={"include_usage": "t" * 500_000}),
        POST + b"x-request-timeout: " + b"9" * 60_000 + b"\r\nconnection: close\r\n\r\n",
        POST + b"x-request-id: " + b"9" * 60_000 + b"\r\nconnection: close\r\n\r\n",
        b"X" * 5000 + b" / HTTP/1.1\r\n\r\n",
    ],
    ids=[
        "path",
        "role",
        "part type",
        "format",
        "number",
        "unsupported",
        "name of a field",
        "option",
        "timeout",
        "id",
        "method",
    ],
)
async def test_text_from_outside_is_cut_in_every_answer(sent: bytes) -> None:
    sent = sent.replace(b"host: here\r\n", b"host: here\r\nconnection: close\r\n", 1)
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        answer = await send(await connect(port), sent)
        assert answer.startswith(b"HTTP/1.1 4") and len(answer) < 2000


def test_the_name_of_a_model_that_is_not_served_is_cut() -> None:
    with pytest.raises(NotFound) as not_found:
        GatewayCore("tiny", max_waiting=1, request_timeout=1.0).check_model("m" * 5_000_000)
    assert len(not_found.value.message) < 1000

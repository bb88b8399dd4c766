"""Every request that is refused, fails or is given up leaves one line in the log, and no other."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import structlog
from structlog.testing import LogCapture

from common.errors import Exhausted, InvalidRequest, Unavailable
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.generation import Began, Piece
from services.gateway.http_protocol import BoundedProtocol
from services.gateway.slow_readers import ReadDeadlineProtocol
from tests.gateway.fake_core import FOREVER, FakeCore, grpc_server, http_server
from tests.gateway.test_http_disconnect import request
from tests.security.test_http_door import connect, hang_up, send

BEGUN = (Began(None), Piece(0, [1], "x", []))
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\nx-request-id: mine\r\n"


@pytest.fixture
def lines() -> Any:
    """Return the lines so far, and configure the log to keep them."""
    kept = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, kept])
    yield kept.entries
    structlog.configure(**before)


def mine(data: bytes) -> bytes:
    """Return a request that has an id, and ends its connection."""
    return data.replace(b"host: here", b"host: here\r\nx-request-id: mine\r\nconnection: close", 1)


async def only_line(lines: list[Any]) -> tuple[int, str]:
    """Return the status and the reason of the request's only line, once it is there."""
    while not lines:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    [line] = lines
    assert line["request_id"] == "mine" and line["log_level"] in ("info", "warning")
    return line["status"], line["reason"]


@pytest.mark.parametrize(
    ("core", "sent", "status", "reason"),
    [
        (FakeCore(), mine(request(temperature=-1)), 400, "temperature"),
        (FakeCore(), mine(request(model="other")), 404, "other"),
        (FakeCore(), mine(b"GET /nothing HTTP/1.1\r\nhost: here\r\n\r\n"), 404, "/nothing"),
        (FakeCore(), mine(b"PUT /v1/models HTTP/1.1\r\nhost: here\r\n\r\n"), 405, "/v1/models"),
        (FakeCore(), HEAD + b"content-length: 9999999\r\n\r\n", 413, "larger"),
        (FakeCore(), mine(request()).replace(b"\r\n", b"\r\ncontent-type: a/b\r\n", 1), 415, "a/b"),
        (FakeCore(), HEAD + b"x: \0\r\n\r\n", 400, "not a valid"),
        (FakeCore(), HEAD + b"x: " + b"x" * 70_000, 431, "bytes"),
        (FakeCore(), HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, "not a valid"),
        (FakeCore(refusal=Exhausted("full")), mine(request()), 429, "full"),
        (FakeCore(InvalidRequest("bad image")), mine(request()), 400, "bad image"),
        (FakeCore(Unavailable("no llm")), mine(request(stream=True)), 503, "no llm"),
        (FakeCore(*BEGUN, Unavailable("died")), mine(request(stream=True)), 503, "died"),
        (FakeCore(*BEGUN, Unavailable("died")), mine(request()), 503, "died"),
    ],
)
async def test_a_refusal_over_http_leaves_one_line(
    monkeypatch: pytest.MonkeyPatch,
    lines: list[Any],
    core: FakeCore,
    sent: bytes,
    status: int,
    reason: str,
) -> None:
    monkeypatch.setattr("services.gateway.bodies.DROP_PATIENCE_SECONDS", 0.05)
    async with http_server(core) as port, asyncio.timeout(10):
        await send(await connect(port), sent)
        seen = await only_line(lines)
    assert seen[0] == status and reason in seen[1]
    assert len(lines) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_leaves_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[Any], stream: bool
) -> None:
    monkeypatch.setattr(BoundedProtocol, "half_close_seconds", -1.0)
    core = FakeCore(*BEGUN, FOREVER)
    async with http_server(core) as port, asyncio.timeout(10):
        _, writer = await connect(port)
        writer.write(mine(request(stream=stream)))
        await core.waiting.wait()
        await hang_up(writer)
        assert await only_line(lines) == (499, "the client hung up")
    assert len(lines) == 1


async def test_a_client_that_hangs_up_in_its_body_leaves_one_line(lines: list[Any]) -> None:
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        reader, writer = await connect(port)
        writer.write(HEAD + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n{")
        await reader.readline()  # the application waits for the body
        await hang_up(writer)
        assert (await only_line(lines))[0] == 499
    assert len(lines) == 1


async def test_a_client_that_does_not_read_leaves_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[Any]
) -> None:
    monkeypatch.setattr(ReadDeadlineProtocol, "read_seconds", 0.05)
    core = FakeCore(Began(None), *(Piece(n, [1], "x" * 100_000, []) for n in range(1000)))
    async with http_server(core) as port, asyncio.timeout(20):
        _, writer = await connect(port)
        writer.write(mine(request(stream=True)))
        status, reason = await only_line(lines)
        assert status == 499 and "unread" in reason
        await hang_up(writer)
    assert len(lines) == 1


async def test_an_answer_leaves_no_line_here(lines: list[Any]) -> None:
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        await send(await connect(port), mine(request()))
        await send(await connect(port), mine(request(stream=True)))
    assert lines == []


Call = Callable[[Any], Any]
ASK = {"text": "hi", "request_id": "mine"}


@pytest.mark.parametrize(
    ("core", "fields", "status", "reason"),
    [
        (FakeCore(), {"model": "other"}, 404, "other"),
        (FakeCore(), {"sampling": {"temperature": -1}}, 400, "temperature"),
        (FakeCore(refusal=Exhausted("full")), {}, 429, "full"),
        (FakeCore(Unavailable("no llm")), {}, 503, "no llm"),
        (FakeCore(*BEGUN, Unavailable("died")), {}, 503, "died"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_over_grpc_leaves_one_line(
    lines: list[Any],
    core: FakeCore,
    fields: dict[str, Any],
    status: int,
    reason: str,
    stream: bool,
) -> None:
    kind = inference_pb2.GenerateStreamRequest if stream else inference_pb2.GenerateRequest
    async with grpc_server(core) as address, asyncio.timeout(10):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = (stub.GenerateStream if stream else stub.Generate)(kind(**ASK | fields))
            with pytest.raises(grpc.aio.AioRpcError):
                [event async for event in call] if stream else await call
        seen = await only_line(lines)
    assert seen[0] == status and reason in seen[1]
    assert len(lines) == 1


async def test_a_call_that_is_cancelled_leaves_one_line(lines: list[Any]) -> None:
    core = FakeCore(*BEGUN, FOREVER)
    async with (
        grpc_server(core) as address,
        grpc.aio.insecure_channel(address) as channel,
        asyncio.timeout(10),
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(inference_pb2.GenerateStreamRequest(**ASK))
        await core.waiting.wait()
        call.cancel()
        assert await only_line(lines) == (499, "the client hung up")
    assert len(lines) == 1


async def test_a_refused_call_of_the_control_plane_leaves_one_line(lines: list[Any]) -> None:
    async with (
        grpc_server(FakeCore()) as address,
        grpc.aio.insecure_channel(address) as channel,
        asyncio.timeout(10),
    ):
        drain = channel.unary_unary("/twinlens.control.v1.ControlService/Drain")
        with pytest.raises(grpc.aio.AioRpcError):
            await drain(b"\xff" * 10, metadata=[("x-request-id", "mine")])
        status, reason = await only_line(lines)
        assert status == 400 and "message" in reason

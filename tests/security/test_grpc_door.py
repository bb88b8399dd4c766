"""Attacks on the gRPC API that need one client and a few bytes."""

import asyncio
import gzip
import logging
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.gateway.readiness import MAX_WATCHES_PER_CONNECTION
from tests.gateway.fake_core import FakeCore, grpc_server
from tests.security.http2 import RawCall

INFERENCE = "/twinlens.inference.v1.InferenceService/"
CONTROL = "/twinlens.control.v1.ControlService/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = (
    INFERENCE + "Generate",
    INFERENCE + "GenerateStream",
    HEALTH + "Check",
    HEALTH + "Watch",
    CONTROL + "ListMembers",
    CONTROL + "Drain",
    CONTROL + "Scale",
    REFLECTION,
)
INTERNAL = re.compile(
    r"Error\b|Exception|Traceback|google\.|\.py|0x[0-9a-f]+|unix:|ipc:|tcp:|127\."
)
"""What no text for a client may have."""


@pytest.fixture
async def address() -> AsyncIterator[str]:
    async with grpc_server(FakeCore()) as address:
        yield address


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel


async def answer(
    channel: grpc.aio.Channel, method: str, message: bytes, **options: Any
) -> tuple[str, str]:
    """Return code and text of the answer to a call with this message."""
    call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
    try:
        await call(message, timeout=10, **options)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


def watch(channel: grpc.aio.Channel, service: bytes = b"") -> Any:
    method = channel.unary_stream(
        HEALTH + "Watch", request_serializer=bytes, response_deserializer=bytes
    )
    return method(service)


def field(number: int, value: bytes) -> bytes:
    """Return a field that is shorter than 128 bytes, or has a length of two or more digits."""
    size = len(value)
    length = b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\xff" * 10, id="endless number"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x0f", id="length beyond the end"),
        pytest.param(b"\x0a\x05ab", id="truncated"),
        pytest.param(b"\x0b" * 200 + b"\x0c" * 200, id="deep groups"),
        pytest.param(random.Random(7).randbytes(300), id="noise"),
        pytest.param(b"\x0a\x03\xff\xfe\xfd", id="invalid UTF-8"),
    ],
)
async def test_bytes_that_are_no_message_are_refused_with_a_plain_text(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture, method: str, message: bytes
) -> None:
    if method == CONTROL + "ListMembers" and message.startswith(b"\x0a\x03"):
        return  # its request has no fields, so this is an unknown one
    code, text = await answer(channel, method, message)
    assert code == "INVALID_ARGUMENT" and text
    assert not INTERNAL.search(text)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("path", [b"/\xff\xfe", b"\xff", HEALTH.encode() + b"\xff"])
async def test_a_path_that_is_not_utf8_does_not_end_the_server(address: str, path: bytes) -> None:
    async with RawCall(address, path) as call:
        assert b"Method not found" in await call.answer_until(b"grpc-status")
    async with grpc.aio.insecure_channel(address) as channel:
        assert await answer(channel, HEALTH + "Check", b"") == ("OK", "")


async def test_metadata_that_is_not_utf8_leaves_no_traceback(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    headers = ((b"x-request-id", b"\xff\xfe"), (b"x-a", b"\xff"))
    async with RawCall(address, HEALTH.encode() + b"Check", headers, b"") as call:
        await call.answer_until(b"grpc-status")
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_compressed_message_is_not_unpacked(channel: grpc.aio.Channel) -> None:
    bomb = field(3, b"a" * 900_000)
    assert len(gzip.compress(bomb)) < 2000
    code, _ = await answer(channel, INFERENCE + "Generate", bomb, compression=grpc.Compression.Gzip)
    assert code == "UNIMPLEMENTED"


async def test_a_long_name_is_not_echoed(channel: grpc.aio.Channel) -> None:
    for size in (1000, 50_000, 900_000):
        name = b"x" * size
        for method, message in (
            (INFERENCE + "Generate", field(2, name) + field(3, b"hi")),
            (HEALTH + "Check", field(1, name)),
            (REFLECTION, field(4, name)),
        ):
            code, text = await answer(channel, method, message)
            assert code in ("NOT_FOUND", "INVALID_ARGUMENT", "OK") and len(text) < 2000


async def test_a_missing_controller_is_named_without_its_address(
    channel: grpc.aio.Channel,
) -> None:
    code, text = await answer(channel, CONTROL + "ListMembers", b"")
    assert (code, text) == ("UNAVAILABLE", "the controller does not answer")


async def test_watches_leave_streams_of_their_connection_for_checks(
    channel: grpc.aio.Channel,
) -> None:
    async with asyncio.timeout(30):
        watches = [watch(channel) for _ in range(99)]
        # Fewer than the streams of a connection: all are answered, or refused, at once.
        codes = [await read_or_code(call) for call in watches]
        assert codes.count("SERVING") == MAX_WATCHES_PER_CONNECTION
        assert codes.count("RESOURCE_EXHAUSTED") == 99 - MAX_WATCHES_PER_CONNECTION
        assert await answer(channel, HEALTH + "Check", b"") == ("OK", "")
        assert await answer(channel, INFERENCE + "Generate", field(3, b"hi")) == ("OK", "")
        for call in watches:
            call.cancel()


async def read_or_code(call: Any) -> str:
    try:
        await call.read()
        return "SERVING"
    except grpc.aio.AioRpcError as error:
        return error.code().name


async def test_a_connection_has_a_limited_number_of_streams(address: str) -> None:
    async with RawCall(address, HEALTH.encode() + b"Check") as call:
        settings = await call.settings()
    assert settings[3] == 100  # SETTINGS_MAX_CONCURRENT_STREAMS
    assert settings.get(4, 65_535) <= 65_536  # SETTINGS_INITIAL_WINDOW_SIZE


async def test_a_client_that_sends_no_message_is_not_waited_for_by_others(address: str) -> None:
    logging.getLogger().setLevel(logging.INFO)
    silent = [RawCall(address, (INFERENCE + "Generate").encode()) for _ in range(20)]
    for call in silent:
        await call.__aenter__()
    async with asyncio.timeout(30), grpc.aio.insecure_channel(address) as channel:
        assert await answer(channel, INFERENCE + "Generate", field(3, b"hi")) == ("OK", "")
    for call in silent:
        await call.__aexit__(None, None, None)

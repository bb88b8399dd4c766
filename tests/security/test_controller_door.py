"""Attacks on the controller's gRPC port that need a few bytes."""

from collections.abc import AsyncIterator

import grpc
import pytest

from common.errors import InvalidRequest
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller.__main__ import MAX_MESSAGE_BYTES, describe_controller, start_server
from services.controller.service import ControlServicer, JoinStream
from tests.security.http2 import RawCall
from tests.security.test_grpc_door import CONTROL, INTERNAL, answer


@pytest.fixture
async def address(unused_tcp_port: int) -> AsyncIterator[str]:
    address = f"127.0.0.1:{unused_tcp_port}"
    server = await start_server(ControlServicer(describe_controller("")), address)
    yield address
    await server.stop(None)


async def members(address: str) -> list[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        answer = await stub.ListMembers(control_pb2.ListMembersRequest(), timeout=10)
        return [member.role for member in answer.members]


@pytest.mark.parametrize("method", ["Join", "ListMembers", "Drain", "Scale"])
@pytest.mark.parametrize("message", [b"\xff" * 10, b"\x0a\x05ab"])
async def test_bytes_that_are_no_message_are_refused_with_a_plain_text(
    address: str, caplog: pytest.LogCaptureFixture, method: str, message: bytes
) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        code, text = await answer(channel, CONTROL + method, message)
    assert code == "INVALID_ARGUMENT" and text and not INTERNAL.search(text)
    assert not [record for record in caplog.records if record.exc_info]
    assert await members(address) == ["controller"]


async def test_a_member_with_an_endless_detail_is_refused(address: str) -> None:
    member = control_pb2.Member(id="llm-1", role="llm", detail="x" * MAX_MESSAGE_BYTES)
    report = control_pb2.JoinRequest(member=member).SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        code, _ = await answer(channel, CONTROL + "Join", report)
    assert code == "INVALID_ARGUMENT"
    assert await members(address) == ["controller"]


async def test_a_path_that_is_not_utf8_does_not_end_the_server(address: str) -> None:
    async with RawCall(address, b"/\xff\xfe") as call:
        assert b"Method not found" in await call.answer_until(b"grpc-status")
    assert await members(address) == ["controller"]


async def test_garbage_after_the_first_report_ends_the_stream_only(address: str) -> None:
    report = control_pb2.JoinRequest(member=control_pb2.Member(id="llm-1", role="llm", state=2))
    messages = [report.SerializeToString(), b"\xff" * 10]
    async with grpc.aio.insecure_channel(address) as channel:
        join = channel.stream_stream(
            CONTROL + "Join", request_serializer=bytes, response_deserializer=bytes
        )
        assert len([each async for each in join(iter(messages), timeout=10)]) <= 2
    assert await members(address) == ["controller", "llm"]


async def test_reading_a_report_that_is_no_message_raises_nothing() -> None:
    async def broken() -> AsyncIterator[control_pb2.JoinRequest]:
        raise InvalidRequest("the bytes sent are not a message of this method")
        yield

    stream = JoinStream(control_pb2.JoinRequest())
    await ControlServicer(describe_controller(""))._read_reports(broken(), stream)
    assert stream.changed.is_set()

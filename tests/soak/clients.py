"""The soak's clients, of HTTP and gRPC.

HTTP is spoken over bare sockets, which can be read slowly and closed at any byte.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import h11
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.soak.answers import BY_CODE, BY_STATUS, Answer, CallFailed, HungUp, Outcome
from tests.soak.attacks import GRPC, HTTP, attack_grpc, attack_http
from tests.soak.workload import SAMPLED_TOP_K, Call, files_of, text_of

LATE_SECONDS = 20.0
"""How long after its deadline a call is given up as lost."""
PAUSE_SECONDS = 0.05
"""How long a slow reader waits before each piece."""
SLOW_BUFFER_BYTES = 4096
MEDIA_TYPES = {b"\x89PNG": "image/png", b"RIFF": "image/webp"}
FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_REPETITION: "repetition",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


class Client:
    """One client of a running system; its calls may overlap."""

    def __init__(self, http_port: int, grpc_port: int, model: str) -> None:
        self._http_port = http_port
        self._model = model
        self._channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{grpc_port}", options=[("grpc.max_send_message_length", -1)]
        )
        self._attacking_channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{grpc_port}",
            options=[("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()
        await self._attacking_channel.close()

    async def ask(self, call: Call) -> Outcome:
        answer = Answer()
        began = time.monotonic()
        outcome = await self._ask(call, answer)
        outcome.seconds = time.monotonic() - began
        return outcome

    async def _ask(self, call: Call, answer: Answer) -> Outcome:
        hangs_up_by_time = call.manner == "hangs_up" and not call.hang_up_pieces
        try:
            async with asyncio.timeout(
                call.hang_up_seconds if hangs_up_by_time else call.deadline + LATE_SECONDS
            ):
                await self._way_of(call)(call, answer)
        except TimeoutError:
            return Outcome(
                "hung_up" if hangs_up_by_time else "nothing", answer, message="no end in time"
            )
        except HungUp:
            return Outcome("hung_up", answer)
        except CallFailed as error:
            return Outcome("error", answer, error.code, error.message, error.stage)
        except (OSError, h11.ProtocolError) as error:
            return Outcome("nothing", answer, message=f"{type(error).__name__}: {error}")
        return Outcome(
            "answered" if answer.finish_reasons else "nothing",
            answer,
            message="the stream stopped without an end",
        )

    def _way_of(self, call: Call) -> Callable[[Call, Answer], Awaitable[None]]:
        """Return the method that sends a call."""
        if call.poison in HTTP or call.poison in GRPC:
            return self._attack
        return self._ask_http if call.api == "http" else self._ask_grpc

    async def _attack(self, call: Call, answer: Answer) -> None:
        if call.poison in GRPC:
            await attack_grpc(self._attacking_channel, call.poison, call.deadline)
        else:
            read_whole(*await attack_http(self._http_port, call.poison), answer)

    async def _after_piece(self, call: Call, num_pieces: int) -> None:
        if call.manner == "slow":
            await asyncio.sleep(PAUSE_SECONDS)
        if call.manner == "hangs_up" and num_pieces == call.hang_up_pieces:
            raise HungUp

    async def _ask_http(self, call: Call, answer: Answer) -> None:
        limit = SLOW_BUFFER_BYTES if call.manner == "slow" else 2**16
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port, limit=limit)
        try:
            connection = h11.Connection(h11.CLIENT)
            body = json.dumps(http_body(call, self._model)).encode()
            head = [
                ("host", "soak"),
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            head.append(("x-request-timeout", f"{call.deadline:.3f}"))
            writer.write(
                connection.send(
                    h11.Request(method="POST", target="/v1/chat/completions", headers=head)
                )
            )
            writer.write(connection.send(h11.Data(data=body)))
            connection.send(h11.EndOfMessage())
            await writer.drain()
            await self._read_http(call, http_events(reader, connection), answer)
        finally:
            writer.transport.abort()

    async def _read_http(self, call: Call, events: AsyncIterator[Any], answer: Answer) -> None:
        response = await anext(events)
        if response.status_code != 200 or not call.is_streamed:
            read_whole(
                response.status_code,
                b"".join([bytes(event.data) async for event in events]),
                answer,
            )
            return
        num_pieces = 0
        is_done = False
        async for data in sse_data(events):
            if is_done:
                answer.oddities.append("an event after [DONE]")
            elif data == b"[DONE]":
                is_done = True
            elif read_chunk(json.loads(data), answer):
                num_pieces += 1
                await self._after_piece(call, num_pieces)
        if answer.finish_reasons and not is_done:
            answer.oddities.append("no [DONE]")

    async def _ask_grpc(self, call: Call, answer: Answer) -> None:
        try:
            if call.is_streamed:
                await self._read_stream(call, answer)
            else:
                response = await self._stub.Generate(
                    inference_pb2.GenerateRequest(**grpc_fields(call)), timeout=call.deadline
                )
                answer.add(list(response.token_ids), response.text)
                answer.end(FINISH_REASONS[response.finish_reason])
                answer.num_completion_tokens = response.usage.completion_tokens
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().name, error.details() or "", stage_of(error)) from error

    async def _read_stream(self, call: Call, answer: Answer) -> None:
        stream = self._stub.GenerateStream(
            inference_pb2.GenerateStreamRequest(**grpc_fields(call)), timeout=call.deadline
        )
        num_pieces = 0
        try:
            async for response in stream:
                match response.WhichOneof("event"):
                    case "delta":
                        answer.add(
                            list(response.delta.token_ids),
                            response.delta.text,
                            response.delta.offset,
                        )
                        num_pieces += 1
                        await self._after_piece(call, num_pieces)
                    case "end":
                        answer.end(FINISH_REASONS[response.end.finish_reason])
                        answer.num_completion_tokens = response.end.usage.completion_tokens
        finally:
            stream.cancel()


async def http_events(
    reader: asyncio.StreamReader, connection: h11.Connection
) -> AsyncIterator[Any]:
    """Yield the response, then its data."""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**14))
        elif isinstance(event, h11.EndOfMessage):
            return
        else:
            yield event


async def sse_data(events: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    buffer = b""
    async for event in events:
        *lines, buffer = (buffer + bytes(event.data)).split(b"\n\n")
        for line in lines:
            yield line.removeprefix(b"data: ")


def read_chunk(chunk: dict[str, Any], answer: Answer) -> bool:
    """Add a chunk of a stream to the answer; return whether it was a piece of the answer."""
    if error := chunk.get("error"):
        raise CallFailed(
            BY_CODE.get(error["code"], "INVALID_ARGUMENT"), error["message"], error.get("stage", "")
        )
    if chunk.get("usage"):
        answer.num_completion_tokens = chunk["usage"]["completion_tokens"]
    for choice in chunk["choices"]:
        if choice["finish_reason"]:
            answer.end(choice["finish_reason"])
        elif "token_ids" in choice:
            answer.add(choice["token_ids"], choice["delta"].get("content") or "")
            return True
    return False


def read_whole(status: int, body: bytes, answer: Answer) -> None:
    whole = json.loads(body)
    if status != 200:
        error = whole["error"]
        raise CallFailed(
            BY_STATUS.get(status, str(status)), error["message"], error.get("stage", "")
        )
    (choice,) = whole["choices"]
    answer.add(choice["token_ids"], choice["message"]["content"])
    answer.end(choice["finish_reason"])
    answer.num_completion_tokens = whole["usage"]["completion_tokens"]


def stage_of(error: grpc.aio.AioRpcError) -> str:
    """Return the stage that the status details name.

    It is empty if the status is the client's own, as for a deadline.
    """
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    return (
        info.metadata.get("stage", "")
        if status and any(detail.Unpack(info) for detail in status.details)
        else ""
    )


def http_body(call: Call, model: str) -> dict[str, Any]:
    question = call.question
    images = [
        {"type": "image_url", "image_url": {"url": data_uri(file)}} for file in files_of(call)
    ]
    text = text_of(call)
    content: Any = [*images, {"type": "text", "text": text}] if images else text
    body: dict[str, Any] = {
        "model": "no-such-model" if call.mistake == "model" else model,
        "messages": [] if call.mistake == "empty" else [{"role": "user", "content": content}],
        "max_tokens": -1 if call.mistake == "max_tokens" else question.max_tokens,
        "ignore_eos": question.ignore_eos,
        "temperature": -1.0 if call.mistake == "temperature" else question.temperature,
        "return_token_ids": True,
    }
    if question.stop:
        body["stop"] = list(question.stop)
    if question.temperature:
        body |= {"top_k": SAMPLED_TOP_K, "seed": question.seed}
    if call.is_streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def data_uri(file: bytes) -> str:
    return (
        f"data:{MEDIA_TYPES.get(file[:4], 'image/jpeg')};base64,{base64.b64encode(file).decode()}"
    )


def grpc_fields(call: Call) -> dict[str, Any]:
    question = call.question
    sampling: dict[str, Any] = {
        "temperature": -1.0 if call.mistake == "temperature" else question.temperature
    }
    if question.temperature:
        sampling |= {"top_k": SAMPLED_TOP_K, "seed": question.seed}
    max_tokens = 0 if call.mistake == "max_tokens" else question.max_tokens
    is_empty = call.mistake == "empty"
    return {
        "model": "no-such-model" if call.mistake == "model" else "",
        "text": "" if is_empty else text_of(call),
        "images": [] if is_empty else [inference_pb2.Image(data=file) for file in files_of(call)],
        "sampling": inference_pb2.SamplingParams(**sampling),
        "stopping": inference_pb2.StoppingParams(
            max_tokens=max_tokens, ignore_eos=question.ignore_eos, stop=question.stop
        ),
    }

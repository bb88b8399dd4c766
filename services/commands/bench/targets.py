"""The servers that a load test asks: any with OpenAI's HTTP interface, or Twinlens over gRPC."""

import time
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import Any

import grpc

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.bench.workload import Ask
from services.commands.chat_client import Answer, ChatClient, choose_model, image_part
from services.commands.client import CHANNEL_OPTIONS, ClientError, as_dict, explain
from services.commands.generate import FINISH_REASONS

REFUSED_FIELDS = (400, 422)
"""The statuses with which a server refuses fields that it does not know."""
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
CHANNELS = 4
"""Requests are spread over connections: one HTTP/2 connection has a limited window."""


class Target(ABC):
    """A server under load. An asynchronous context manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.model = ""
        self.fixes_length = True
        """Whether requests ask for answers of exactly `max_tokens` tokens."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Target":
        async with AsyncExitStack() as stack:  # closes what is open if another part fails
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def check(self, ask: Ask) -> None:
        """Ask once, so that a wrong address, model or request ends the test before it begins.

        If the server refuses to fix the length of answers, later requests do not ask for it.

        Raises
        ------
        ClientError
            If the request fails.
        """
        answer = await self.send(self.prepare(ask))
        if answer.status in REFUSED_FIELDS:
            self.fixes_length = False
            answer = await self.send(self.prepare(ask))
        if answer.error:
            raise ClientError(f"{self.address} fails the first request: {answer.error}")

    @abstractmethod
    async def _open(self, stack: AsyncExitStack) -> None:
        """Connect, and choose the model. Raises ClientError if the server has it not."""

    @abstractmethod
    def prepare(self, ask: Ask) -> Any:
        """Return the request in the form in which `send` needs it."""

    @abstractmethod
    async def send(self, prepared: Any) -> Answer:
        """Send a request and return what became of it."""


class HttpTarget(Target):
    """A server with OpenAI's HTTP interface."""

    def __init__(self, url: str, model: str, timeout: float) -> None:
        super().__init__(url)
        self._wanted = model
        self._client = ChatClient(url, timeout=timeout)

    async def _open(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self._client)
        self.model = await choose_model(self._client, self._wanted)

    def prepare(self, ask: Ask) -> dict[str, Any]:
        content = [*map(image_part, ask.images), {"type": "text", "text": ask.text}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.fixes_length:
            body |= {"ignore_eos": True, "min_tokens": ask.max_tokens}
        return body

    async def send(self, prepared: Any) -> Answer:
        return await self._client.complete(prepared)


class GrpcTarget(Target):
    """Twinlens' own interface."""

    def __init__(self, address: str, model: str, timeout: float) -> None:
        super().__init__(address)
        self.model = model
        self._timeout = timeout
        self._stubs: list[inference_pb2_grpc.InferenceServiceStub] = []
        self._sent = 0

    async def _open(self, stack: AsyncExitStack) -> None:
        for _ in range(CHANNELS):
            channel = grpc.aio.insecure_channel(self.address, CHANNEL_OPTIONS)
            await stack.enter_async_context(channel)
            self._stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))

    def prepare(self, ask: Ask) -> inference_pb2.GenerateStreamRequest:
        stopping = inference_pb2.StoppingParams(
            max_tokens=ask.max_tokens,
            min_tokens=ask.max_tokens if self.fixes_length else 0,
            ignore_eos=self.fixes_length,
        )
        return inference_pb2.GenerateStreamRequest(
            model=self.model,
            text=ask.text,
            images=[inference_pb2.Image(data=image) for image in ask.images],
            sampling=inference_pb2.SamplingParams(temperature=0),
            stopping=stopping,
        )

    async def send(self, prepared: Any) -> Answer:
        answer = Answer(began=time.monotonic())
        self._sent += 1
        stub = self._stubs[self._sent % CHANNELS]
        try:
            async for event in stub.GenerateStream(prepared, timeout=self._timeout):
                take_event(event, answer)
        except grpc.aio.AioRpcError as error:
            answer.status = HTTP_STATUS.get(error.code(), 500)
            answer.error = explain(error, self.address)
            answer.has_timed_out = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        answer.seconds = time.monotonic() - answer.began
        return answer


def take_event(event: inference_pb2.GenerateStreamResponse, answer: Answer) -> None:
    """Add an event of the stream to the answer."""
    match event.WhichOneof("event"):
        case "delta":
            delta = event.delta
            answer.text += delta.text
            answer.token_ids += delta.token_ids
            if delta.token_ids:
                seconds = time.monotonic() - answer.began
                answer.token_times.append((seconds, len(delta.token_ids)))
        case "end":
            answer.status = 200
            answer.finish_reason = FINISH_REASONS[event.end.finish_reason]
            answer.usage = as_dict(event.end.usage)
            answer.timings = as_dict(event.end.timings)

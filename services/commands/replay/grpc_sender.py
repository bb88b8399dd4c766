"""Sends recorded requests again over gRPC, which alone takes token ids and regular expressions."""

import time
from contextlib import AsyncExitStack

import grpc

from common.recording import Exchange
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.client import CHANNEL_OPTIONS
from services.commands.generate import FINISH_REASONS
from services.commands.replay.bodies import GrpcRequest, ReadFile, grpc_request
from services.commands.replay.outcome import Outcome

MOST_SECONDS = 600.0
"""A request without a deadline has failed after this time, as over HTTP."""


class GrpcSender:
    """A client of one system. An asynchronous context manager."""

    def __init__(self, target: str, read_file: ReadFile) -> None:
        self.target = target
        self.read_file = read_file
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "GrpcSender":
        channel = grpc.aio.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        await self._stack.enter_async_context(channel)
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def send(self, exchange: Exchange) -> Outcome:
        request = grpc_request(exchange, self.read_file)
        outcome = Outcome()
        began = time.monotonic()
        try:
            timeout = exchange.asked.timeout
            await self._ask(request, MOST_SECONDS if timeout is None else timeout, outcome)
        except grpc.aio.AioRpcError as error:
            outcome.error = f"{error.code().name}: {error.details()}"
        if not outcome.seconds:
            outcome.seconds = time.monotonic() - began
        return outcome

    async def _ask(self, request: GrpcRequest, timeout: float, outcome: Outcome) -> None:
        match request:
            case inference_pb2.ClassifyRequest():
                labels = (await self._stub.Classify(request, timeout=timeout)).labels
                by_index = {label.index: label.probability for label in labels}
                outcome.values = [by_index[index] for index in sorted(by_index)]
                outcome.finish_reason = "pooled"
            case inference_pb2.EmbedRequest():
                outcome.values = list((await self._stub.Embed(request, timeout=timeout)).values)
                outcome.finish_reason = "pooled"
            case _:
                async for response in self._stub.GenerateStream(request, timeout=timeout):
                    take_response(response, outcome)


def take_response(response: inference_pb2.GenerateStreamResponse, outcome: Outcome) -> None:
    """Add a message of a streamed answer to its outcome."""
    outcome.text += response.delta.text
    outcome.token_ids += response.delta.token_ids
    if response.HasField("end"):
        outcome.finish_reason = FINISH_REASONS[response.end.finish_reason]
        outcome.seconds = response.end.timings.total_seconds
        outcome.first_token_seconds = response.end.timings.time_to_first_token_seconds
        outcome.num_tokens = response.end.usage.completion_tokens

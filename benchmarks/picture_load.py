"""Clients that ask over gRPC for one token about eight pictures, again and again."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import grpc
import numpy as np
from PIL import Image

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc

IMAGES_A_REQUEST = 8
SIDE = 224
CELL = 16
REFUSED_PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = 600.0


def pictures(seed: int) -> Iterator[bytes]:
    """Yield JPEG files of which no two are alike."""
    draw = np.random.default_rng(seed)
    while True:
        cells = Image.fromarray(draw.integers(0, 256, (SIDE // CELL, SIDE // CELL, 3), np.uint8))
        file = BytesIO()
        cells.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(file, "JPEG", quality=85)
        yield file.getvalue()


def make_requests(seed: int, number: int) -> list[inference_pb2.GenerateRequest]:
    files = pictures(seed)
    return [
        inference_pb2.GenerateRequest(
            text="x",
            images=[inference_pb2.Image(data=next(files)) for _ in range(IMAGES_A_REQUEST)],
            sampling=inference_pb2.SamplingParams(temperature=0),
            stopping=inference_pb2.StoppingParams(max_tokens=1, ignore_eos=True),
        )
        for _ in range(number)
    ]


@dataclass
class Measured:
    ends: list[float] = field(default_factory=list)
    """The time at which each answer arrived."""
    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    timings: list[Any] = field(default_factory=list)

    def images_a_second(self, skip: int) -> float:
        """Return the rate between the end of answer number `skip` and that of the last answer."""
        first = self.ends[skip - 1]
        last = self.ends[-1]
        return IMAGES_A_REQUEST * (len(self.ends) - skip) / (last - first)


class Load:
    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            target, options=[("grpc.max_send_message_length", -1)]
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.measured = Measured()

    async def close(self) -> None:
        await self._channel.close()

    async def ask(self, request: inference_pb2.GenerateRequest) -> str:
        began = time.monotonic()
        try:
            response = await self._stub.Generate(request, timeout=TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        else:
            code = "OK" if response.usage.completion_tokens == 1 else "no token"
            self.measured.ends.append(time.monotonic())
            self.measured.seconds.append(time.monotonic() - began)
            self.measured.timings.append(response.timings)
        self.measured.codes[code] += 1
        return code

    async def run(
        self,
        requests: list[inference_pb2.GenerateRequest],
        clients: int,
        enough: asyncio.Event | None = None,
    ) -> Measured:
        """Ask until all requests are answered, or until `enough` is set.

        A refused request is retried after a second.
        """
        waiting = iter(requests)

        async def client() -> None:
            for request in waiting:
                while await self.ask(request) == "RESOURCE_EXHAUSTED" and not (
                    enough and enough.is_set()
                ):
                    await asyncio.sleep(REFUSED_PAUSE_SECONDS)
                if enough and enough.is_set():
                    return

        await asyncio.gather(*(client() for _ in range(clients)))
        return self.measured

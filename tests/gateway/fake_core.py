"""A core that answers by a script and records its requests, and real API servers in front of it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from common.errors import NotFound
from common.messages import Usage
from services.gateway.adapters import AdaptersOfGroups
from services.gateway.body_budget import BodyBudget
from services.gateway.connection_limits import ConnectionLimits
from services.gateway.generation import (
    Began,
    Conversion,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    Result,
)
from services.gateway.grpc_api import create_server
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.peers import Peers
from services.gateway.servers import HttpServer

TIMINGS = {
    "preprocess_seconds": 0.25,
    "images": [
        {
            "preprocess_seconds": 0.125,
            "queue_seconds": 0.0,
            "encode_seconds": 0.5,
            "cached": False,
            "replica": "vision-1",
        }
    ],
    "queue_seconds": 0.0,
    "prefill_seconds": 0.5,
    "decode_seconds": 1.0,
    "time_to_first_token_seconds": 0.75,
    "total_seconds": 2.0,
}


def logprob(token_id: int, token: str) -> dict[str, Any]:
    entry = {"token": token, "token_id": token_id, "bytes": list(token.encode()), "logprob": -0.5}
    return entry | {"top_logprobs": [dict(entry)]}


class Forever:
    """A step of a script after which nothing comes until the client leaves."""


FOREVER = Forever()

Step = GenerationEvent | Exception | Forever | asyncio.Event
"""What the script of a FakeCore consists of. An asyncio.Event is waited for."""

HELLO: tuple[Step, ...] = (
    Began([1, 2, 3], {name: TIMINGS[name] for name in ("images", "prefill_seconds")}),
    Piece(0, [10], "Hel", [logprob(10, "Hel")]),
    Piece(1, [11], "", [logprob(11, "l")]),
    Piece(2, [12], "lo", [logprob(12, "o")]),
    Ended(
        "stop",
        Usage(prompt_tokens=9, image_tokens=4, completion_tokens=3, cached_tokens=2),
        TIMINGS,
    ),
)


async def only(event: GenerationEvent) -> AsyncIterator[GenerationEvent]:
    yield event


class FakeCore:
    """A core that plays the same script for every request, or refuses all of them."""

    def __init__(self, *script: Step, refusal: Exception | None = None) -> None:
        self.model_name = "org/tiny"
        self.request_timeout = 60.0
        self.script = script or HELLO
        self.refusal = refusal
        self.requests: list[GenerationRequest] = []
        self.spellings: dict[bytes, str] = {}
        """The texts of prompts of token ids. A prompt of text has a token for each byte."""
        self.waiting = asyncio.Event()
        self.aborted = asyncio.Event()
        self.reason = ""
        self.is_draining = False
        self.adapters = AdaptersOfGroups(Peers())

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        self.requests.append(request)
        if self.refusal:
            raise self.refusal
        if request.task in ("tokenize", "detokenize") and self.script[0] is HELLO[0]:
            ids = [0] * len(request.prompt)
            yield only(Conversion(ids, None, self.spellings.get(request.prompt, "")))
            return
        ended = False

        async def events() -> AsyncIterator[GenerationEvent]:
            nonlocal ended
            for step in self.script:
                if isinstance(step, Forever):
                    self.waiting.set()
                    await asyncio.Event().wait()
                elif isinstance(step, asyncio.Event):
                    self.waiting.set()
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    ended = isinstance(step, Ended | Result)
                    await asyncio.sleep(0)
                    yield step

        try:
            yield events()
        finally:
            if not ended:
                self.aborted.set()

    def check_model(self, model: str | None) -> str:
        if model in (None, self.model_name):
            return ""
        if model in self.adapters.paths():
            return model
        raise NotFound(f"no model {model!r} is served")

    def max_model_len(self) -> int | None:
        return 4096

    def unready_reason(self) -> str:
        return self.reason


@asynccontextmanager
async def http_server(
    core: FakeCore, budget: BodyBudget | None = None, limits: ConnectionLimits | None = None
) -> AsyncIterator[int]:
    """Run a real HTTP server and return its port. It listens already, so no caller must wait."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        app = create_app(MeasuredCore(core), 10**6, budget)
        server = HttpServer(app, limits)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await asyncio.wait({serving}, timeout=1)
            serving.cancel()


@asynccontextmanager
async def grpc_server(core: FakeCore, controller: str = "127.0.0.1:1") -> AsyncIterator[str]:
    """Run a real gRPC server and return its address."""
    async with grpc.aio.insecure_channel(controller) as channel:
        server = create_server(MeasuredCore(core), channel, max_message_bytes=10**6)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)

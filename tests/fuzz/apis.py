"""Both APIs of the gateway under random bodies, in front of a core that answers by a script.

Each request gets a documented answer and leaves nothing. What the APIs accept must also be
acceptable behind them: it passes the wire to preprocess and is opened there.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np

from common.errors import InvalidRequest, NotFound
from common.messages import HOPS, Peer, Usage
from common.wire import decode, encode
from services.gateway import generation
from services.gateway.body_budget import BodyBudget
from services.gateway.generation import Began, GenerationEvent, GenerationRequest
from services.gateway.grpc_api import create_server
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.record import Record
from services.preprocess.in_flight import Preparation
from services.preprocess.sandbox.meter import Meter
from services.preprocess.sandbox.work import Workbench
from services.preprocess.submit_checks import check_submit
from services.preprocess.tasks import reading
from tests.fuzz.bodies import REQUEST_KINDS, chat_body, headers, protobuf_body
from tests.fuzz.rounds import Result, num_descriptors
from tests.gateway.fake_core import HELLO, FakeCore, Step
from tests.preprocess.builders import PREPROCESSOR

MAX_BODY_BYTES = 2 * 10**6
MAX_ERROR_BYTES = 4096
REST_LOOKS = 200
"""How often it is looked whether nothing is held any more, with pauses of 50 ms."""
OPENED_SHARE = 0.2
"""How many of the accepted requests are opened as preprocess does it."""
LEAKS = re.compile(
    rb"\b0x[0-9a-f]{6,}|Traceback|<class|pydantic|msgspec|\.py\b|_pb2|"
    rb"\b(?:Key|Type|Value|Attribute|Assertion|Runtime|Index|Decode|Validation)Error\b"
)
"""What no answer may contain."""
HTTP_STATUSES = {200, 400, 404, 405, 408, 413, 415, 429}
GRPC_CODES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
ASKED = ("/v1/chat/completions", "/v1/chat/completions", "/v1/classify", "/v1/embeddings")
PATHS = ("/v1/models/x", "/v1/models", "/", "/v1/chat/completions/", "/livez", "/%ff", "/version")


HALVES = np.array([0.5, 0.5], np.float32)
SCRIPTS: dict[str, tuple[Step, ...]] = {
    "generate": HELLO,
    "classify": (Began(None), generation.Result(HALVES, ["a", "b"], Usage(), {})),
    "embed": (Began(None), generation.Result(HALVES, [], Usage(), {})),
}
"""What the core answers to each task."""


class OpeningCore(FakeCore):
    """A core that also lets preprocess open some of the requests, as far as a message can tell."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self._draw = draw
        self._workbench = Workbench(PREPROCESSOR)

    def check_model(self, model: str | None) -> str:
        if model not in (None, self.model_name):
            raise NotFound("this model is not served")
        return ""

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        self.requests.clear()
        record = Record(request, request.request_id, 60.0, request.task)
        submit = record.submit_message(Peer("d", "ipc:///d"), "")
        received = decode(encode(submit), HOPS["gateway", "preprocess"])
        if self._draw.random() < OPENED_SHARE:
            try:
                check_submit(received, PREPROCESSOR.vocab_size, PREPROCESSOR.max_model_len)
                task = reading(Preparation(received, "gateway", 0.0), 0, False)
                self._workbench.do(task.job, task.blobs, Meter())
            except InvalidRequest:
                pass  # a documented refusal
        self.script = SCRIPTS[request.task]
        async with super().generate(request) as events:
            yield events


class Bodies:
    """Sends bodies, and counts what they were answered with."""

    def __init__(self, seed: str) -> None:
        self._draw = Random(seed)
        self.result = Result()

    def run(self, count: int) -> Result:
        began = time.perf_counter()
        asyncio.run(self._run(count))
        self.result.seconds = time.perf_counter() - began
        return self.result

    async def _run(self, count: int) -> None:
        core = OpeningCore(self._draw)
        budgets = BodyBudget(), BodyBudget()
        app = create_app(MeasuredCore(core), MAX_BODY_BYTES, *budgets)
        await self._send_all_grpc(core, budgets, 10)  # some descriptors are opened once
        self.result.counts.clear()
        descriptors = num_descriptors()
        for _ in range(count * 7 // 10):
            body = chat_body(self._draw)
            await self._send_http(app, body, headers(self._draw, body))
        await self._send_all_grpc(core, budgets, count - count * 7 // 10)
        await self._check_rest(budgets, descriptors)

    async def _check_rest(self, budgets: tuple[BodyBudget, ...], descriptors: int) -> None:
        """Check that nothing is held. Threads of gRPC close connections a moment later."""
        for _ in range(REST_LOOKS):
            held = {
                "bytes": sum(budget.num_held for budget in budgets),
                "tasks": len(asyncio.all_tasks()) - 1,
                "descriptors": max(0, num_descriptors() - descriptors),
            }
            if not any(held.values()):
                return
            await asyncio.sleep(0.05)
        self.result.faults.append(f"still held: {held}")

    # HTTP

    async def _send_http(self, app: Any, body: bytes, given: list[tuple[bytes, bytes]]) -> None:
        """Send a body in pieces; the client may hang up between two of them."""
        draw = self._draw
        cut = draw.randrange(len(body) + 1)
        pieces = [body] if draw.random() < 0.7 else [body[:cut], body[cut:]]
        messages = [
            {"type": "http.request", "body": piece, "more_body": n + 1 < len(pieces)}
            for n, piece in enumerate(pieces)
        ]
        hangs_up = draw.random() < 0.03
        if hangs_up:
            messages[-1] = {"type": "http.disconnect"}
        is_asked = draw.random() < 0.97
        path = draw.choice(ASKED if is_asked else PATHS)
        answer = Answer(messages)
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST" if is_asked else draw.choice(["GET", "PUT", "POST"]),
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": given,
            "client": ("127.0.0.1", 1),
            "server": ("x", 80),
            "scheme": "http",
        }
        try:
            await app(scope, answer.receive, answer.send)
        except Exception as e:  # noqa: BLE001 - whatever leaves the application is a fault
            self._fail(f"{type(e).__name__}: {e!s:.200}", body, given)
            return
        self.result.counts[f"HTTP {answer.status or 'none'}"] += 1
        if not hangs_up and (problem := problem_of(answer)):
            self._fail(problem, body, given)

    def _fail(self, problem: str, body: bytes, given: Any = "") -> None:
        if len(self.result.faults) < 20:
            self.result.faults.append(
                f"{problem}\n    for {body[:400]!r} ({len(body)} bytes) {given}"
            )

    # gRPC

    async def _send_all_grpc(
        self, core: OpeningCore, budgets: tuple[BodyBudget, BodyBudget], count: int
    ) -> None:
        with TemporaryDirectory() as folder:
            address = f"unix:{Path(folder) / 'grpc'}"
            async with grpc.aio.insecure_channel("127.0.0.1:1") as controller:
                server = create_server(MeasuredCore(core), controller, MAX_BODY_BYTES, *budgets)
                server.add_insecure_port(address)
                await server.start()
                async with grpc.aio.insecure_channel(address) as channel:
                    for _ in range(count):
                        name = self._draw.choice(list(REQUEST_KINDS))
                        await self._send_grpc(channel, name)
                await server.stop(None)

    async def _send_grpc(self, channel: grpc.aio.Channel, name: str) -> None:
        body = protobuf_body(self._draw, REQUEST_KINDS[name])
        path = f"/twinlens.inference.v1.InferenceService/{name}"
        code, details = "OK", ""
        try:
            if name != "GenerateStream":
                await channel.unary_unary(path, None, None)(body, timeout=20)
            else:
                async for _ in channel.unary_stream(path, None, None)(body, timeout=20):
                    pass
        except grpc.aio.AioRpcError as e:
            code, details = e.code().name, e.details() or ""
        self.result.counts[f"gRPC {code}"] += 1
        if code not in GRPC_CODES:
            self._fail(f"{name}: {code} {details}", body)
        elif len(details) > MAX_ERROR_BYTES or LEAKS.search(details.encode()):
            self._fail(f"{name}: {code} says {details[:400]!r}", body)


class Answer:
    """The client's side of one ASGI call."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages
        self._rest = asyncio.Event()
        self.status = 0
        self.body = b""

    async def receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop(0)
        await self._rest.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")


def problem_of(answer: Answer) -> str:
    """Return what is wrong with an answer; empty if nothing is."""
    if answer.status not in HTTP_STATUSES:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if leak := LEAKS.search(answer.body):
        return f"status {answer.status} tells {leak.group()!r}: {answer.body[:400]!r}"
    if answer.status == 200:
        return ""
    if len(answer.body) > MAX_ERROR_BYTES:
        return f"an error of {len(answer.body)} bytes"
    error = json.loads(answer.body).get("error", {})
    if not {"message", "type", "param", "code"} <= error.keys() or not error["message"]:
        return f"not the documented error: {answer.body[:300]!r}"
    return ""

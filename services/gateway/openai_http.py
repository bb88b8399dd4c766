"""The OpenAI-compatible HTTP API."""

import asyncio
import math
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import InvalidRequest, ServingError, Unavailable, shorten
from services.gateway import sse
from services.gateway.bodies import Bodies, BodyDrop, address_of
from services.gateway.body_budget import BodyBudget, Reservation
from services.gateway.generation import Began, Core, Ended, GenerationRequest, Piece
from services.gateway.limits import MAX_ADMITTED_IMAGE_BYTES
from services.gateway.metrics import MeasuredCore, serving_errors_only
from services.gateway.schema import MAX_TIMEOUT, chat_to_generation, new_request_id, parse_chat

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

Parsed = tuple[GenerationRequest, sse.CompletionWriter, bool]
"""A request, what writes its answer, and whether the answer is streamed."""


def create_app(
    core: MeasuredCore,
    max_body_bytes: int = 64 * 2**20,
    budget: BodyBudget | None = None,
    admitted_images: BodyBudget | None = None,
) -> Starlette:
    """Return the application. The budgets are shared with the other API: for bodies before
    admission, and for the images of admitted requests."""
    info = InfoEndpoints(core)
    bodies = Bodies(max_body_bytes, budget or BodyBudget())
    chat_completions = ChatCompletions(
        core, bodies, admitted_images or BodyBudget(MAX_ADMITTED_IMAGE_BYTES)
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", info.models),
            Route("/v1/models/{model:path}", info.model),
            Route("/livez", info.live),
            Route("/readyz", info.ready),
            Route("/health", info.ready),
            Route("/metrics", info.metrics),
            Route("/version", info.version),
        ],
        middleware=[Middleware(RequestMiddleware, core=core, max_dropped_bytes=4 * max_body_bytes)],
        exception_handlers={ServingError: on_serving_error, HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    return app


def error_response(error: ServingError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return JSONResponse(sse.error_body(error), error.http_status, headers)


async def on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Return the error of a path that does not exist, or that does not accept the method."""
    assert isinstance(error, HTTPException)
    detail = error.detail.lower()
    body = {
        "message": f"{request.method} {shorten(request.scope['path'])}: {detail}",
        "type": "invalid_request_error",
        "param": None,
        "code": detail.replace(" ", "_"),
    }
    return JSONResponse({"error": body}, error.status_code, error.headers)


class RequestMiddleware:
    """Gives each request an id, which every response carries, and responds to unexpected errors.

    It also reads and drops what the application leaves of the request's body.
    """

    def __init__(self, app: ASGIApp, core: MeasuredCore, max_dropped_bytes: int) -> None:
        self.app = app
        self.core = core
        self.max_dropped_bytes = max_dropped_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["request_id"] = request_id = new_request_id(Headers(scope=scope).get("x-request-id"))
        started = False
        drop = BodyDrop(scope, receive, send, self.max_dropped_bytes)

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self.core.is_draining or drop.is_unread:
                    headers["connection"] = "close"
            await drop.send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                with serving_errors_only(), suppress(ClientDisconnect):
                    await self.app(scope, drop.receive, send_with_id)
            except ServingError as error:
                if started:
                    raise
                await error_response(error)(scope, drop.receive, send_with_id)


class InfoEndpoints:
    """The endpoints that describe the model and the gateway."""

    def __init__(self, core: MeasuredCore) -> None:
        self.core = core
        self.created = int(time.time())

    def describe_model(self) -> dict[str, Any]:
        return {
            "id": self.core.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "twinlens",
            "max_model_len": self.core.max_model_len(),
        }

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.describe_model()]})

    async def model(self, request: Request) -> Response:
        self.core.check_model(request.path_params["model"])
        return JSONResponse(self.describe_model())

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if reason := self.core.unready_reason():
            raise Unavailable(reason, stage="gateway")
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return Response(
            generate_latest(self.core.metrics.registry),
            headers={"content-type": CONTENT_TYPE_LATEST},
        )

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": version("twinlens")})


class ChatCompletions:
    """POST /v1/chat/completions as an ASGI application.

    One task enters the core's context, sends the response and leaves the context. The task is
    cancelled when the client disconnects, whatever it waits for.
    """

    def __init__(self, core: Core, bodies: Bodies, admitted_images: BodyBudget) -> None:
        self.core = core
        self.bodies = bodies
        self.admitted_images = admitted_images

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeout = read_timeout(Headers(scope=scope).get("x-request-timeout"))
        with self.bodies.reserve(scope) as reservation:
            body = await self.bodies.read(receive, reservation)
            work = self._answer(body, timeout, reservation, scope, receive, send)
            del body
            await cancel_on_disconnect(work, receive)

    async def _answer(
        self,
        body: bytearray,
        timeout: float | None,
        reservation: Reservation,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send the answer. The body is not kept, because it may have tens of megabytes."""
        parse = partial(self._parse, body, scope["request_id"], timeout)
        generation, writer, is_streamed = await self.bodies.work(scope, body, parse)
        del body, parse
        reservation.release()
        num_image_bytes = sum(map(len, generation.images))
        with self.admitted_images.reserve(address_of(scope), num_image_bytes):
            if is_streamed:
                await self._send_stream(generation, writer, send)
            else:
                await self._send_whole(generation, writer, scope, receive, send)

    def _parse(self, body: bytearray, request_id: str, timeout: float | None) -> Parsed:
        """Return the request in a body. This may run on another thread."""
        chat = parse_chat(body)
        self.core.check_model(chat.model)
        generation = chat_to_generation(chat, request_id, timeout, self.core.max_model_len())
        writer = sse.CompletionWriter(
            request_id,
            self.core.model_name,
            with_ids=bool(chat.return_token_ids),
            with_logprobs=bool(chat.logprobs),
            with_usage=chat.include_usage,
        )
        return generation, writer, bool(chat.stream)

    async def _send_whole(
        self,
        generation: GenerationRequest,
        writer: sse.CompletionWriter,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        pieces: list[Piece] = []
        async with self.core.generate(generation) as events:
            async for event in events:
                match event:
                    case Began():
                        began = event
                    case Piece():
                        pieces.append(event)
                    case Ended():
                        body = writer.whole(began, pieces, event)
        await JSONResponse(body)(scope, receive, send)

    async def _send_stream(
        self, generation: GenerationRequest, writer: sse.CompletionWriter, send: Send
    ) -> None:
        """Send the events of an answer.

        Nothing is sent before Began, so an earlier failure is an HTTP error. A later one is an
        event of the stream.
        """
        started = False
        try:
            async with self.core.generate(generation) as events:
                async for event in events:
                    match event:
                        case Began():
                            started = True
                            await start_stream(send)
                            await send_body(send, writer.first_chunk(event))
                        case Piece():
                            await send_body(send, writer.piece_chunk(event))
                        case Ended():
                            tail = writer.last_chunks(event)
        except ServingError as error:
            if not started:
                raise
            tail = sse.sse_event(sse.error_body(error))
        await send({"type": "http.response.body", "body": tail + sse.DONE})


async def start_stream(send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def send_body(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def read_timeout(header: str | None) -> float | None:
    """Return the seconds in the X-Request-Timeout header, or None if it is absent."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise InvalidRequest(
            "X-Request-Timeout: must be a number of seconds above 0", stage="gateway"
        )
    return seconds


async def cancel_on_disconnect(work: Awaitable[None], receive: Receive) -> None:
    """Wait for the work, and cancel it if the client disconnects first.

    The body of the request must have been read before.
    """
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, disconnecting):
            task.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""The OpenAI-compatible HTTP API."""

import asyncio
import math
import time
from contextlib import suppress
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

from common.errors import ServingError, Unavailable, shorten
from services.gateway import sse
from services.gateway.adapters_http import LoadAdapterEndpoint, UnloadAdapterEndpoint
from services.gateway.bodies import Bodies, BodyDrop
from services.gateway.body_budget import BodyBudget
from services.gateway.chat_http import ChatCompletions, TimedChatCompletions
from services.gateway.limits import MAX_ADMITTED_IMAGE_BYTES
from services.gateway.metrics import MeasuredCore, serving_errors_only
from services.gateway.pooling_http import Classifications, Embeddings
from services.gateway.responses.http import Responses, refuse_stored
from services.gateway.schema import new_request_id
from services.gateway.ui.endpoints import Ui


def create_app(
    core: MeasuredCore,
    max_body_bytes: int = 64 * 2**20,
    budget: BodyBudget | None = None,
    admitted_images: BodyBudget | None = None,
    ui: Ui | None = None,
) -> Starlette:
    """Return the application. The budgets are shared with the other API: for bodies before
    admission, and for the images of admitted requests. The page is served if `ui` is
    given."""
    info = InfoEndpoints(core)
    shared = (
        core,
        Bodies(max_body_bytes, budget or BodyBudget()),
        admitted_images or BodyBudget(MAX_ADMITTED_IMAGE_BYTES),
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(*shared), methods=["POST"]),
            Route(
                "/v1/token_timestamps/chat/completions",
                TimedChatCompletions(*shared),
                methods=["POST"],
            ),
            Route("/v1/responses", Responses(*shared), methods=["POST"]),
            Route("/v1/responses/{id:path}", refuse_stored, methods=["GET", "POST", "DELETE"]),
            Route("/v1/classify", Classifications(*shared), methods=["POST"]),
            Route("/v1/embeddings", Embeddings(*shared), methods=["POST"]),
            Route("/v1/load_lora_adapter", LoadAdapterEndpoint(core, shared[1]), methods=["POST"]),
            Route(
                "/v1/unload_lora_adapter", UnloadAdapterEndpoint(core, shared[1]), methods=["POST"]
            ),
            Route("/v1/models", info.models),
            Route("/v1/models/{model:path}", info.model),
            Route("/livez", info.live),
            Route("/readyz", info.ready),
            Route("/health", info.ready),
            Route("/metrics", info.metrics),
            Route("/version", info.version),
            *(ui.routes() if ui else []),
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

    def describe_model(self, adapter: str = "") -> dict[str, Any]:
        """Return what the API says about the served model, or about one of its adapters."""
        name = self.core.model_name
        described = {
            "id": adapter or name,
            "object": "model",
            "created": self.created,
            "owned_by": "twinlens",
            "max_model_len": self.core.max_model_len(),
        }
        if adapter:
            described |= {"root": self.core.adapters.paths().get(adapter, ""), "parent": name}
        return described

    async def models(self, request: Request) -> Response:
        names = ("", *self.core.adapters.paths())
        return JSONResponse({"object": "list", "data": [*map(self.describe_model, names)]})

    async def model(self, request: Request) -> Response:
        adapter = self.core.check_model(request.path_params["model"])
        return JSONResponse(self.describe_model(adapter))

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if reason := self.core.unready_reason():
            raise Unavailable(reason, stage="gateway")
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        # On a thread, because it takes some milliseconds.
        text = await asyncio.to_thread(generate_latest, self.core.metrics.registry)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": version("twinlens")})

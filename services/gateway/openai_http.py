"""The OpenAI-compatible HTTP API."""

import asyncio
import math
import time
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import ServingError, Unavailable, shorten
from services.gateway import sse
from services.gateway.adapters_http import Load, LoadAdapterEndpoint, Unload, UnloadAdapterEndpoint
from services.gateway.bodies import Bodies, BodyDrop
from services.gateway.body_budget import BodyBudget
from services.gateway.chat_http import ChatCompletions, TimedChatCompletions
from services.gateway.completions_http import Completions
from services.gateway.completions_schema import CompletionsRequest
from services.gateway.cors import Cors
from services.gateway.limits import MAX_ADMITTED_IMAGE_BYTES
from services.gateway.metrics import MeasuredCore, serving_errors_only
from services.gateway.openapi import ApiRoute, Schema, document
from services.gateway.pooling_http import Classifications, Embeddings
from services.gateway.pooling_schema import ClassifyRequest, EmbeddingsRequest
from services.gateway.request_log import HUNG_UP, current_end, one_line
from services.gateway.responses.http import Responses, refuse_stored
from services.gateway.responses.schema import ResponsesRequest
from services.gateway.schema import ChatRequest, new_request_id
from services.gateway.ui.endpoints import Ui

PAGE = "/ui"
STREAMED = ("application/json", "text/event-stream")
"""The media types of an answer that may be a stream."""


def create_app(
    core: MeasuredCore,
    max_body_bytes: int = 64 * 2**20,
    budget: BodyBudget | None = None,
    admitted_images: BodyBudget | None = None,
    ui: Ui | None = None,
    cors: Cors | None = None,
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
    routes = [
        ApiRoute(
            "/v1/chat/completions",
            ChatCompletions(*shared),
            "Answer a chat.",
            methods=["POST"],
            body=ChatRequest,
            media_types=STREAMED,
        ),
        ApiRoute(
            "/v1/token_timestamps/chat/completions",
            TimedChatCompletions(*shared),
            "Answer a chat, with the times of its tokens.",
            methods=["POST"],
            body=ChatRequest,
            media_types=STREAMED,
        ),
        ApiRoute(
            "/v1/completions",
            Completions(*shared),
            "Continue prompts as they are.",
            methods=["POST"],
            body=CompletionsRequest,
            media_types=STREAMED,
        ),
        ApiRoute(
            "/v1/responses",
            Responses(*shared),
            "Make a response, in OpenAI's newer form of a chat.",
            methods=["POST"],
            body=ResponsesRequest,
            media_types=STREAMED,
        ),
        ApiRoute(
            "/v1/responses/{id:path}",
            refuse_stored,
            "Say that no response is stored.",
            methods=["GET", "POST", "DELETE"],
        ),
        ApiRoute(
            "/v1/classify",
            Classifications(*shared),
            "Return the probabilities of a classifier's labels.",
            methods=["POST"],
            body=ClassifyRequest,
        ),
        ApiRoute(
            "/v1/embeddings",
            Embeddings(*shared),
            "Return the embeddings of texts or of an image.",
            methods=["POST"],
            body=EmbeddingsRequest,
        ),
        ApiRoute(
            "/v1/load_lora_adapter",
            LoadAdapterEndpoint(core, shared[1]),
            "Load a LoRA adapter.",
            methods=["POST"],
            body=Load,
            media_types=["text/plain"],
        ),
        ApiRoute(
            "/v1/unload_lora_adapter",
            UnloadAdapterEndpoint(core, shared[1]),
            "Unload a LoRA adapter.",
            methods=["POST"],
            body=Unload,
            media_types=["text/plain"],
        ),
        ApiRoute("/v1/models", info.models, "List the models."),
        ApiRoute("/v1/models/{model:path}", info.model, "Describe a model."),
        ApiRoute("/livez", info.live, "Say that the process lives."),
        ApiRoute("/readyz", info.ready, "Say whether requests can be answered."),
        ApiRoute("/health", info.ready, "The same as /readyz."),
        ApiRoute(
            "/metrics", info.metrics, "Return Prometheus metrics.", media_types=["text/plain"]
        ),
        ApiRoute("/version", info.version, "Return the version of Twinlens."),
        ApiRoute("/openapi.json", info.openapi, "Return this document."),
    ]
    info.document = document(routes, version("twinlens"))
    known = [f"{', '.join(r.documented_methods)} {r.documented_path}" for r in routes]
    app = Starlette(
        routes=[*routes, *(ui.routes() if ui else [])],
        middleware=[
            Middleware(
                RequestMiddleware,
                core=core,
                cors=cors or Cors(),
                max_dropped_bytes=4 * max_body_bytes,
            )
        ],
        exception_handlers={
            ServingError: on_serving_error,
            HTTPException: partial(on_http_exception, known),
        },
    )
    app.router.redirect_slashes = False
    return app


def error_response(error: ServingError) -> JSONResponse:
    current_end().fail(error)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return JSONResponse(sse.error_body(error), error.http_status, headers)


async def on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def on_http_exception(known: list[str], request: Request, error: Exception) -> Response:
    """Return the error of a path that does not exist, or that does not accept the method.

    It names the paths that are `known`, or the methods that the path accepts.
    """
    assert isinstance(error, HTTPException)
    detail = error.detail.lower()
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        assert error.headers
        allowed = set(error.headers["Allow"].split(", ")) - {"HEAD"}
        advice = f"use {', '.join(sorted(allowed))}"
    else:
        advice = f"what exists: {'; '.join(known)}"
    reason = f"{request.method} {shorten(request.scope['path'])}: {detail}"
    current_end().refuse(error.status_code, reason)
    body = {
        "message": f"{reason}; {advice}",
        "type": "invalid_request_error",
        "param": None,
        "code": detail.replace(" ", "_"),
    }
    return JSONResponse({"error": body}, error.status_code, error.headers)


class RequestMiddleware:
    """Gives each request an id, which every response carries, and responds to unexpected errors.

    It answers preflights, and adds what a web page needs to read a response. It also reads and
    drops what the application leaves of the request's body, and logs how a request ends without an
    answer.
    """

    def __init__(
        self, app: ASGIApp, core: MeasuredCore, cors: Cors, max_dropped_bytes: int
    ) -> None:
        self.app = app
        self.core = core
        self.cors = cors
        self.max_dropped_bytes = max_dropped_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        scope["request_id"] = request_id = new_request_id(headers.get("x-request-id"))
        scope["path"] = without_slash(scope["path"])
        is_page = scope["path"].startswith(PAGE)
        drop = BodyDrop(scope, receive, send, self.max_dropped_bytes)
        answer = Answer(
            drop, request_id, [] if is_page else self.cors.headers(headers.get("origin"))
        )
        app = self.app
        if scope["method"] == "OPTIONS" and not is_page:
            app = self.cors.preflight(headers) or app
        answer.closes = self.core.is_draining
        with one_line(request_id) as end:
            try:
                with serving_errors_only(), suppress(ClientDisconnect):
                    await app(scope, drop.receive, answer.send)
            except ServingError as error:
                end.fail(error)
                if answer.status:
                    raise
                await error_response(error)(scope, drop.receive, answer.send)
            if answer.status >= 400:
                end.refuse(answer.status, HTTPStatus(answer.status).phrase)
            if not answer.is_complete and not scope.get("is_refused"):
                end.give_up(scope.get("gave_up", HUNG_UP))


class Answer:
    """Sends the response to one request, with the headers that every response has."""

    def __init__(self, drop: BodyDrop, request_id: str, cors: list[tuple[str, str]]) -> None:
        self.closes = False
        """Whether the connection is closed after the response."""
        self.status = 0
        """The status that was sent; 0 before the response has begun."""
        self.is_complete = False
        self._drop = drop
        self._headers = [("x-request-id", request_id), *cors]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in self._headers:
                headers.append(name, value)
            if self.closes or self._drop.is_unread:
                headers["connection"] = "close"
        elif not message.get("more_body", False):
            self.is_complete = True
        await self._drop.send(message)


def without_slash(path: str) -> str:
    """Return the path without the slash at its end. The page's has a redirection of its own."""
    return path if path in ("/", f"{PAGE}/") else path.removesuffix("/")


class InfoEndpoints:
    """The endpoints that describe the model and the gateway."""

    def __init__(self, core: MeasuredCore) -> None:
        self.core = core
        self.created = int(time.time())
        self.document: Schema = {}
        """The OpenAPI document, set once there are routes."""

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
            current_end().leave_out()
            raise Unavailable(reason, stage="gateway")
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        # On a thread, because it takes some milliseconds.
        text = await asyncio.to_thread(generate_latest, self.core.metrics.registry)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.document)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": version("twinlens")})

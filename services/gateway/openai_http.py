"""The OpenAI-compatible HTTP API."""

import asyncio
import time
from functools import partial
from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from common.errors import ServingError, Unavailable
from services.gateway.adapters_http import Load, LoadAdapterEndpoint, Unload, UnloadAdapterEndpoint
from services.gateway.bodies import Bodies
from services.gateway.body_budget import BodyBudget
from services.gateway.chat_http import ChatCompletions, TimedChatCompletions
from services.gateway.completions_http import Completions
from services.gateway.completions_schema import CompletionsRequest
from services.gateway.cors import Cors
from services.gateway.limits import MAX_ADMITTED_IMAGE_BYTES
from services.gateway.metrics import MeasuredCore
from services.gateway.middleware import RequestMiddleware, on_http_exception, on_serving_error
from services.gateway.openapi import ApiRoute, Schema, document
from services.gateway.pooling_http import Classifications, Embeddings
from services.gateway.pooling_schema import ClassifyRequest, EmbeddingsRequest
from services.gateway.request_log import current_end
from services.gateway.responses.http import Responses, refuse_stored
from services.gateway.responses.schema import ResponsesRequest
from services.gateway.schema import ChatRequest
from services.gateway.tokenize_http import Detokenize, Tokenize
from services.gateway.tokenize_schema import DetokenizeRequest, TokenizeRequest
from services.gateway.ui.endpoints import Ui

Shared = tuple[MeasuredCore, Bodies, BodyBudget]
"""What the endpoints that ask the core have in common."""
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
    routes = api_routes(core, info, shared)
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


def api_routes(core: MeasuredCore, info: "InfoEndpoints", shared: Shared) -> list[ApiRoute]:
    """Return all endpoints, with what the OpenAPI document says of them."""
    return [
        ApiRoute(
            "/v1/chat/completions",
            ChatCompletions(*shared),
            "Answer a chat.",
            body=ChatRequest,
            media_types=STREAMED,
        ),
        ApiRoute(
            "/v1/token_timestamps/chat/completions",
            TimedChatCompletions(*shared),
            "Answer a chat, with the times of its tokens.",
            body=ChatRequest,
            media_types=STREAMED,
        ),
        ApiRoute(
            "/v1/completions",
            Completions(*shared),
            "Continue prompts as they are.",
            body=CompletionsRequest,
            media_types=STREAMED,
        ),
        ApiRoute(
            "/v1/responses",
            Responses(*shared),
            "Make a response, in OpenAI's newer form of a chat.",
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
            body=ClassifyRequest,
        ),
        ApiRoute(
            "/v1/embeddings",
            Embeddings(*shared),
            "Return the embeddings of texts or of an image.",
            body=EmbeddingsRequest,
        ),
        *token_routes(shared),
        ApiRoute(
            "/v1/load_lora_adapter",
            LoadAdapterEndpoint(core, shared[1]),
            "Load a LoRA adapter.",
            body=Load,
            media_types=["text/plain"],
        ),
        ApiRoute(
            "/v1/unload_lora_adapter",
            UnloadAdapterEndpoint(core, shared[1]),
            "Unload a LoRA adapter.",
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


def token_routes(shared: Shared) -> list[ApiRoute]:
    """Return the endpoints that make tokens of text, and text of tokens."""
    return [
        ApiRoute(
            "/tokenize",
            Tokenize(*shared),
            "Return the tokens of a prompt.",
            body=TokenizeRequest,
        ),
        ApiRoute(
            "/detokenize",
            Detokenize(*shared),
            "Return the text of tokens.",
            body=DetokenizeRequest,
        ),
    ]


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

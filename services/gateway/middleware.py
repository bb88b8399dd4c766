"""What surrounds every endpoint of the HTTP API: ids, web pages, errors and the log."""

import math
from contextlib import suppress
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import ServingError, shorten
from services.gateway import sse
from services.gateway.bodies import BodyDrop
from services.gateway.cors import Cors
from services.gateway.metrics import MeasuredCore, serving_errors_only
from services.gateway.request_log import HUNG_UP, current_end, one_line
from services.gateway.schema import new_request_id

PAGE = "/ui"


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

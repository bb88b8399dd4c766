"""POST /v1/responses as an ASGI application."""

from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from common.errors import ServingError
from services.gateway import sse
from services.gateway.chat_http import send_body, start_stream
from services.gateway.endpoint import Asked, Endpoint
from services.gateway.generation import Began, Ended, GenerationRequest, Piece
from services.gateway.invalid_field import BeyondContext, InvalidField
from services.gateway.request_log import current_end
from services.gateway.responses.schema import (
    NOT_STORED,
    ResponsesRequest,
    chat_of,
    parse_responses,
)
from services.gateway.responses.truncation import fitted
from services.gateway.responses.writer import ResponseWriter
from services.gateway.schema import chat_to_generation

CONTEXT_FIELDS = {"messages": "input", "max_completion_tokens": "max_output_tokens"}
"""The fields of a chat that may ask for too much, and those of a body that they come from."""


@dataclass(frozen=True, slots=True)
class AskedResponse(Asked):
    """The request of a response, and the body that it comes from."""

    request: ResponsesRequest
    writer: ResponseWriter


class Responses(Endpoint[AskedResponse]):
    """POST /v1/responses as an ASGI application."""

    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> AskedResponse:
        request = parse_responses(body)
        adapter = self.core.check_model(request.model)
        writer = ResponseWriter(request_id, adapter or self.core.model_name, request)
        try:
            generation = self._generation(request, request_id, timeout)
        except BeyondContext:
            if request.truncation != "auto":
                raise
            generation = self._generation(request, request_id, timeout, request.num_items - 1)
        generation = replace(generation, adapter=adapter)
        return AskedResponse([generation], request, writer, is_streamed=bool(request.stream))

    def _generation(
        self,
        request: ResponsesRequest,
        request_id: str,
        timeout: float | None,
        num_dropped: int = 0,
    ) -> GenerationRequest:
        asked = chat_of(request, num_dropped)
        try:
            return chat_to_generation(asked.chat, request_id, timeout, self.core.max_model_len())
        except InvalidField as error:
            raise asked.explain(error) from None
        except BeyondContext as error:
            error.param = CONTEXT_FIELDS.get(error.param, error.param)
            raise

    async def answer(
        self, asked: AskedResponse, scope: Scope, receive: Receive, send: Send
    ) -> None:
        [generation] = asked.requests
        if asked.request.truncation == "auto":
            generation = await self._truncated(asked.request, generation)
        if asked.request.stream:
            await self._send_stream(generation, asked.writer, send)
        else:
            await self._send_whole(generation, asked.writer, scope, receive, send)

    async def _truncated(
        self, request: ResponsesRequest, generation: GenerationRequest
    ) -> GenerationRequest:
        """Return the request without as many of its oldest items as do not fit."""

        def make(num_dropped: int) -> GenerationRequest:
            made = self._generation(request, generation.request_id, generation.timeout, num_dropped)
            given = generation
            return replace(made, adapter=given.adapter, traceparent=given.traceparent)

        return await fitted(self.core, make, request.num_items, request.max_output_tokens or 1)

    async def _send_whole(
        self,
        generation: GenerationRequest,
        writer: ResponseWriter,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        async with self.core.generate(generation) as events:
            async for event in events:
                match event:
                    case Piece():
                        writer.piece(event)
                    case Ended():
                        writer.end(event)
        await JSONResponse(writer.response)(scope, receive, send)

    async def _send_stream(
        self, generation: GenerationRequest, writer: ResponseWriter, send: Send
    ) -> None:
        """Send the events of a response.

        Nothing is sent before Began, so an earlier failure is an HTTP error.
        """
        started = False
        try:
            async with self.core.generate(generation) as events:
                async for event in events:
                    match event:
                        case Began():
                            started = True
                            await start_stream(send)
                            await send_body(send, writer.begin())
                        case Piece():
                            await send_body(send, writer.piece(event))
                        case Ended():
                            tail = writer.end(event)
        except ServingError as error:
            if not started:
                raise
            tail = writer.fail(error)
        await send({"type": "http.response.body", "body": tail + sse.DONE})


async def refuse_stored(request: Request) -> Response:
    """Answer whatever asks for a response that was made before."""
    message = f"{request.method} {request.url.path}: {NOT_STORED}"
    current_end().refuse(404, message)
    error = {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": "response_not_stored",
    }
    return JSONResponse({"error": error}, 404)

"""POST /tokenize and POST /detokenize."""

from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.endpoint import Asked, Endpoint
from services.gateway.generation import conversion_of
from services.gateway.tokenize_schema import (
    DetokenizeRequest,
    TokenizeRequest,
    parse,
    to_detokenize,
    to_tokenize,
)


@dataclass(frozen=True, slots=True)
class AskedConversion(Asked):
    """The request of a conversion between text and tokens."""


class Tokenize(Endpoint[AskedConversion]):
    """POST /tokenize as an ASGI application."""

    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> AskedConversion:
        request = parse(body, TokenizeRequest)
        self.core.check_model(request.model)
        max_model_len = self.core.max_model_len()
        return AskedConversion([to_tokenize(request, request_id, timeout, max_model_len)])

    async def answer(
        self, asked: AskedConversion, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async with self.core.generate(asked.requests[0]) as events:
            found = await conversion_of(events)
        body = {
            "count": len(found.token_ids),
            "max_model_len": self.core.max_model_len(),
            "tokens": found.token_ids,
            "token_strs": found.token_names,
        }
        await json_response(body)(scope, receive, send)


class Detokenize(Endpoint[AskedConversion]):
    """POST /detokenize as an ASGI application."""

    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> AskedConversion:
        request = parse(body, DetokenizeRequest)
        self.core.check_model(request.model)
        max_model_len = self.core.max_model_len()
        return AskedConversion([to_detokenize(request, request_id, timeout, max_model_len)])

    async def answer(
        self, asked: AskedConversion, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async with self.core.generate(asked.requests[0]) as events:
            found = await conversion_of(events)
        await json_response({"prompt": found.text})(scope, receive, send)


def json_response(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")

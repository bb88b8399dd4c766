"""POST /v1/classify and POST /v1/embeddings."""

import asyncio
import base64
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.messages import Usage
from services.gateway.endpoint import Asked, Endpoint
from services.gateway.generation import Core, GenerationRequest, Result, last_of
from services.gateway.invalid_field import InvalidField
from services.gateway.pooled import best_classes
from services.gateway.pooling_schema import (
    parse_classify,
    parse_embeddings,
    to_embeddings,
    to_pooling,
)
from services.gateway.sse import usage_body

MAX_AT_ONCE = 32
"""How many embeddings of one request for many are in flight, so that it does not fill the queue."""


@dataclass(frozen=True, slots=True)
class AskedClass(Asked):
    """The request of a classification, and how many labels are wanted: None for all."""

    top_k: int | None


class Classifications(Endpoint[AskedClass]):
    """POST /v1/classify as an ASGI application."""

    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> AskedClass:
        request = parse_classify(body)
        assert request.messages is not None
        self.core.check_model(request.model)
        max_model_len = self.core.max_model_len()
        asked = to_pooling(
            "classify",
            request.messages,
            request_id,
            timeout,
            max_model_len,
            request.mm_processor_kwargs,
        )
        return AskedClass([asked], request.top_k)

    async def answer(self, asked: AskedClass, scope: Scope, receive: Receive, send: Send) -> None:
        result = await result_of(self.core, asked.requests[0])
        body = head(f"classify-{scope['request_id']}", self.core.model_name) | {
            "data": [class_body(result, asked.top_k)],
            "usage": usage_body(result.usage),
            "timings": result.timings,
        }
        await json_response(body)(scope, receive, send)


@dataclass(frozen=True, slots=True)
class AskedEmbeddings(Asked):
    """The requests of some embeddings, and the form in which they are wanted."""

    is_base64: bool
    dimensions: int | None
    """The length that the client expects."""
    with_timings: bool


class Embeddings(Endpoint[AskedEmbeddings]):
    """POST /v1/embeddings as an ASGI application."""

    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> AskedEmbeddings:
        request = parse_embeddings(body)
        self.core.check_model(request.model)
        asked = to_embeddings(request, request_id, timeout, self.core.max_model_len())
        is_base64 = request.encoding_format == "base64"
        return AskedEmbeddings(asked, is_base64, request.dimensions, bool(request.timings))

    async def answer(
        self, asked: AskedEmbeddings, scope: Scope, receive: Receive, send: Send
    ) -> None:
        num_tokens = Counter[str]()

        def write(index: int, result: Result) -> msgspec.Raw:
            """Return an entry of the answer as JSON.

            All entries at once would keep the event loop busy for long.
            """
            num_tokens["prompt_tokens"] += result.usage.prompt_tokens
            num_tokens["image_tokens"] += result.usage.image_tokens
            check_dimensions(result, asked.dimensions)
            entry = embedding_body(index, result, asked.is_base64)
            if asked.with_timings:
                entry["timings"] = result.timings
            return msgspec.Raw(msgspec.json.encode(entry))

        data = await results_of(self.core, asked.requests, write)
        body = head(f"embd-{scope['request_id']}", self.core.model_name) | {
            "data": data,
            "usage": usage_body(Usage(**num_tokens)),
        }
        await json_response(body)(scope, receive, send)


async def result_of(core: Core, request: GenerationRequest) -> Result:
    """Return the result of a request that asks for no text."""
    async with core.generate(request) as events:
        return await last_of(events)


async def results_of(
    core: Core, requests: Sequence[GenerationRequest], write: Callable[[int, Result], msgspec.Raw]
) -> list[msgspec.Raw]:
    """Return what `write` makes of the index and the result of each request, in their order.

    A few requests are in flight at a time. The deadline holds for all together.

    Raises
    ------
    ServingError
        if one of them fails. The others are given up.
    """
    clock = asyncio.get_running_loop().time
    began = clock()
    written = [msgspec.Raw()] * len(requests)
    waiting = iter(enumerate(requests))

    async def work() -> None:
        for index, request in waiting:
            timeout = core.request_timeout if request.timeout is None else request.timeout
            left = max(0.0, began + timeout - clock())
            written[index] = write(index, await result_of(core, replace(request, timeout=left)))

    workers = [asyncio.create_task(work()) for _ in range(min(MAX_AT_ONCE, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return written


def head(answer_id: str, model: str) -> dict[str, Any]:
    return {"id": answer_id, "object": "list", "created": int(time.time()), "model": model}


def class_body(result: Result, top_k: int | None) -> dict[str, Any]:
    """Return vLLM's object for a classification.

    With `top_k`, the best labels with their probabilities stand in place of all probabilities.
    """
    best = best_classes(result.values, top_k or 1)
    body = {"index": 0, "label": result.labels[best[0]], "num_classes": len(result.labels)}
    if top_k is None:
        return body | {"probs": result.values.tolist()}
    top = [{"index": n, "label": result.labels[n], "prob": float(result.values[n])} for n in best]
    return body | {"top": top}


def embedding_body(index: int, result: Result, is_base64: bool) -> dict[str, Any]:
    """Return OpenAI's object for an embedding."""
    values = result.values
    embedding = (
        base64.b64encode(values.astype("<f4").tobytes()).decode() if is_base64 else values.tolist()
    )
    return {"object": "embedding", "index": index, "embedding": embedding}


def check_dimensions(result: Result, wanted: int | None) -> None:
    """Raise InvalidField unless the embedding has the wanted length."""
    length = len(result.values)
    if wanted not in (None, length):
        raise InvalidField("dimensions", f"the model's embeddings have {length}; leave it out")


def json_response(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")

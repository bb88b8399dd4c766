"""The span of each request at the gateway, which all other spans of its trace are below."""

import time
from dataclasses import replace
from typing import Any

from common.errors import ServingError
from common.messages import Task
from common.tracing import NO_SPAN, NO_TRACING, REQUEST_ID, Tracing, is_sampled
from services.gateway.generation import Began, Ended, GenerationEvent, GenerationRequest, Result

OPERATIONS: dict[Task, str] = {
    "generate": "chat",
    "classify": "classify",
    "embed": "embeddings",
    "tokenize": "tokenize",
    "detokenize": "detokenize",
}
"""OpenTelemetry's names for the tasks. It has them for a chat and for embeddings only."""


class RequestTraces:
    """An observer that begins the span of each request, and ends it with what came of it.

    Attributes are named as OpenTelemetry's conventions for generative AI name them. They hold
    nothing of a prompt, an image or an answer.
    """

    def __init__(self, tracing: Tracing, model_name: str) -> None:
        self._tracing = tracing
        self._model_name = model_name

    def with_span(self, request: GenerationRequest, arrival: float) -> GenerationRequest:
        """Return a request with its span, if there is one. It must reach the core with that."""
        if self._tracing is NO_TRACING and not is_sampled(request.traceparent):
            return request
        operation = OPERATIONS[request.task]
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "twinlens",
            "gen_ai.request.model": self._model_name,
            REQUEST_ID: request.request_id,
            "twinlens.num_items": len(request.images),
        } | sampling_attributes(request)
        name = f"{operation} {self._model_name}"
        span = self._tracing.begin_trace(name, request.traceparent, arrival, attributes)
        return request if span is NO_SPAN else replace(request, span=span)

    def begin(self, request: GenerationRequest, arrival: float) -> "TracedRequest":
        return TracedRequest(request, arrival)

    def on_refused(self, request: GenerationRequest, arrival: float, error: ServingError) -> None:
        request.span.end(error_attributes(error), outline(error))


class TracedRequest:
    """Ends the span of one admitted request."""

    def __init__(self, request: GenerationRequest, arrival: float) -> None:
        self._span = request.span
        self._arrival = arrival
        self._attributes: dict[str, Any] = {}
        self._finish_reasons: dict[int, str] = {}
        """By the index of the answer."""

    def on_event(self, event: GenerationEvent) -> None:
        if self._span is NO_SPAN:
            return
        if isinstance(event, Ended):
            self._finish_reasons[event.choice] = event.finish_reason
        match event:
            case Began(choice=0):
                seconds = time.monotonic() - self._arrival
                self._attributes["twinlens.time_to_first_token_seconds"] = seconds
            case Ended(is_last=True) | Result():
                self._attributes |= {
                    "gen_ai.usage.input_tokens": event.usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": event.usage.completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": event.usage.cached_tokens,
                    "twinlens.usage.image_tokens": event.usage.image_tokens,
                }

    def on_end(self, outcome: str, error: ServingError | None) -> None:
        if self._span is NO_SPAN:
            return
        reasons = [reason for _, reason in sorted(self._finish_reasons.items())]
        self._attributes["gen_ai.response.finish_reasons"] = tuple(reasons) or (outcome,)
        if error:
            self._attributes |= error_attributes(error)
        self._span.end(self._attributes, outline(error) if error else "")


def sampling_attributes(request: GenerationRequest) -> dict[str, Any]:
    """Return what the client has set of the sampling and the length."""
    given = {
        "gen_ai.request.max_tokens": request.stopping.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
    }
    return {name: value for name, value in given.items() if value is not None}


def error_attributes(error: ServingError) -> dict[str, Any]:
    return {"error.type": error.code, "twinlens.error.stage": error.stage}


def outline(error: ServingError) -> str:
    """Return what a span may say of an error. Messages for a client may quote its prompt."""
    return error.message if error.http_status >= 500 else error.code

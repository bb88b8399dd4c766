"""The spans of requests at a language group."""

import time

from common.tracing import ATTEMPT, Attributes, Tracing
from services.llm.request import Request


def record_request(tracing: Tracing, request: Request, error: str) -> None:
    """Record a request that ends now, if it is traced: its wait, its prefill and its decoding.

    It may end before its first token. `error` is empty unless it failed.
    """
    prompt = request.prompt
    if not prompt.traceparent:
        return
    now = time.monotonic()
    attributes: Attributes = {
        ATTEMPT: prompt.attempt,
        "twinlens.num_prompt_tokens": request.num_prompt_tokens,
        "twinlens.num_cached_tokens": request.num_cached_tokens or 0,
        "twinlens.num_output_tokens": len(request.output_token_ids) - request.num_resumed_tokens,
    }
    span = tracing.begin("llm", prompt.traceparent, request.arrived, attributes, "consumer")
    begins = {
        "queue": request.arrived,
        "prefill": request.first_scheduled,
        "decode": request.first_token,
    }
    ends = (request.first_scheduled, request.first_token, now)
    for (name, began), ended in zip(begins.items(), ends, strict=True):
        if began is not None:
            tracing.begin(name, span.traceparent, began).end(ended=ended or now)
    span.end(error=error, ended=now)

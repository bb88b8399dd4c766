"""The gateway's metrics, and the one place that requests are observed: around `Core.generate`."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from common.errors import Internal, ServingError
from common.logs import get_logger
from common.messages import Usage
from common.metrics import TOKENS, StageMetrics
from common.tracing import NO_TRACING, Tracing, trace_id_of
from services.gateway.generation import (
    Conversion,
    Core,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    Result,
)
from services.gateway.observers import ABORTED, CONVERTED, POOLED, Observation, RequestObserver
from services.gateway.peers import STAGES
from services.gateway.request_log import current_end
from services.gateway.traces import RequestTraces

OUTCOMES = ("stop", "length", "repetition", "tool_calls", ABORTED, Internal.code)
"""The outcomes that every gateway shows, also before the first request has ended so."""
REQUEST_STAGES = {
    "preprocess": "preprocess_seconds",
    "llm_queue": "queue_seconds",
    "llm_prefill": "prefill_seconds",
    "llm_decode": "decode_seconds",
}
"""The stages of a request, and the names of their times in the timings of its answer."""
ITEM_STAGES = {"vision_queue": "queue_seconds", "vision_encode": "encode_seconds"}
"""The stages of an item, likewise."""


class Metrics(StageMetrics):
    """All metrics of the gateway. They are also an observer of its requests."""

    def __init__(self) -> None:
        super().__init__("gateway")
        self.requests = self.counter("requests", "Admitted requests, by how they ended.", "outcome")
        self.rejections = self.counter(
            "rejections", "Requests that were refused at admission, by cause.", "reason"
        )
        self.attempts = self.counter(
            "attempts", "Attempts started: one for each request, and one for each retry."
        )
        self.failovers = self.counter(
            "failovers",
            "Attempts that were lost and retried, by the stage that was lost or not reachable.",
            "stage",
        )
        self.num_in_flight = 0
        self.gauge(
            "requests_in_flight",
            "Admitted requests that have not ended.",
            lambda: self.num_in_flight,
        )
        self._add_times()
        self._add_tokens()
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for stage in STAGES:
            self.failovers.labels(stage)
        for source in ("computed", "cached"):
            self.items.labels(source)

    def _add_times(self) -> None:
        self.first_token = self.histogram(
            "time_to_first_token_seconds",
            "Seconds from the arrival of a request to its first token (TTFT).",
        )
        self.inter_token = self.histogram(
            "inter_token_latency_seconds",
            "Seconds between two pieces of an answer, per token of the later piece (ITL).",
        )
        self.output_token = self.histogram(
            "time_per_output_token_seconds",
            "Seconds from the first token of an answer to its last one, per token after the first "
            "(TPOT). Answers of one token do not count.",
        )
        self.duration = self.histogram(
            "request_seconds", "Seconds from the arrival of a request to its end."
        )
        stage_seconds = self.histogram(
            "stage_seconds",
            "Seconds that an answered request spent in a stage; for the stages of vision, that "
            "each of its items spent there.",
            "stage",
        )
        self.stages = {
            stage: stage_seconds.labels(stage) for stage in (*REQUEST_STAGES, *ITEM_STAGES)
        }

    def _add_tokens(self) -> None:
        prompt_tokens = self.counter(
            "prompt_tokens",
            "Prompt tokens of answered requests: computed, or cached (in the prefix cache).",
            "source",
        )
        self.computed_tokens = prompt_tokens.labels("computed")
        self.cached_tokens = prompt_tokens.labels("cached")
        self.items = self.counter(
            "items",
            "Items of answered requests: computed, or cached (equal ones were encoded before, or "
            "the prefix cache had them).",
            "source",
        )
        self.image_tokens = self.counter(
            "image_tokens", "Prompt tokens of answered requests that stand for images."
        )
        self.generation_tokens = self.counter("generation_tokens", "Output tokens generated.")
        self.prompt_length = self.histogram(
            "request_prompt_tokens", "Prompt tokens of an answered request.", buckets=TOKENS
        )
        self.answer_length = self.histogram(
            "request_generation_tokens", "Output tokens of an answered request.", buckets=TOKENS
        )

    def watch(
        self, load: Callable[[], tuple[int, int]], kv_cache_usage: Callable[[], float]
    ) -> None:
        """Add what the core knows.

        `load` returns the requests with and without a first token. `kv_cache_usage` returns the
        mean of the language groups.
        """
        self.gauge(
            "requests_running", "Admitted requests that have a first token.", lambda: load()[0]
        )
        self.gauge(
            "requests_waiting", "Admitted requests that have no token yet.", lambda: load()[1]
        )
        self.gauge(
            "llm_kv_cache_usage_ratio",
            "Share of the KV cache that is in use, from 0 to 1: the mean of the language groups.",
            kv_cache_usage,
        )

    def begin(self, request: GenerationRequest, arrival: float) -> "MeasuredRequest":
        return MeasuredRequest(self, arrival)

    def on_refused(self, request: GenerationRequest, arrival: float, error: ServingError) -> None:
        self.rejections.labels(error.cause or error.code).inc()

    def observe_answer(self, usage: Usage, timings: Mapping[str, Any]) -> None:
        """Observe the tokens of an answered request, and the times of its stages."""
        self.computed_tokens.inc(max(0, usage.prompt_tokens - usage.cached_tokens))
        self.cached_tokens.inc(usage.cached_tokens)
        self.image_tokens.inc(usage.image_tokens)
        self.prompt_length.observe(usage.prompt_tokens)
        self.answer_length.observe(usage.completion_tokens)
        self._observe_stages(REQUEST_STAGES, timings)
        for item in timings.get("images", ()):
            self.items.labels("cached" if item.get("cached") else "computed").inc()
            self._observe_stages(ITEM_STAGES, item)

    def _observe_stages(self, stages: Mapping[str, str], timings: Mapping[str, Any]) -> None:
        for stage, name in stages.items():
            if name in timings:
                self.stages[stage].observe(timings[name])


@dataclass(slots=True)
class Paced:
    """When the tokens of one answer came, on the monotonic clock."""

    first_token: float
    last_token: float
    num_tokens: int


class MeasuredRequest:
    """Counts one admitted request, and measures its events as they pass."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._answers: dict[int, Paced] = {}
        """By index, of those that have a token."""
        metrics.num_in_flight += 1

    def on_event(self, event: GenerationEvent) -> None:
        match event:
            case Piece(token_ids=ids, choice=choice) if ids:
                self._observe_tokens(choice, len(ids))
            case Ended(is_last=True) | Result():
                self._metrics.observe_answer(event.usage, event.timings)

    def on_end(self, outcome: str, error: ServingError | None) -> None:
        metrics = self._metrics
        metrics.num_in_flight -= 1
        metrics.requests.labels(outcome).inc()
        metrics.duration.observe(time.monotonic() - self._arrival)
        for answer in self._answers.values():
            if answer.num_tokens > 1:
                seconds = answer.last_token - answer.first_token
                metrics.output_token.observe(seconds / (answer.num_tokens - 1))

    def _observe_tokens(self, choice: int, count: int) -> None:
        now = time.monotonic()
        if not self._answers:
            self._metrics.first_token.observe(now - self._arrival)
        answer = self._answers.get(choice)
        if answer is None:
            self._answers[choice] = Paced(now, now, count)
        else:
            self._metrics.inter_token.observe((now - answer.last_token) / count)
            answer.last_token = now
            answer.num_tokens += count
        self._metrics.generation_tokens.inc(count)


class ObservedEvents:
    """The events of one request, which its observers see as they pass."""

    def __init__(
        self, events: AsyncIterator[GenerationEvent], observations: Sequence[Observation]
    ) -> None:
        self.outcome = ABORTED
        self._events = events
        self._observations = observations

    def __aiter__(self) -> "ObservedEvents":
        return self

    async def __anext__(self) -> GenerationEvent:
        event = await self._events.__anext__()
        if isinstance(event, Ended) and event.is_last:
            self.outcome = event.finish_reason
        elif isinstance(event, Result):
            self.outcome = POOLED
        elif isinstance(event, Conversion):
            self.outcome = CONVERTED
        for observation in self._observations:
            observation.on_event(event)
        return event


class MeasuredCore:
    """A Core whose requests are observed, and that raises only ServingErrors.

    Metrics are the first observer.
    """

    def __init__(
        self,
        core: Core,
        metrics: Metrics | None = None,
        observers: Sequence[RequestObserver] = (),
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self.core = core
        self.metrics = metrics or Metrics()
        self.traces = RequestTraces(tracing, core.model_name)
        self.observers: list[RequestObserver] = [self.metrics, self.traces, *observers]
        self.model_name = core.model_name
        self.request_timeout = core.request_timeout
        self.check_model = core.check_model
        self.adapters = core.adapters
        self.max_model_len = core.max_model_len
        self.unready_reason = core.unready_reason

    @property
    def is_draining(self) -> bool:
        return self.core.is_draining

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        arrival = time.monotonic()
        request = self.traces.with_span(request, arrival)
        current_end().trace(trace_id_of(request.span.traceparent))
        async with AsyncExitStack() as stack:
            try:
                with serving_errors_only():
                    events = await stack.enter_async_context(self.core.generate(request))
            except ServingError as error:
                current_end().fail(error)
                for observer in self.observers:
                    observer.on_refused(request, arrival, error)
                raise
            observations = [observer.begin(request, arrival) for observer in self.observers]
            with ended_once(ObservedEvents(events, observations), observations) as observed:
                yield observed


@contextmanager
def ended_once(
    observed: ObservedEvents, observations: Sequence[Observation]
) -> Iterator[ObservedEvents]:
    """Notify the observers of the request's end after the block.

    An error that the reader of the events raises counts as the outcome, too.
    """
    failure: ServingError | None = None
    try:
        with serving_errors_only():
            yield observed
    except ServingError as error:
        failure = error
        current_end().fail(error)
        raise
    finally:
        outcome = failure.code if failure else observed.outcome
        for observation in observations:
            observation.on_end(outcome, failure)


@contextmanager
def serving_errors_only() -> Iterator[None]:
    """Log any other error, which is a bug in the gateway, and raise Internal in its place."""
    try:
        yield
    except ServingError:
        raise
    except Exception as error:
        get_logger().exception("unexpected error")
        raise Internal("unexpected error in the gateway; see its log", stage="gateway") from error

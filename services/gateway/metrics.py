"""The gateway's metrics, and the one place that requests are observed: around `Core.generate`."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from common.errors import Internal, ServingError
from common.logs import get_logger
from services.gateway.generation import (
    Core,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    Result,
)
from services.gateway.observers import ABORTED, POOLED, Observation, RequestObserver

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """All metrics of the gateway, in one registry."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "twinlens_requests", "Admitted requests, by how they ended.", ["outcome"]
        )
        self.rejections = counter(
            "twinlens_rejections", "Requests that were refused at admission, by cause.", ["reason"]
        )
        self.waiting = gauge(
            "twinlens_requests_waiting", "Admitted requests that have no token yet."
        )
        self.in_flight = gauge(
            "twinlens_requests_in_flight", "Admitted requests that have not ended."
        )
        self.attempts = counter(
            "twinlens_attempts", "Attempts started: one for each request, and one for each retry."
        )
        self.failovers = counter(
            "twinlens_failovers",
            "Attempts that were lost and retried, by the stage that was lost or not reachable.",
            ["stage"],
        )
        self.first_token = histogram(
            "twinlens_time_to_first_token_seconds",
            "Seconds from the arrival of a request to its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
        )
        self.duration = histogram(
            "twinlens_request_duration_seconds",
            "Seconds from the arrival of a request to its end.",
            buckets=DURATION_BUCKETS,
        )
        self.inter_token = histogram(
            "twinlens_inter_token_latency_seconds",
            "Seconds between two pieces of an answer, per token of the later piece.",
            buckets=LATENCY_BUCKETS,
        )
        self.prompt_tokens = counter(
            "twinlens_prompt_tokens", "Prompt tokens of answered requests."
        )
        self.generation_tokens = counter("twinlens_generation_tokens", "Output tokens generated.")
        self.image_tokens = counter("twinlens_image_tokens", "Prompt tokens that stand for images.")

    def begin(self, request: GenerationRequest, arrival: float) -> "MeasuredRequest":
        return MeasuredRequest(self, arrival)

    def on_refused(self, request: GenerationRequest, arrival: float, error: ServingError) -> None:
        self.rejections.labels(error.cause or error.code).inc()


class MeasuredRequest:
    """Counts one admitted request, and measures its events as they pass."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last_token: float | None = None
        metrics.in_flight.inc()

    def on_event(self, event: GenerationEvent) -> None:
        match event:
            case Piece(token_ids=ids) if ids:
                self._observe_tokens(len(ids))
            case Ended() | Result():
                self._metrics.prompt_tokens.inc(event.usage.prompt_tokens)
                self._metrics.image_tokens.inc(event.usage.image_tokens)

    def on_end(self, outcome: str, error: ServingError | None) -> None:
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(outcome).inc()
        self._metrics.duration.observe(time.monotonic() - self._arrival)

    def _observe_tokens(self, count: int) -> None:
        now = time.monotonic()
        if self._last_token is None:
            self._metrics.first_token.observe(now - self._arrival)
        else:
            self._metrics.inter_token.observe((now - self._last_token) / count)
        self._last_token = now
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
        if isinstance(event, Ended):
            self.outcome = event.finish_reason
        elif isinstance(event, Result):
            self.outcome = POOLED
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
    ) -> None:
        self.core = core
        self.metrics = metrics or Metrics()
        self.observers: list[RequestObserver] = [self.metrics, *observers]
        self.model_name = core.model_name
        self.request_timeout = core.request_timeout
        self.check_model = core.check_model
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
        async with AsyncExitStack() as stack:
            try:
                with serving_errors_only():
                    events = await stack.enter_async_context(self.core.generate(request))
            except ServingError as error:
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

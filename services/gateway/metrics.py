"""What the gateway counts, and the one place where it is observed: around core.generate."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from common.errors import Internal, ServingError
from common.logs import get_logger
from services.gateway.generation import Core, Ended, Event, GenerationRequest, Piece

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The collectors, on a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()
        self.registry = registry = registry or CollectorRegistry()
        self.requests = Counter(
            "twinlens_requests",
            "Admitted requests, by how they ended.",
            ["outcome"],
            registry=registry,
        )
        self.rejections = Counter(
            "twinlens_rejections",
            "Requests that were not admitted, by cause.",
            ["reason"],
            registry=registry,
        )
        self.waiting = Gauge(
            "twinlens_requests_waiting",
            "Requests admitted and without their first token.",
            registry=registry,
        )
        self.attempts = Counter(
            "twinlens_attempts", "Ways through the stages that requests began.", registry=registry
        )
        self.failovers = Counter(
            "twinlens_failovers",
            "Attempts that were lost and begun anew, by the stage that was gone.",
            ["stage"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "twinlens_requests_in_flight", "Requests admitted and not ended.", registry=registry
        )
        self.first_token = Histogram(
            "twinlens_time_to_first_token_seconds",
            "From the door to the first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.duration = Histogram(
            "twinlens_request_duration_seconds",
            "From the door to the end.",
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "twinlens_inter_token_latency_seconds",
            "Between pieces, per token.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "twinlens_prompt_tokens", "Prompt tokens of answered requests.", registry=registry
        )
        self.generation_tokens = Counter(
            "twinlens_generation_tokens", "Tokens generated.", registry=registry
        )
        self.image_tokens = Counter(
            "twinlens_image_tokens", "Prompt tokens that stand for images.", registry=registry
        )


class Observed:
    """A request's events, observed as they pass."""

    def __init__(self, events: AsyncIterator[Event], metrics: Metrics, began: float) -> None:
        self.events = events
        self.metrics = metrics
        self.began = began
        self.last_token: float | None = None
        self.outcome = "aborted"

    def __aiter__(self) -> "Observed":
        return self

    async def __anext__(self) -> Event:
        event = await self.events.__anext__()
        match event:
            case Piece(token_ids=ids) if ids:
                self.observe_tokens(len(ids))
            case Ended():
                self.observe_end(event)
        return event

    def observe_tokens(self, count: int) -> None:
        now = time.monotonic()
        if self.last_token is None:
            self.metrics.first_token.observe(now - self.began)
        else:
            self.metrics.inter_token.observe((now - self.last_token) / count)
        self.last_token = now
        self.metrics.generation_tokens.inc(count)

    def observe_end(self, event: Ended) -> None:
        self.outcome = event.finish_reason
        self.metrics.prompt_tokens.inc(event.usage.prompt_tokens)
        self.metrics.image_tokens.inc(event.usage.image_tokens)


class MeasuredCore:
    """A Core whose every request is counted, and whose only errors are ServingErrors."""

    def __init__(self, core: Core, metrics: Metrics | None = None) -> None:
        self.core = core
        self.metrics = metrics or Metrics()
        self.model_name = core.model_name
        self.check_model = core.check_model
        self.max_model_len = core.max_model_len
        self.unready_reason = core.unready_reason

    @property
    def is_draining(self) -> bool:
        return self.core.is_draining

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        began = time.monotonic()
        async with AsyncExitStack() as stack:
            try:
                with serving_errors_only():
                    events = await stack.enter_async_context(self.core.generate(request))
            except ServingError as error:
                self.metrics.rejections.labels(error.cause or error.code).inc()
                raise
            with self.counted(Observed(events, self.metrics, began)) as observed:
                yield observed

    @contextmanager
    def counted(self, observed: Observed) -> Iterator[Observed]:
        """From admission to the end, whichever it is; what the reader of the events raises passes
        here, too."""
        self.metrics.in_flight.inc()
        try:
            with serving_errors_only():
                yield observed
        except ServingError as error:
            observed.outcome = error.code
            raise
        finally:
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(observed.outcome).inc()
            self.metrics.duration.observe(time.monotonic() - observed.began)


@contextmanager
def serving_errors_only() -> Iterator[None]:
    """An unexpected error, which is our own mistake, is logged and becomes Internal: a client is
    told that there was one."""
    try:
        yield
    except ServingError:
        raise
    except Exception as error:
        get_logger().exception("unexpected error")
        raise Internal(
            "an unexpected error in the gateway; its log tells more", stage="gateway"
        ) from error

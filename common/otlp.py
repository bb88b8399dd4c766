"""Exports spans with OpenTelemetry's SDK over OTLP/gRPC.

Ended spans are made directly, and not by the SDK's tracer, which takes four times as long: for
locks, events and limits that nothing here needs. The SDK samples, queues, encodes and sends.

A thread of this process sends them in batches. A collector that cannot be reached costs the spans,
and nothing else: the queue is bounded, and the log has one line.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import (
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    SERVICE_VERSION,
    Resource,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from common.config import BadSetting
from common.errors import shorten
from common.logs import get_logger
from common.tracing import MAX_ERROR_CHARS, NO_SPAN, Attributes, Kind, Span, Tracing, trace_id_of

CLOSE_SECONDS = 2.0
"""How long the end of a process may be delayed by the export of its last spans."""
# A proxy that the environment sets is not meant for a collector of one's own.
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)
SCOPE = InstrumentationScope("twinlens", version("twinlens"))
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
UNSET = Status()
KINDS = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}


class RecordedSpan(Span):
    """A span that is exported once it ends."""

    __slots__ = ("_attributes", "_began", "_kind", "_name", "_parent", "_tracing")

    def __init__(
        self,
        tracing: "OtlpTracing",
        name: str,
        trace_id: str,
        parent: str,
        began: float | None,
        attributes: Attributes | None,
        kind: Kind,
    ) -> None:
        """`parent` is a `traceparent`; empty if the span is the first one of its trace."""
        super().__init__(f"00-{trace_id}-{random_id(64):016x}-01")
        self._tracing = tracing
        self._name = name
        self._parent = parent
        self._began = time.time_ns() if began is None else wall_nanoseconds(began)
        self._attributes = attributes
        self._kind = kind

    def end(
        self, attributes: Attributes | None = None, error: str = "", ended: float | None = None
    ) -> None:
        status = Status(StatusCode.ERROR, shorten(error, MAX_ERROR_CHARS)) if error else UNSET
        self._tracing.export(
            ReadableSpan(
                self._name,
                context_of(self.traceparent),
                context_of(self._parent, is_remote=True) if self._parent else None,
                self._tracing.resource,
                {**(self._attributes or {}), **(attributes or {})},
                kind=KINDS[self._kind],
                status=status,
                start_time=self._began,
                end_time=time.time_ns() if ended is None else wall_nanoseconds(ended),
                instrumentation_scope=SCOPE,
            )
        )


class OtlpTracing(Tracing):
    """Records spans, and exports them in the background."""

    def __init__(
        self, endpoint: str, role: str, member_id: str, exporter: SpanExporter | None = None
    ) -> None:
        """Start the thread that exports. Without an `endpoint`, OpenTelemetry's variables name one.

        Parameters
        ----------
        role, member_id
            name the process.
        exporter
            gets the spans in place of the endpoint.

        Raises
        ------
        BadSetting
            if a variable of OpenTelemetry has a value that its SDK refuses.
        """
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        try:
            sender = exporter or OTLPSpanExporter(
                endpoint=endpoint or None,
                channel_options=CHANNEL_OPTIONS,  # type: ignore[arg-type]
            )
            self._exporter = ReportingExporter(sender, endpoint)
            self._processor = BatchSpanProcessor(self._exporter)
            self.resource = resource_of(role, member_id)
            self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        except ValueError as e:
            raise BadSetting(f"a variable OTEL_* is wrong: {e}") from e
        self.export = self._processor.on_end

    def begin_trace(
        self, name: str, incoming: str, began: float, attributes: Attributes | None = None
    ) -> Span:
        trace_id = trace_id_of(incoming) or f"{random_id(128):032x}"
        above = Context()
        if incoming:
            parent = NonRecordingSpan(context_of(incoming, is_remote=True))
            above = set_span_in_context(parent, above)
        found = self._sampler.should_sample(above, int(trace_id, 16), name, SpanKind.SERVER)
        if not found.decision.is_sampled():
            return NO_SPAN
        return RecordedSpan(self, name, trace_id, incoming, began, attributes, "server")

    def begin(
        self,
        name: str,
        parent: str,
        began: float | None = None,
        attributes: Attributes | None = None,
        kind: Kind = "internal",
    ) -> Span:
        if not parent:
            return NO_SPAN
        return RecordedSpan(self, name, trace_id_of(parent), parent, began, attributes, kind)

    def close(self) -> None:
        """Export what is left, within CLOSE_SECONDS.

        Nothing is tried if the last export failed.
        """
        closing = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        closing.start()
        if not self._exporter.is_failing:
            closing.join(CLOSE_SECONDS)


class ReportingExporter(SpanExporter):
    """Logs that an exporter fails, and that it works again, once each."""

    def __init__(self, exporter: SpanExporter, endpoint: str = "") -> None:
        self._exporter = exporter
        self._endpoint = endpoint or "that of OTEL_EXPORTER_OTLP_*"
        self.is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self.is_failing:
            reason = "the collector does not take them, so they are lost"
            get_logger().warning("no traces", endpoint=self._endpoint, reason=reason)
        elif self.is_failing and not is_failing:
            get_logger().info("traces are exported again")
        self.is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def resource_of(role: str, member_id: str) -> Resource:
    """Return what names the process: a service for each role, and an instance for each member."""
    prefix = os.environ.get(OTEL_SERVICE_NAME) or "twinlens"
    return Resource.create(
        {
            SERVICE_NAME: f"{prefix}-{role}",
            SERVICE_INSTANCE_ID: member_id,
            SERVICE_VERSION: version("twinlens"),
        }
    )


def context_of(traceparent: str, is_remote: bool = False) -> SpanContext:
    """Return the context of the span that a `traceparent` names."""
    _, trace_id, span_id, flags = traceparent.split("-")
    flag = SAMPLED if flags == "01" else TraceFlags.get_default()
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, flag)


def random_id(bits: int) -> int:
    """Return a random number that is not 0, which stands for no trace and no span."""
    return random.getrandbits(bits) or 1


def wall_nanoseconds(moment: float) -> int:
    """Return a time on the monotonic clock as nanoseconds since 1970, by this host's clock."""
    return time.time_ns() + int((moment - time.monotonic()) * 1e9)

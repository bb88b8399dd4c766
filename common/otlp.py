"""Exports spans with OpenTelemetry's SDK over OTLP/gRPC.

A thread of this process sends them in batches. A collector that cannot be reached costs the spans,
and nothing else: the queue is bounded, and the log has one line.
"""

import logging
import os
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
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Span as SdkSpan

from common.config import BadSetting
from common.errors import shorten
from common.logs import get_logger
from common.tracing import MAX_ERROR_CHARS, NO_SPAN, Attributes, Kind, Span, Tracing

CLOSE_SECONDS = 2.0
"""How long the end of a process may be delayed by the export of its last spans."""
# A proxy that the environment sets is not meant for a collector of one's own.
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)
KINDS = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}


class RecordedSpan(Span):
    """A span that is exported once it ends."""

    __slots__ = ("_span",)

    def __init__(self, span: SdkSpan) -> None:
        context = span.get_span_context()
        super().__init__(f"00-{context.trace_id:032x}-{context.span_id:016x}-01")
        self._span = span

    def end(
        self, attributes: Attributes | None = None, error: str = "", ended: float | None = None
    ) -> None:
        if attributes:
            self._span.set_attributes(attributes)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, shorten(error, MAX_ERROR_CHARS)))
        self._span.end(None if ended is None else wall_nanoseconds(ended))


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
            provider = TracerProvider(resource=resource_of(role, member_id), shutdown_on_exit=False)
        except ValueError as e:
            raise BadSetting(f"a variable OTEL_* is wrong: {e}") from e
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("twinlens", version("twinlens"))

    def begin_trace(
        self, name: str, incoming: str, began: float, attributes: Attributes | None = None
    ) -> Span:
        return self._begin(name, incoming, began, attributes, "server")

    def begin(
        self,
        name: str,
        parent: str,
        began: float | None = None,
        attributes: Attributes | None = None,
        kind: Kind = "internal",
    ) -> Span:
        return self._begin(name, parent, began, attributes, kind) if parent else NO_SPAN

    def _begin(
        self,
        name: str,
        parent: str,
        began: float | None,
        attributes: Attributes | None,
        kind: Kind,
    ) -> Span:
        span = self._tracer.start_span(
            name,
            context_of(parent),
            KINDS[kind],
            attributes,
            start_time=None if began is None else wall_nanoseconds(began),
        )
        return RecordedSpan(span) if span.is_recording() else NO_SPAN

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


def context_of(traceparent: str) -> Context:
    """Return the context of a span's children. It is that of a new trace if there is no parent."""
    if not traceparent:
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    parent = SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(parent), Context())


def wall_nanoseconds(moment: float) -> int:
    """Return a time on the monotonic clock as nanoseconds since 1970, by this host's clock."""
    return time.time_ns() + int((moment - time.monotonic()) * 1e9)

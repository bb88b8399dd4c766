"""Tracing whose spans stay in memory."""

from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.otlp import OtlpTracing

TRACE_ID = "a" * 32
PARENT = f"00-{TRACE_ID}-{'b' * 16}-01"


class MemoryTracing(OtlpTracing):
    """Keeps what a process would export."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        super().__init__("", "test", "test-1", self._memory)

    def spans(self) -> list[ReadableSpan]:
        """Return the spans that have ended, in the order of their ends."""
        self._processor.force_flush()
        return list(self._memory.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.spans()]

    def named(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.spans() if span.name == name]
        return span


def parent_of(span: ReadableSpan) -> str:
    """Return the `traceparent` of the span above; "" if there is none."""
    return traceparent_of(span.parent) if span.parent else ""


def traceparent_of(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def error_of(span: ReadableSpan) -> str:
    """Return why a span failed; "" if it did not."""
    return span.status.description or ""


def seconds_of(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9

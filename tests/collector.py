"""A collector of traces, to which the services of a test export over OTLP/gRPC."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

RECEIVE_SECONDS = 30.0


@dataclass(frozen=True)
class Received:
    """A span as a collector gets it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    error: str
    """Empty unless the span failed."""
    began: int
    """Nanoseconds since 1970, as is `ended`."""
    ended: int


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that it gets."""

    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[Received] = []
        self._changed = Condition()

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for of_resource in request.resource_spans:
                service = values_of(of_resource.resource.attributes)["service.name"]
                for scope in of_resource.scope_spans:
                    self._spans += [received(service, span) for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, trace_id: str, *names: str) -> list[Received]:
        """Return the spans of a trace in the order of their begins, once it has these names.

        A name that is given twice must be the name of two spans.
        """

        def of_trace() -> list[Received]:
            return [span for span in self._spans if span.trace_id == trace_id]

        def is_complete() -> bool:
            return Counter(names) <= Counter(span.name for span in of_trace())

        with self._changed:
            found = self._changed.wait_for(is_complete, RECEIVE_SECONDS)
            names_found = sorted(span.name for span in of_trace())
            assert found, f"{names} are not all among {names_found}"
            return sorted(of_trace(), key=lambda span: span.began)


def received(service: str, span: Any) -> Received:
    return Received(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        values_of(span.attributes),
        span.status.message,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
    )


def values_of(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """Yield a collector that listens at its `endpoint`."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()

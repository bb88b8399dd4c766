"""Spans of requests, for OpenTelemetry.

A span is begun and ended with times that were measured anyway. A process that exports no traces
uses `Tracing` itself: it records nothing and passes on what the client sent. `common/otlp.py`
exports. It is imported only if an endpoint is set, and with it all of OpenTelemetry.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from common.config import BadSetting
from common.errors import shorten
from common.logs import get_logger

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DISABLED_VARIABLE = "OTEL_SDK_DISABLED"
EXTRA = "pip install 'twinlens[otlp]'"
HEADER = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MAX_HEADER_CHARS = 512
MAX_ERROR_CHARS = 300

Kind = Literal["internal", "server", "producer", "consumer"]
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]

REQUEST_ID = "twinlens.request_id"
ATTEMPT = "twinlens.attempt"
ITEM = "twinlens.item.index"
ITEM_KIND = "twinlens.item.kind"
NUM_PATCHES = "twinlens.item.patches"


def read_traceparent(header: str | None) -> str:
    """Return a W3C `traceparent` header in the form of version 00, or "" if it is not valid.

    Of its flags only "sampled" is kept. An invalid header is ignored, as the standard says.
    """
    if not header or len(header) > MAX_HEADER_CHARS:
        return ""
    found = HEADER.fullmatch(header.strip())
    if found is None:
        return ""
    version, trace_id, span_id, flags, more = found.groups()
    if (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return ""
    return f"00-{trace_id}-{span_id}-{int(flags, 16) & 1:02x}"


def is_sampled(traceparent: str) -> bool:
    """Whether spans below this one are recorded."""
    return traceparent.endswith("-01")


def trace_id_of(traceparent: str) -> str:
    """Return the 32 hex digits of the trace; "" if there is none."""
    return traceparent[3:35]


class Span:
    """A span that this process does not record. Its children belong to `traceparent`.

    `traceparent` is empty if nobody records the request.
    """

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    def end(
        self, attributes: Attributes | None = None, error: str = "", ended: float | None = None
    ) -> None:
        """End the span, now or at a time on the monotonic clock. With an `error` it has failed.

        A span that is never ended is not exported.
        """


NO_SPAN = Span()


class Tracing:
    """Records nothing. Times are those of the monotonic clock, in seconds."""

    def begin_trace(
        self, name: str, incoming: str, began: float, attributes: Attributes | None = None
    ) -> Span:
        """Begin the span of a request that enters the system.

        `incoming` is what `read_traceparent` returned. Without it, the request may begin a trace.
        """
        return Span(incoming) if is_sampled(incoming) else NO_SPAN

    def begin(
        self,
        name: str,
        parent: str,
        began: float | None = None,
        attributes: Attributes | None = None,
        kind: Kind = "internal",
    ) -> Span:
        """Begin a span below the `traceparent` of another one, which may be empty."""
        return Span(parent) if parent else NO_SPAN

    def close(self) -> None:
        """Export what is left, if that takes no long time."""


NO_TRACING = Tracing()


def open_tracing(endpoint: str, role: str, member_id: str) -> Tracing:
    """Return what records the spans of a process.

    Traces are exported if there is an `endpoint`, or if one of OpenTelemetry's own variables names
    one.

    Raises
    ------
    BadSetting
        if there is an endpoint, and the packages that export are missing.
    """
    if not endpoint and not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return NO_TRACING
    if os.environ.get(DISABLED_VARIABLE, "").strip().lower() == "true":
        return NO_TRACING
    try:
        from common.otlp import OtlpTracing
    except ImportError as e:
        if endpoint:
            raise BadSetting(f"--otlp-traces-endpoint {shorten(endpoint)}: first {EXTRA}") from e
        get_logger().warning("no traces are exported", reason=f"a package is missing: {EXTRA}")
        return NO_TRACING
    return OtlpTracing(endpoint, role, member_id)

"""Spans, their export, and the header that names a client's span."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from common.config import BadSetting
from common.messages import TraceParent
from common.otlp import OtlpTracing, ReportingExporter
from common.setting_checks import objection_to_http_url
from common.tracing import ENDPOINT_VARIABLES, NO_SPAN, NO_TRACING, open_tracing, read_traceparent
from tests.collector import collecting
from tests.spans import PARENT, TRACE_ID, MemoryTracing, error_of, parent_of, traceparent_of

UNSAMPLED = PARENT.removesuffix("01") + "00"
DEAD_ENDPOINT = "http://127.0.0.1:1"


@pytest.fixture
def tracing() -> Iterator[MemoryTracing]:
    tracing = MemoryTracing()
    yield tracing
    tracing.close()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (PARENT, PARENT),
        (f" {PARENT}\t", PARENT),
        (UNSAMPLED, UNSAMPLED),
        (PARENT.removesuffix("01") + "ff", PARENT),
        (PARENT.removesuffix("01") + "fe", UNSAMPLED),
        ("cc" + PARENT.removeprefix("00") + "-what-comes-later", PARENT),
        (None, ""),
        ("", ""),
        (PARENT + "-more", ""),
        ("ff" + PARENT.removeprefix("00"), ""),
        (PARENT.upper(), ""),
        (PARENT.replace("a", "0"), ""),
        (PARENT.replace("b", "0"), ""),
        (PARENT.replace("a", "g"), ""),
        (PARENT[:-1], ""),
        ("cc" + PARENT.removeprefix("00") + "-" + "x" * 500, ""),
    ],
)
def test_a_header_that_is_no_traceparent_is_ignored(header: str | None, expected: str) -> None:
    assert read_traceparent(header) == expected


@pytest.mark.parametrize("wrong", [UNSAMPLED, PARENT + " ", PARENT.replace("b", "0"), "x"])
def test_a_message_with_another_traceparent_cannot_be_read(wrong: str) -> None:
    assert msgspec.convert(PARENT, TraceParent) == PARENT
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, TraceParent)


def test_a_span_has_the_times_that_were_measured(tracing: MemoryTracing) -> None:
    now = time.monotonic()
    before = time.time_ns()
    tracing.begin("work", PARENT, now - 3.0, {"n": 1}).end({"m": 2}, ended=now - 1.0)
    [span] = tracing.spans()
    assert parent_of(span) == PARENT
    assert span.attributes == {"n": 1, "m": 2}
    assert span.start_time is not None and span.end_time is not None
    assert span.end_time - span.start_time == pytest.approx(2e9, abs=5e7)
    assert before - span.end_time == pytest.approx(1e9, abs=5e7)


def test_children_belong_to_their_span(tracing: MemoryTracing) -> None:
    above = tracing.begin("above", PARENT)
    tracing.begin("below", above.traceparent).end(error="it broke")
    above.end()
    below, parent = tracing.spans()
    assert parent_of(below) == traceparent_of(parent.context) == above.traceparent
    assert (error_of(below), error_of(parent)) == ("it broke", "")


def test_a_request_joins_the_trace_of_its_client_or_begins_one(tracing: MemoryTracing) -> None:
    joined = tracing.begin_trace("joined", PARENT, time.monotonic())
    own = tracing.begin_trace("own", "", time.monotonic())
    assert joined.traceparent[3:35] == TRACE_ID != own.traceparent[3:35]
    own.end()
    assert parent_of(tracing.named("own")) == ""


def test_what_the_client_does_not_sample_is_not_recorded(tracing: MemoryTracing) -> None:
    span = tracing.begin_trace("unsampled", UNSAMPLED, time.monotonic())
    assert span is NO_SPAN
    assert tracing.begin("below", span.traceparent) is NO_SPAN
    span.end()
    assert tracing.spans() == []


def test_a_share_of_the_requests_is_sampled_by_the_standard_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracing = MemoryTracing()
    assert tracing.begin_trace("own", "", time.monotonic()) is NO_SPAN
    assert tracing.begin_trace("joined", PARENT, time.monotonic()) is not NO_SPAN
    tracing.close()


# Switched off


def test_without_an_endpoint_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    tracing = open_tracing("", "gateway", "gateway-1")
    assert tracing is NO_TRACING
    assert tracing.begin_trace("own", "", 0.0) is NO_SPAN


def test_a_process_that_exports_nothing_passes_the_clients_span_on() -> None:
    span = NO_TRACING.begin_trace("joined", PARENT, 0.0)
    assert span.traceparent == PARENT
    assert NO_TRACING.begin("below", span.traceparent).traceparent == PARENT
    assert NO_TRACING.begin_trace("unsampled", UNSAMPLED, 0.0) is NO_SPAN


def test_the_sdk_is_not_even_imported() -> None:
    script = (
        "import sys, common.tracing; print(any('opentelemetry' in name for name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr


def test_the_standard_variable_names_an_endpoint_and_another_switches_all_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", DEAD_ENDPOINT)
    opened = open_tracing("", "vision", "vision-1")
    assert isinstance(opened, OtlpTracing)
    opened.close()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing("", "vision", "vision-1") is NO_TRACING


def test_missing_packages_are_an_error_only_if_the_flag_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "common.otlp", None)
    with pytest.raises(BadSetting, match=r"twinlens\[otlp\]"):
        open_tracing(DEAD_ENDPOINT, "vision", "vision-1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", DEAD_ENDPOINT)
    with structlog.testing.capture_logs() as logs:
        assert open_tracing("", "vision", "vision-1") is NO_TRACING
    assert "twinlens[otlp]" in logs[0]["reason"]


@pytest.mark.parametrize("url", ["collector:4317", "http://", "grpc://collector:4317", "http:// x"])
def test_an_endpoint_is_a_url(url: str) -> None:
    assert "http://HOST:PORT" in objection_to_http_url(url)
    assert not objection_to_http_url("http://collector:4317")
    assert not objection_to_http_url("")


# Export


def test_a_collector_gets_the_spans_of_a_named_service() -> None:
    with collecting() as collector:
        tracing = OtlpTracing(collector.endpoint, "vision", "vision-1")
        tracing.begin("work", PARENT, attributes={"n": 1}).end()
        tracing.close()
        [span] = collector.wait_for(TRACE_ID, "work")
    assert (span.service, span.parent_id, span.attributes) == (
        "twinlens-vision",
        "b" * 16,
        {"n": 1},
    )


class Scripted(SpanExporter):
    """An exporter whose exports succeed or fail as a script says."""

    def __init__(self, *results: bool) -> None:
        self._results = list(results)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS if self._results.pop(0) else SpanExportResult.FAILURE

    def shutdown(self) -> None: ...


def test_a_collector_that_is_away_is_one_line_of_the_log_and_so_is_its_return() -> None:
    exporter = ReportingExporter(Scripted(True, False, False, False, True, True, False))
    with structlog.testing.capture_logs() as logs:
        for _ in range(7):
            exporter.export([])
    assert [line["log_level"] for line in logs] == ["warning", "info", "warning"]


class Stuck(SpanExporter):
    """An exporter that never comes back until it is freed."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.free.wait()
        return SpanExportResult.FAILURE

    def shutdown(self) -> None: ...


def test_a_collector_that_hangs_delays_neither_spans_nor_the_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.otlp.CLOSE_SECONDS", 0.01)
    exporter = Stuck()
    tracing: Any = OtlpTracing("", "vision", "vision-1", exporter)
    for _ in range(5000):  # more than the queue holds
        tracing.begin("work", PARENT).end()
    tracing.close()
    exporter.free.set()

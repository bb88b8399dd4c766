"""The spans of requests at a language group."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from common.events import Event, Received
from common.messages import Start
from services.llm.worker import Worker
from tests.llm.test_engine import POISON, create_engine
from tests.llm.test_worker import FakeMember, abort, answers, prompt
from tests.spans import PARENT, MemoryTracing, error_of, parent_of, traceparent_of


@pytest.fixture
def tracing() -> Iterator[MemoryTracing]:
    tracing = MemoryTracing()
    yield tracing
    tracing.close()


def work(tracing: MemoryTracing, *batches: list[Event]) -> list[tuple[str, Any]]:
    member: Any = FakeMember(batches)
    member.tracing = tracing
    Worker(member, create_engine()).run()
    return member.links.sent


def traced(received: Received) -> Received:
    received.message.traceparent = PARENT
    return received


def test_an_answer_has_spans_of_its_wait_its_prefill_and_its_decoding(
    tracing: MemoryTracing,
) -> None:
    [start, *_] = answers(work(tracing, [traced(prompt(max_tokens=5))]))
    assert isinstance(start, Start) and start.traceparent == PARENT
    *stages, whole = tracing.spans()
    assert [span.name for span in stages] == ["queue", "prefill", "decode"]
    assert {parent_of(span) for span in stages} == {traceparent_of(whole.context)}
    assert (whole.name, parent_of(whole)) == ("llm", PARENT)
    assert whole.attributes["twinlens.num_output_tokens"] == 5
    for earlier, later in pairwise(stages):
        assert later.start_time == pytest.approx(earlier.end_time, abs=1e5)


def test_an_aborted_request_has_the_spans_of_what_it_reached(tracing: MemoryTracing) -> None:
    work(tracing, [traced(prompt()), abort()])
    assert tracing.names() == ["queue", "llm"]


def test_a_request_that_fails_fails_its_span(tracing: MemoryTracing) -> None:
    work(tracing, [traced(prompt(token_ids=[1, POISON, 2]))])
    assert "not finite" in error_of(tracing.named("llm"))


def test_what_nobody_records_makes_no_span(tracing: MemoryTracing) -> None:
    work(tracing, [prompt()])
    assert tracing.spans() == []

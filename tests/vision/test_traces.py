"""The spans of items at a vision replica."""

from collections.abc import Iterator

import pytest

from common.events import Event
from tests.spans import PARENT, MemoryTracing, error_of, parent_of, seconds_of, traceparent_of
from tests.vision.test_worker import Replica, offer, pixels


@pytest.fixture
def tracing() -> Iterator[MemoryTracing]:
    tracing = MemoryTracing()
    yield tracing
    tracing.close()


@pytest.fixture
def replica(tracing: MemoryTracing) -> Replica:
    replica = Replica()
    replica.member.tracing = tracing
    return replica


def traced(request_id: str) -> list[Event]:
    return offer(request_id, "a", traceparent=PARENT)


def test_an_encoded_item_has_spans_of_its_wait_and_of_the_tower(
    replica: Replica, tracing: MemoryTracing
) -> None:
    replica.play(traced("r"), pixels("r", 5))
    replica.encode_all()
    queue, encode, whole = tracing.spans()
    assert [span.name for span in (queue, encode, whole)] == ["queue", "encode", "vision image"]
    assert parent_of(whole) == PARENT
    assert parent_of(queue) == parent_of(encode) == traceparent_of(whole.context)
    assert whole.attributes["twinlens.item.outcome"] == "encoded"
    assert encode.start_time == pytest.approx(queue.end_time, abs=1e6)
    assert seconds_of(encode) == pytest.approx(0.001, abs=1e-4)


def test_a_cached_item_and_one_that_joins_an_equal_one_say_so(
    replica: Replica, tracing: MemoryTracing
) -> None:
    replica.play(traced("r"), traced("joining"), pixels("r", 5))
    replica.encode_all()
    replica.play(traced("late"))
    wholes = [span for span in tracing.spans() if span.name == "vision image"]
    outcomes = [span.attributes["twinlens.item.outcome"] for span in wholes]
    assert outcomes == ["encoded", "joined", "cached"]
    assert tracing.names().count("encode") == 1


def test_an_item_that_cannot_be_encoded_fails_its_span(
    replica: Replica, tracing: MemoryTracing
) -> None:
    replica.play(traced("r"), pixels("r", 0))
    replica.encode_all()
    assert "MemoryError" in error_of(tracing.named("vision image"))


def test_what_nobody_records_makes_no_span(replica: Replica, tracing: MemoryTracing) -> None:
    replica.play(offer("r", "a"), pixels("r", 5))
    replica.encode_all()
    assert tracing.spans() == []

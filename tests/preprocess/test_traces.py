"""The spans of a request in preprocess: its preparation, that of each image, and each offer."""

from collections.abc import Iterator

import pytest

from common.events import Event, PeerDown
from common.messages import Offer, Prompt
from tests.preprocess.builders import (
    IMAGES,
    Preprocess,
    abort,
    arrived,
    busy,
    failed,
    grant,
    reserved,
    submit,
    vacancy,
)
from tests.spans import PARENT, MemoryTracing, error_of, parent_of, seconds_of, traceparent_of


@pytest.fixture
def tracing() -> Iterator[MemoryTracing]:
    tracing = MemoryTracing()
    yield tracing
    tracing.close()


def traced(tracing: MemoryTracing, *vision_ids: str) -> Preprocess:
    preprocess = Preprocess(*vision_ids)
    preprocess.member.tracing = tracing
    preprocess.worker._dispatcher._tracing = tracing
    return preprocess


def asked(*images: bytes, traceparent: str = PARENT) -> list[Event]:
    events = submit("r", *images)
    events[0].message.traceparent = traceparent
    return events


def test_a_preparation_is_a_span_with_one_for_each_image(tracing: MemoryTracing) -> None:
    preprocess = traced(tracing, "vision-1")
    sent = preprocess.play(asked(*IMAGES[:2]))
    [prompt] = [message for _, message in sent if isinstance(message, Prompt)]
    assert prompt.traceparent == PARENT
    whole = tracing.named("preprocess")
    assert parent_of(whole) == PARENT
    items = [span for span in tracing.spans() if span.name == "prepare image"]
    assert [parent_of(span) for span in items] == [traceparent_of(whole.context)] * 2
    assert sorted(span.attributes["twinlens.item.index"] for span in items) == [0, 1]
    assert all(seconds_of(span) < 1 for span in items)


def test_an_offer_is_a_span_from_then_until_the_embeddings_arrived(tracing: MemoryTracing) -> None:
    preprocess = traced(tracing, "vision-1")
    preprocess.play(asked(IMAGES[0]))
    sent = preprocess.play(reserved("r"))
    [offer] = [message for _, message in sent if isinstance(message, Offer)]
    preprocess.play(grant("vision-1", 0))
    assert "dispatch image" not in tracing.names()
    preprocess.play(arrived(0))
    span = tracing.named("dispatch image")
    assert parent_of(span) == PARENT
    assert offer.traceparent == traceparent_of(span.context)
    assert span.attributes["twinlens.vision"] == "vision-1"


def test_an_offer_that_is_not_accepted_is_no_span(tracing: MemoryTracing) -> None:
    preprocess = traced(tracing, "vision-1")
    preprocess.play(asked(IMAGES[0]))
    preprocess.play(reserved("r"), busy("vision-1", 0), vacancy("vision-1"))
    preprocess.play(grant("vision-1", 0), arrived(0))
    assert tracing.names().count("dispatch image") == 1


def test_an_image_that_fails_or_loses_its_replica_shows_each_try(tracing: MemoryTracing) -> None:
    preprocess = traced(tracing, "vision-1", "vision-2")
    preprocess.play(asked(IMAGES[0]))
    [(first, _)] = [pair for pair in preprocess.play(reserved("r")) if isinstance(pair[1], Offer)]
    second = {"vision-1": "vision-2", "vision-2": "vision-1"}[first]
    preprocess.play(grant(first, 0), failed(first, 0))
    preprocess.play(grant(second, 0))
    preprocess.play([PeerDown(second, "vision", "killed")])
    preprocess.play(grant(first, 0), arrived(0))
    tries = [span for span in tracing.spans() if span.name == "dispatch image"]
    assert [span.attributes["twinlens.vision"] for span in tries] == [first, second, first]
    assert [span.attributes["twinlens.item.num_lost"] for span in tries] == [0, 1, 2]
    assert [error_of(span).partition(":")[0] for span in tries] == [
        "the tower failed",
        "the vision replica was lost",
        "",
    ]


def test_a_request_that_cannot_be_prepared_fails_its_span(tracing: MemoryTracing) -> None:
    preprocess = traced(tracing, "vision-1")
    preprocess.play(asked(b"no image"))
    assert error_of(tracing.named("preprocess")) == "UnreadableImage"


def test_an_abort_ends_the_span(tracing: MemoryTracing) -> None:
    preprocess = traced(tracing)
    preprocess.worker._groups.remove("llm-1")
    preprocess.play(asked(), abort("r"))
    assert error_of(tracing.named("preprocess")) == ""


def test_a_request_that_ends_first_shows_which_replica_had_its_image(
    tracing: MemoryTracing,
) -> None:
    preprocess = traced(tracing, "vision-1")
    preprocess.play(asked(*IMAGES[:2]))
    preprocess.play(reserved("r"), grant("vision-1", 0, has_room=False), busy("vision-1", 1))
    preprocess.play(abort("r"))
    span = tracing.named("dispatch image")
    assert span.attributes["twinlens.vision"] == "vision-1"
    assert "ended before" in error_of(span)


def test_what_nobody_records_makes_no_span(tracing: MemoryTracing) -> None:
    preprocess = traced(tracing, "vision-1")
    preprocess.play(asked(IMAGES[0], traceparent=""))
    preprocess.play(reserved("r"), grant("vision-1", 0), arrived(0))
    assert tracing.spans() == []

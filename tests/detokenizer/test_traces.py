"""The span of an answer at the detokenizer."""

from collections.abc import Iterator

import pytest

from common.events import Event, PeerDown
from common.messages import Abort, Failed
from tests.detokenizer.test_worker import Detokenizer, named, start, tokens
from tests.spans import PARENT, MemoryTracing, error_of, parent_of


@pytest.fixture
def tracing() -> Iterator[MemoryTracing]:
    tracing = MemoryTracing()
    yield tracing
    tracing.close()


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (tokens(0, [1], "stop"), ""),
        (tokens(7, [1]), "token 7 came instead of token 0"),
        (named(Abort), ""),
        (named(Failed, code="Internal", message="why", stage="llm"), "Internal"),
        ([PeerDown("llm-1", "llm", "killed")], "llm was lost: killed"),
    ],
)
def test_an_answer_is_a_span_until_its_end(
    tracing: MemoryTracing, end: list[Event], error: str
) -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.member.tracing = tracing
    begin = start()
    begin[0].message.traceparent = PARENT
    detokenizer.play(begin)
    assert tracing.spans() == []
    detokenizer.play(end)
    [span] = tracing.spans()
    assert (span.name, parent_of(span), error_of(span)) == ("detokenizer", PARENT, error)

"""The spans of items at a vision replica."""

from common.messages import Offer
from common.tracing import ATTEMPT, ITEM, ITEM_KIND, NUM_PATCHES, Attributes, Span, Tracing


def record_item(
    tracing: Tracing, offer: Offer, offered: float, outcome: str, queued: float, encoded: float
) -> None:
    """Record an item whose embeddings were just sent, if its request is traced.

    Parameters
    ----------
    offered
        is the time of the offer on the monotonic clock.
    outcome
        says where the embeddings are from: encoded, cached, or joined, which means that the item
        waited for an equal one of another request.
    queued, encoded
        are the seconds that it waited, and that the tower took.
    """
    if not offer.traceparent:
        return
    span = begin_span(tracing, offer, offered)
    began = offered + queued
    if outcome == "encoded":
        tracing.begin("queue", span.traceparent, offered).end(ended=began)
        tracing.begin("encode", span.traceparent, began).end(ended=began + encoded)
    span.end({"twinlens.item.outcome": outcome})


def record_failure(tracing: Tracing, offer: Offer, offered: float, reason: str) -> None:
    """Record an item that cannot be encoded, if its request is traced."""
    begin_span(tracing, offer, offered).end({"twinlens.item.outcome": "failed"}, reason)


def begin_span(tracing: Tracing, offer: Offer, offered: float) -> Span:
    attributes: Attributes = {
        ATTEMPT: offer.attempt,
        ITEM: offer.item,
        ITEM_KIND: offer.kind,
        NUM_PATCHES: offer.num_patches,
    }
    return tracing.begin(f"vision {offer.kind}", offer.traceparent, offered, attributes, "consumer")

"""The spans of the items that preprocess prepares."""

from collections.abc import Sequence

from common.tracing import ITEM, NUM_PATCHES, Attributes, Tracing
from services.preprocess.in_flight import Preparation
from services.preprocess.sandbox.jobs import PreparedFacts


def record_items(
    tracing: Tracing, preparation: Preparation, items: Sequence[PreparedFacts], ended: float
) -> None:
    """Record the latest items of a request, if it is traced.

    A sandbox prepared them one after the other, and the last one until `ended`.
    """
    parent = preparation.span.traceparent
    if not parent:
        return
    index = len(preparation.items)
    for facts in reversed(items):
        index -= 1
        began = max(preparation.received, ended - facts.seconds)
        attributes: Attributes = {ITEM: index, NUM_PATCHES: facts.num_patches}
        tracing.begin(f"prepare {facts.kind}", parent, began, attributes).end(ended=ended)
        ended = began

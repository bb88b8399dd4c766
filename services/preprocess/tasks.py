"""What a request must have done in a sandbox, and what comes of it."""

from itertools import count

import numpy as np

from services.preprocess.in_flight import Preparation
from services.preprocess.prepared import ReadyItem
from services.preprocess.sandbox.jobs import Prepare, PreparedFacts, Read
from services.preprocess.sandbox.pool import Task

# What a task is expected to cost. That decides whose turn it is, and no more.
LEAST_SECONDS = 1e-3
SECONDS_PER_BYTE = 1e-8
SECONDS_PER_PIXEL = 2e-8
BATCH_SECONDS = 0.03
"""Items are prepared together up to this cost: a message takes as long as a very small item."""


def next_task(preparation: Preparation, max_patches: int) -> Task:
    """Return the next task for a request.

    The first one reads the prompt and the headers of the items, the others prepare items.
    """
    if preparation.token_ids is None:
        return reading(preparation, max_patches)
    return preparing(preparation, max_patches)


def reading(preparation: Preparation, max_patches: int) -> Task:
    submit = preparation.submit
    kinds = tuple(item.kind for item in submit.items)
    guide = submit.guide.data if submit.guide else b""
    blobs = [submit.prompt.data, guide, *(item.data.data for item in submit.items)]
    seconds = LEAST_SECONDS + SECONDS_PER_BYTE * sum(map(len, blobs))
    return Task(Read(submit.prompt_kind, submit.guide_kind, kinds, max_patches), blobs, seconds)


def preparing(preparation: Preparation, max_patches: int) -> Task:
    first = len(preparation.items)
    items = preparation.submit.items
    seconds = LEAST_SECONDS
    for end in count(first):
        if end == len(items) or (end > first and seconds > BATCH_SECONDS):
            break
        height, width = preparation.sizes[end]
        seconds += SECONDS_PER_BYTE * len(items[end].data.data)
        seconds += SECONDS_PER_PIXEL * height * width
    batch = items[first:end]
    job = Prepare(first, tuple(item.kind for item in batch), max_patches)
    return Task(job, [item.data.data for item in batch], seconds)


def ready_item(facts: PreparedFacts, patches: memoryview) -> ReadyItem:
    """Return an item that a sandbox has prepared, with its patches where the sandbox put them."""
    rows = np.frombuffer(patches, np.uint8).reshape(facts.num_patches, -1)
    return ReadyItem(
        facts.kind,
        facts.mm_hash,
        facts.grid_thw,
        facts.content_size,
        facts.num_patches,
        facts.num_tokens,
        rows,
    )

"""What a request must have done in a sandbox, and what comes of it."""

from collections.abc import Sequence
from itertools import count

import numpy as np

from common.messages import Item
from common.pixel_bounds import PixelBounds
from common.wire import Buffer
from services.preprocess.in_flight import Preparation
from services.preprocess.prepared import ReadyItem
from services.preprocess.sandbox.costs import (
    BATCH_SECONDS,
    LEAST_SECONDS,
    SECONDS_PER_BYTE,
    item_seconds,
)
from services.preprocess.sandbox.jobs import Prepare, PreparedFacts, Read, Spell
from services.preprocess.sandbox.pool import Task
from services.preprocess.videos import VideoForm


def reading(preparation: Preparation, max_patches: int, has_room: bool) -> Task:
    """Return the task that reads the prompt and the headers of the items.

    If there is room for the items, it also prepares them, if that takes little time.
    """
    submit = preparation.submit
    kinds = tuple(item.kind for item in submit.items)
    guide = submit.guide.data if submit.guide else b""
    options = submit.chat_options.data if submit.chat_options else b""
    rules = submit.token_rules
    words = rules.bad_words.data if rules and rules.bad_words else b""
    texts = [submit.prompt.data, options, guide, words]
    blobs = [*texts, *(item.data.data for item in submit.items)]
    seconds = LEAST_SECONDS + SECONDS_PER_BYTE * sum(map(len, blobs))
    forms = forms_of(submit.items)
    bounds = bounds_of(submit.items)
    job = Read(
        submit.prompt_kind,
        submit.guide_kind,
        kinds,
        max_patches,
        has_room,
        forms,
        bounds,
        submit.guide_whitespace,
    )
    return Task(job, blobs, seconds, submit.priority)


def preparing(preparation: Preparation, max_patches: int) -> Task:
    """Return the task that prepares the next items: one, or some that take little time."""
    first = len(preparation.items)
    items = preparation.submit.items
    seconds = LEAST_SECONDS
    for end in count(first):
        if end == len(items) or (end > first and seconds > BATCH_SECONDS):
            break
        num_bytes = len(items[end].data.data)
        seconds += item_seconds(num_bytes, preparation.sizes[end], preparation.num_images[end])
    batch = items[first:end]
    kinds = tuple(item.kind for item in batch)
    job = Prepare(first, kinds, max_patches, forms_of(batch, first), bounds_of(batch, first))
    blobs = [item.data.data for item in batch]
    return Task(job, blobs, seconds, preparation.priority)


def spelling(token_ids: Buffer, names: bool) -> Task:
    """Return the task that names each token, or tells the text of all. The ids are int64."""
    return Task(Spell(names), [token_ids], LEAST_SECONDS + SECONDS_PER_BYTE * len(token_ids))


def forms_of(items: Sequence[Item], first: int = 0) -> dict[int, VideoForm]:
    """Return the forms of the videos among the items from index `first` on."""
    forms = {}
    for index, item in enumerate(items, first):
        if item.kind == "video":
            lengths = item.frame_lengths.numpy().tolist() if item.frame_lengths else ()
            forms[index] = VideoForm(tuple(lengths), item.fps)
    return forms


def bounds_of(items: Sequence[Item], first: int = 0) -> dict[int, PixelBounds]:
    """Return the bounds that the client sets to the items from index `first` on."""
    return {
        index: bounds
        for index, item in enumerate(items, first)
        if (bounds := PixelBounds(item.min_pixels, item.max_pixels))
    }


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
        facts.step_seconds,
    )

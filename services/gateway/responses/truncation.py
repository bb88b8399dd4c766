"""`truncation: "auto"`: a conversation that does not fit loses its oldest items."""

import asyncio
from collections.abc import Callable

from common.errors import ContextLengthExceeded
from services.gateway.generation import Core, GenerationRequest, conversion_of

Make = Callable[[int], GenerationRequest]
"""Makes the request without a number of the oldest items, or raises ContextLengthExceeded."""


async def fitted(core: Core, make: Make, num_items: int, num_answer: int) -> GenerationRequest:
    """Return the request with as few of its oldest items dropped as possible.

    Parameters
    ----------
    num_items
        is the number of items. The last one stays.
    num_answer
        is the number of tokens that the answer may have.

    Raises
    ------
    ContextLengthExceeded
        if the last item alone does not fit.
    """
    request = await attempt(core, make, 0, num_answer)
    if request is not None:
        return request
    fitting = make(num_items - 1)
    too_few = 0
    enough = num_items - 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        request = await attempt(core, make, middle, num_answer)
        if request is None:
            too_few = middle
        else:
            fitting = request
            enough = middle
    return fitting


async def attempt(
    core: Core, make: Make, num_dropped: int, num_answer: int
) -> GenerationRequest | None:
    """Return the request without the oldest items, or None if it does not fit into the context."""
    try:
        # On a thread, because images are decoded from base64 again.
        request = await asyncio.to_thread(make, num_dropped)
        num_prompt = await num_tokens(core, request)
    except ContextLengthExceeded:
        return None
    context = core.max_model_len()
    return request if context is None or num_prompt + num_answer <= context else None


async def num_tokens(core: Core, request: GenerationRequest) -> int:
    """Return the number of tokens of a prompt, those of its images included."""
    count = GenerationRequest(
        request_id=f"{request.request_id}-count",
        prompt_kind=request.prompt_kind,
        prompt=request.prompt,
        chat_options=request.chat_options,
        images=request.images,
        timeout=request.timeout,
        task="tokenize",
    )
    async with core.generate(count) as events:
        return len((await conversion_of(events)).token_ids)

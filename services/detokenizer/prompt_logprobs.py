"""Log-probabilities of a prompt, from what the language group computed to what clients read."""

import json
import math
from typing import Any

import numpy as np

from common.messages import MAX_PROMPT_LOGPROBS, Start
from common.vocabulary import Vocabulary
from common.wire import Tensor
from services.detokenizer.incremental import logprob_entry


def objection_to_prompt(start: Start, vocab_size: int) -> str:
    """Return why the log-probabilities of a prompt cannot be read; empty if they can.

    The token ids of the prompt may be any: the placeholder of an item may lie outside the
    vocabulary.
    """
    given = (
        start.prompt_logprobs,
        start.prompt_ranks,
        start.prompt_top_token_ids,
        start.prompt_top_logprobs,
    )
    ids = start.prompt_token_ids
    if ids is None:
        return "" if given == (None,) * 4 else "prompt_token_ids is missing"
    if ids.dtype != "int64" or len(ids.shape) != 1 or not ids.shape[0]:
        return f"prompt_token_ids is {ids}, int64 [p] is wanted"
    count = ids.shape[0] - 1
    num_top = start.prompt_top_token_ids.shape[-1:] if start.prompt_top_token_ids else (0,)
    wanted = (
        ("float32", (count,)),
        ("int64", (count,)),
        ("int64", (count, *num_top)),
        ("float32", (count, *num_top)),
    )
    for tensor, (dtype, shape) in zip(given, wanted, strict=True):
        if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape):
            return f"log-probabilities are {given}, those of {count} tokens are wanted"
        if dtype == "float32" and np.isnan(tensor.numpy()).any():
            return "a log-probability of the prompt is not a number"
    if (count + 1) * (math.prod(num_top) + 1) > MAX_PROMPT_LOGPROBS:
        return f"more than {MAX_PROMPT_LOGPROBS} log-probabilities of the prompt"
    assert start.prompt_top_token_ids is not None
    top_ids = start.prompt_top_token_ids.numpy()
    if top_ids.size and not 0 <= top_ids.min() <= top_ids.max() < vocab_size:
        return f"prompt_top_token_ids has a value outside [0, {vocab_size})"
    return ""


def prompt_entries(vocabulary: Vocabulary, start: Start) -> Tensor | None:
    """Return the `prompt_logprobs` of the first Delta; None if nobody asked for them."""
    if start.prompt_token_ids is None:
        return None
    assert start.prompt_logprobs is not None and start.prompt_ranks is not None
    assert start.prompt_top_token_ids is not None and start.prompt_top_logprobs is not None
    rows = zip(
        start.prompt_token_ids.numpy()[1:].tolist(),
        start.prompt_logprobs.numpy().tolist(),
        start.prompt_top_token_ids.numpy().tolist(),
        start.prompt_top_logprobs.numpy().tolist(),
        start.prompt_ranks.numpy().tolist(),
        strict=True,
    )
    entries: list[dict[str, Any] | None] = [None]
    for token_id, logprob, top_ids, top, rank in rows:
        entry = logprob_entry(vocabulary, token_id, logprob, zip(top_ids, top, strict=True))
        entries.append(entry | {"rank": rank})
    return Tensor.of_text(json.dumps(entries))

"""Log-probabilities of a prompt: read of a Delta, and written as vLLM's clients read them."""

from itertools import count
from typing import Any

import msgspec

from common.messages import Delta
from services.gateway.deltas import Entry


class PromptEntry(Entry):
    """What the detokenizer says of a token of the prompt."""

    rank: int


entries_decoder = msgspec.json.Decoder(list[PromptEntry | None])


def read_prompt_logprobs(delta: Delta) -> list[dict[str, Any] | None] | None:
    """Return an entry for each token of the prompt; None if the delta has none.

    Raises ValueError if they are malformed.
    """
    if delta.prompt_logprobs is None:
        return None
    try:
        entries: list[Any] = entries_decoder.decode(delta.prompt_logprobs.data)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as e:
        raise ValueError("the prompt's log-probabilities cannot be read") from e
    if not entries or any((entry is None) != (n == 0) for n, entry in enumerate(entries)):
        raise ValueError("the first token of a prompt, and no other, has no log-probability")
    return entries


def prompt_logprobs_body(entries: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: for each token but the first, those that could stand in its
    place, by their ids. It comes first itself."""
    return [None if entry is None else candidates(entry) for entry in entries]


def candidates(entry: dict[str, Any]) -> dict[str, Any]:
    ranked = [(entry, entry["rank"]), *zip(entry["top_logprobs"], count(1))]
    return {
        str(one["token_id"]): {
            "logprob": one["logprob"],
            "rank": rank,
            "decoded_token": one["token"],
        }
        for one, rank in ranked
    }

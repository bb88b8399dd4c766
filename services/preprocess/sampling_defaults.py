"""Fills in what a request leaves open: sampling values, and how long the answer may be."""

from typing import Any

import msgspec

from common.errors import InvalidRequest
from common.messages import Sampling, Stopping


def resolve_sampling(sampling: Sampling, generation_config: dict[str, Any]) -> Sampling:
    """Replace every None by the checkpoint's own default. The client's values always win."""
    config = {key: value for key, value in generation_config.items() if value is not None}
    defaults = {
        "temperature": 0.0
        if config.get("do_sample") is False
        else float(config.get("temperature", 1.0)),
        "top_p": float(config.get("top_p", 1.0)),
        # Some checkpoints write -1 for "all".
        "top_k": max(0, int(config.get("top_k", 0))),
        "min_p": float(config.get("min_p", 0.0)),
        "repetition_penalty": float(config.get("repetition_penalty", 1.0)),
    }
    absent = {name: value for name, value in defaults.items() if getattr(sampling, name) is None}
    return msgspec.structs.replace(sampling, **absent)


def resolve_stopping(stopping: Stopping, num_prompt_tokens: int, max_model_len: int) -> Stopping:
    """Fill `max_tokens` in with what the prompt leaves of the context, or check it against that.

    Raises InvalidRequest if the context is too short.
    """
    left = max_model_len - num_prompt_tokens
    if left <= 0:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens, image tokens included, and the model's "
            f"context is {max_model_len}:"
            " shorten it, or send fewer or smaller images"
        )
    if stopping.max_tokens is None:
        return msgspec.structs.replace(stopping, max_tokens=left)
    if stopping.max_tokens > left:
        raise InvalidRequest(
            f"max_tokens is {stopping.max_tokens}, but the prompt has {num_prompt_tokens} tokens "
            f"and the model's context is {max_model_len}:"
            f" ask for at most {left}"
        )
    return stopping

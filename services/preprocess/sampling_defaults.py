"""Fills in what a request leaves open: sampling values, and how long the answer may be."""

from typing import Any

import msgspec

from common.errors import ContextLengthExceeded
from common.families.family import RequestDefaults
from common.messages import Sampling, Stopping, Task


def resolve_sampling(
    sampling: Sampling,
    generation_config: dict[str, Any],
    model: RequestDefaults = RequestDefaults(),
) -> Sampling:
    """Replace every None by the model's own default. The client's values always win."""
    config = {key: value for key, value in generation_config.items() if value is not None}
    if model.temperature is not None:
        config |= {"do_sample": True, "temperature": model.temperature}
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


def resolve_stopping(
    stopping: Stopping,
    num_prompt_tokens: int,
    max_model_len: int,
    model: RequestDefaults = RequestDefaults(),
    task: Task = "generate",
) -> Stopping:
    """Fill `repetition` and `max_tokens` in, or check the latter against what is left of the
    context.

    Neither means anything for a task that generates no text. `max_tokens` becomes the model's own
    length, if it has one, but at most what is left.

    Raises ContextLengthExceeded if the context is too short.
    """
    if task != "generate":
        return msgspec.structs.replace(stopping, max_tokens=1)
    if stopping.repetition is None:
        stopping = msgspec.structs.replace(stopping, repetition=model.repetition)
    left = max_model_len - num_prompt_tokens
    if left <= 0:
        raise ContextLengthExceeded.beyond(
            max_model_len,
            f"Your prompt has {num_prompt_tokens} tokens, image tokens included, which leaves none "
            "for an answer: shorten it, or send fewer or smaller images.",
        )
    if stopping.max_tokens is None:
        return msgspec.structs.replace(stopping, max_tokens=min(left, model.max_tokens or left))
    if stopping.max_tokens > left:
        raise ContextLengthExceeded.beyond(
            max_model_len,
            f"Your prompt has {num_prompt_tokens} tokens, image tokens included, and max_tokens is "
            f"{stopping.max_tokens}, which is {num_prompt_tokens + stopping.max_tokens} together: "
            f"ask for at most {left} tokens, or shorten the prompt.",
        )
    return stopping


def add_instruction(messages: list[dict[str, Any]], instruction: str) -> list[dict[str, Any]]:
    """Let the user say the model's own instruction after the last items.

    Messages in which the user says something, or which have no items, stay as they are.
    """
    if not instruction:
        return messages
    users = [message for message in messages if message["role"] == "user"]
    parts = [part for message in users for part in parts_of(message)]
    if any(part.get("text", "").strip() for part in parts):
        return messages
    holders = [m for m in users if any(part["type"] != "text" for part in parts_of(m))]
    if not holders:
        return messages
    last = holders[-1]
    content = [*parts_of(last), {"type": "text", "text": instruction}]
    return [m | {"content": content} if m is last else m for m in messages]


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message, one of which may be its whole text."""
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]

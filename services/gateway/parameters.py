"""Sampling and stopping values of both APIs, checked and completed.

Their types and ranges are those of `Sampling` and `Stopping` in `common/messages.py`.
"""

import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from common.messages import Sampling, Stopping
from services.gateway.invalid_field import BeyondContext, InvalidField, explain_value_error

MAX_SEED = 2**63 - 1

StructT = TypeVar("StructT", Sampling, Stopping)


def make_sampling(values: Mapping[str, Any]) -> Sampling:
    """Return the values as a Sampling; a value of None means the model's default.

    A missing seed is drawn, so that the answer can be repeated. The wire carries 63 bits, so only
    the low 63 bits of a seed count.

    Raises
    ------
    InvalidField
        if a value has the wrong type or is out of range.
    """
    seed = values.get("seed")
    if seed is None:
        seed = secrets.randbits(63)
    return convert({**values, "seed": seed & MAX_SEED}, Sampling, {})


def make_stopping(
    values: Mapping[str, Any], max_model_len: int | None, limit_name: str = "max_tokens"
) -> Stopping:
    """Return the values as a Stopping; a value of None means the default.

    `limit_name` is the name under which the client sent `max_tokens`. `max_model_len` is the
    context length in tokens, or None if it is not known.

    Raises
    ------
    InvalidField
        if a value has the wrong type or is out of range.
    BeyondContext
        if the answer may be longer than the context.
    """
    stopping = convert(values, Stopping, {"max_tokens": limit_name})
    limit = stopping.max_tokens
    if limit is None:
        return stopping
    if max_model_len is not None and limit > max_model_len:
        problem = f"You asked for an answer of up to {limit} tokens: ask for fewer."
        raise BeyondContext(limit_name, max_model_len, problem)
    if stopping.min_tokens > limit:
        problem = f"{stopping.min_tokens} is more than {limit_name}, which is {limit}"
        raise InvalidField("min_tokens", problem)
    return stopping


def convert(
    values: Mapping[str, Any], kind: type[StructT], client_names: dict[str, str]
) -> StructT:
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise explain_value_error(error, given, client_names) from None

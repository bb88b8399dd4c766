"""The values of a JSON body are counted before objects are built from it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from services.gateway.json_bounds import JsonBounds, check_json
from services.gateway.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES

TEXTS = st.text('ab"\\/[]{},: \n1é', max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=20,
)


def count(value: Any) -> int:
    match value:
        case dict():
            return 1 + sum(map(count, value.values()))
        case list():
            return 1 + sum(map(count, value))
    return 1


@settings(max_examples=100, deadline=None)
@given(
    VALUES,
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_values_are_counted_exactly_however_the_text_is_cut(
    value: Any, size: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    bounds = JsonBounds()
    for start in range(0, len(text), size):
        bounds.read(text[start : start + size])
    assert bounds.num_values == count(value)


MANY = MAX_JSON_VALUES
MEGABYTE = 10**6


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[' + b'{"role":"user","content":"a"},' * MANY,
        b'{"unknown":[' + b"[]," * MANY,
        b'{"unknown":{' + b'"":{},' * MANY,
        b"[" + b"1," * MANY,
        b"[" + b'"\\"",' * MANY,
        b"[" * (MAX_JSON_DEPTH + 1),
        b'{"a":' * (MAX_JSON_DEPTH + 1),
    ],
)
def test_a_body_beyond_the_bounds_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        check_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b'["' + b"[{," * MEGABYTE + b'"]',
        b'["' + rb"\"" * MEGABYTE + b'"]',
        b'["' + rb"\\" * MEGABYTE + b'"]',
        b"[" + b" " * MEGABYTE + b"]",
        b"[" + b"[]," * (MAX_JSON_VALUES - 2) + b"[]]",
        b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH,
    ],
)
def test_a_body_within_the_bounds_is_accepted(body: bytes) -> None:
    check_json(body)

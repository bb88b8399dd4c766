"""A language group that lost blocks is reported."""

import random

import grpc
import pytest

from proto.twinlens.inference.v1 import inference_pb2
from tests.soak.whole_context import MAX_TOKENS, complaint, request


def test_a_whole_answer_is_no_complaint() -> None:
    assert complaint(inference_pb2.GenerateResponse(token_ids=[1] * MAX_TOKENS)) == ""


@pytest.mark.parametrize(
    "answer",
    [
        inference_pb2.GenerateResponse(token_ids=[1] * (MAX_TOKENS - 1)),
        inference_pb2.GenerateResponse(),
        ConnectionError("gone"),
        grpc.aio.AioRpcError(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            details="too late",
        ),
    ],
    ids=["short", "empty", "broken", "late"],
)
def test_anything_else_is_a_complaint(answer: object) -> None:
    assert complaint(answer) != ""


def test_no_two_prompts_share_a_block() -> None:
    draw = random.Random(1)
    first = request(draw, 4088)
    second = request(draw, 4088)
    assert len(first.token_ids.ids) == 4088
    assert first.token_ids.ids[:16] != second.token_ids.ids[:16]

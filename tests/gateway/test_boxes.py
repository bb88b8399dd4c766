"""Boxes of an answer: scaled to the latest image, and written for both APIs."""

import json
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from common.boxes import Box, write_boxes
from common.messages import Delta, Routed
from common.wire import Tensor
from services.gateway.generation import Began, Boxes, Ended, Piece
from services.gateway.grpc_messages import end_message
from services.gateway.sse import CompletionWriter
from tests.gateway.builders import USAGE, Gateway, delta, error_of, request, rest, routed

ON_GRID = [Box("a cat", ((12, 34), (567, 890))), Box("", ((0, 0), (1000, 0), (500, 500), (0, 9)))]
IN_PIXELS = [Box("a cat", ((3, 6), (170, 178))), Box("", ((0, 0), (300, 0), (150, 100), (0, 1)))]
PLACED = Boxes(1, IN_PIXELS)


def sized(sizes: Any) -> Routed:
    message = routed()
    message.item_sizes = None if sizes is None else Tensor.of(np.array(sizes, np.int64))
    return message


def end(boxes: Tensor | None) -> Delta:
    message = delta(0, [1], "x", "stop")
    message.boxes = boxes
    return message


async def ended(images: int, sizes: Any, boxes: Tensor | None) -> Ended:
    gateway = Gateway()
    async with gateway.core.generate(request(images=(b"x",) * images)) as events:
        gateway.on_event(sized(sizes), end(boxes))
        last = (await rest(events))[-1]
    assert isinstance(last, Ended)
    return last


async def test_boxes_are_in_pixels_of_the_latest_image() -> None:
    last = await ended(2, [(10, 20), (200, 300)], write_boxes(ON_GRID))
    assert last.boxes == PLACED


async def test_an_answer_without_boxes_is_told_from_a_model_without_boxes() -> None:
    assert (await ended(1, [(10, 20)], write_boxes([]))).boxes == Boxes(0, [])
    assert (await ended(1, [(10, 20)], None)).boxes is None


async def test_boxes_without_an_image_are_none() -> None:
    assert (await ended(0, None, write_boxes(ON_GRID))).boxes == Boxes(0, [])


@pytest.mark.parametrize("sizes", [[(10, 20)], [(10, 20), (0, 5)], [(10, 20), (1, 2**31)]])
async def test_malformed_sizes_fail_the_request(sizes: Any) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(images=(b"x", b"y"))) as events:
        gateway.on_event(sized(sizes))
        assert (await error_of(events)).stage == "preprocess"


async def test_malformed_boxes_fail_the_request() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(images=(b"x",))) as events:
        gateway.on_event(sized([(10, 20)]), end(Tensor.of_text('[{"ref": "", "corners": []}]')))
        error = await error_of(events)
    assert error.code == "Internal" and error.stage == "detokenizer"


BODY = {
    "boxes": [
        {"ref": "a cat", "image": 1, "box": [3, 6, 170, 178]},
        {"ref": "", "image": 1, "quad": [[0, 0], [300, 0], [150, 100], [0, 1]]},
    ]
}


@pytest.mark.parametrize(
    ("boxes", "wanted"),
    [(PLACED, {"twinlens": BODY}), (Boxes(0, []), {"twinlens": {"boxes": []}}), (None, {})],
)
def test_a_chat_completion_has_them_in_its_message(boxes: Boxes, wanted: dict[str, Any]) -> None:
    writer = CompletionWriter("r", "m", with_ids=False, with_logprobs=False, with_usage=False)
    last = Ended("stop", USAGE, {}, boxes)
    whole = json.loads(
        json.dumps(writer.whole(Began(None), [Piece(0, [1], "x", [])], [last])["choices"][0])
    )
    assert whole["message"] == {"role": "assistant", "content": "x"} | wanted
    chunk = json.loads(writer.last_chunks(last).decode().removeprefix("data: "))
    assert chunk["choices"][0]["delta"] == wanted
    assert chunk["choices"][0]["finish_reason"] == "stop"


def test_grpc_has_them_at_the_end() -> None:
    message = end_message(Ended("stop", USAGE, {}, PLACED))
    found = [MessageToDict(box) for box in message.boxes]
    assert found == [
        {"ref": "a cat", "image": 1, "rectangle": {"x1": 3, "y1": 6, "x2": 170, "y2": 178}},
        {
            "image": 1,
            "quad": {"corners": [{}, {"x": 300}, {"x": 150, "y": 100}, {"y": 1}]},
        },
    ]
    assert not end_message(Ended("stop", USAGE, {})).boxes

"""Boxes in the text of an answer."""

import json
import time

import pytest

from common.boxes import Box, boxes_in, read_boxes, write_boxes
from common.wire import Tensor
from tests.golden import GoldenCase

GOLDEN = GoldenCase("c_box_two_images", "qwen_vl")


def flat(box: Box) -> list[int]:
    return [n for corner in box.corners for n in corner]


@pytest.mark.parametrize("output", GOLDEN.expected["box_outputs"])
def test_the_boxes_are_those_of_the_reference(output: dict) -> None:
    boxes = boxes_in(output["decode_all"])
    rectangles = [box for box in boxes if len(box.corners) == 2]
    wanted = output["boxes_with_ref"]
    assert [flat(box) for box in rectangles] == [box["box"] for box in wanted]
    assert [box.ref for box in rectangles] == [box.get("ref", "") for box in wanted]
    width, height = output["image_size_wh"]
    assert [flat(box.scaled(height, width)) for box in rectangles] == output["boxes_pixel"]


def test_a_quad_has_four_points() -> None:
    assert boxes_in("<ref>line </ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>") == [
        Box("line", ((1, 2), (3, 4), (5, 6), (7, 8)))
    ]


def test_only_the_text_right_before_a_box_is_about_it() -> None:
    text = "<ref>a</ref> <box>(1,1),(2,2)</box><ref>b < c\n</ref><box>( 3, 4),(5 ,6 )</box>"
    assert boxes_in(text) == [Box("", ((1, 1), (2, 2))), Box("b < c", ((3, 4), (5, 6)))]


def test_coordinates_beyond_the_grid_are_at_its_edge() -> None:
    assert boxes_in("<box>(0,5000),(1001,1000)</box>") == [Box("", ((0, 1000), (1000, 1000)))]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<box></box>",
        "<box>(1,2)</box>",
        "<box>(1,2),(3,4)",
        "<box>(1,2),(3,4),(5,6)</box>",
        "<box>(1,2),(-3,4)</box>",
        "<box>(1,2),(3,x)</box>",
        "<box>(1,2),(3,4)</quad>",
        "<quad>(1,2),(3,4)</quad>",
        "<box>(1,2),(3,99999999999999999999)</box>",
        "<ref>a</ref>",
    ],
)
def test_malformed_markup_marks_nothing(text: str) -> None:
    assert boxes_in(text) == []


@pytest.mark.parametrize("piece", ["<ref>", "<ref>a</ref>", "<box>(1,2),", "<box>" + " " * 50, "("])
def test_a_long_answer_without_boxes_takes_no_time(piece: str) -> None:
    began = time.process_time()
    assert boxes_in(piece * (300_000 // len(piece))) == []
    assert time.process_time() - began < 5


def test_boxes_travel_as_json() -> None:
    boxes = [Box("圆形", ((0, 0), (999, 500))), Box("", ((1, 2), (3, 4), (5, 6), (7, 8)))]
    assert read_boxes(write_boxes(boxes)) == boxes


@pytest.mark.parametrize(
    "value",
    [
        {},
        [1],
        [{"ref": "a", "corners": [[1, 2]]}],
        [{"ref": "a", "corners": [[1, 2], [3, 1001]]}],
        [{"ref": "a", "corners": [[1, 2], [-3, 1]]}],
        [{"ref": 1, "corners": [[1, 2], [3, 4]]}],
    ],
)
def test_what_are_no_boxes_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="box"):
        read_boxes(Tensor.of_text(json.dumps(value)))

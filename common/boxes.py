"""Boxes: the parts of an image that an answer points at, in the markup of grounding models.

An answer marks a part as `<box>(x1,y1),(x2,y2)</box>` or as `<quad>` with four points. What it says
about the part may stand right before it, as `<ref>text</ref>`. Coordinates count from the top left
corner on a grid of GRID x GRID cells, whatever the size of the image.
"""

import re

import msgspec

from common.wire import Tensor

GRID = 1000
POINT = r"\(\s{0,9}(\d{1,9})\s{0,9},\s{0,9}(\d{1,9})\s{0,9}\)"
MARKED = re.compile(
    r"(?:<ref>((?:(?!</?ref>).)*)</ref>)?"
    rf"(?:<box>\s{{0,9}}({POINT},{POINT})\s{{0,9}}</box>"
    rf"|<quad>\s{{0,9}}({POINT}(?:,{POINT}){{3}})\s{{0,9}}</quad>)",
    re.DOTALL,
)
NUMBER = re.compile(r"\d+")

Point = tuple[int, int]
"""x and y."""


class Box(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A part of an image: two corners of a rectangle, or the four corners of a quad."""

    ref: str
    """What the answer says about the part; empty if it says nothing."""
    corners: tuple[Point, ...]

    def scaled(self, height: int, width: int) -> "Box":
        """Return a box on the grid as one in pixels of an image of this size."""
        # The order of the operations is the reference's, because it decides what is rounded down.
        corners = tuple((int(x / GRID * width), int(y / GRID * height)) for x, y in self.corners)
        return Box(self.ref, corners)


decoder = msgspec.json.Decoder(list[Box])


def boxes_in(answer: str) -> list[Box]:
    """Return the boxes that a whole answer marks, on the grid. Malformed markup marks none.

    Coordinates beyond the grid are moved to its edge.
    """
    return [box_of(found) for found in MARKED.finditer(answer)]


def box_of(found: re.Match[str]) -> Box:
    numbers = [min(int(n), GRID) for n in NUMBER.findall(found[2] or found[7])]
    corners = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    return Box((found[1] or "").strip(), corners)


def write_boxes(boxes: list[Box]) -> Tensor:
    """UTF-8 JSON of boxes on the grid."""
    return Tensor.of_bytes(msgspec.json.encode(boxes))


def read_boxes(tensor: Tensor) -> list[Box]:
    """Return the boxes on the grid that a message carries.

    Raises
    ------
    ValueError
        if they are anything else.
    """
    try:
        boxes = decoder.decode(tensor.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError("the boxes are not a JSON list of boxes") from e
    for box in boxes:
        if len(box.corners) not in (2, 4):
            raise ValueError(f"a box has {len(box.corners)} corners")
        if any(not 0 <= n <= GRID for corner in box.corners for n in corner):
            raise ValueError(f"a corner of a box is outside the grid of {GRID}")
    return boxes

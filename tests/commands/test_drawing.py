"""`twinlens generate --draw`: the boxes of an answer on the image that they mark."""

import io
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.boxes import Box
from common.messages import Usage
from proto.twinlens.inference.v1 import inference_pb2
from services.commands.drawing import COLORS, draw_boxes, draw_on
from services.gateway.generation import Began, Boxes, Ended, Piece
from services.gateway.grpc_messages import box_message
from tests.commands.test_generate import run
from tests.gateway.fake_core import TIMINGS, FakeCore

ON_SECOND = Boxes(
    1, [Box("a cat", ((10, 20), (60, 50))), Box("", ((70, 5), (90, 5), (80, 30), (70, 9)))]
)


def answering(boxes: Boxes | None) -> FakeCore:
    return FakeCore(Began(None), Piece(0, [1], "Here.", []), Ended("stop", Usage(), TIMINGS, boxes))


def png(width: int, height: int, orientation: int = 1) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (width, height), "white").save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    arguments = []
    for name, size in (("a.png", (40, 40)), ("b.png", (100, 60))):
        (tmp_path / name).write_bytes(png(*size))
        arguments += ["--image", str(tmp_path / name)]
    return arguments


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def is_colored(pixel: Any) -> bool:
    return f"#{pixel[0]:02x}{pixel[1]:02x}{pixel[2]:02x}" in COLORS


@pytest.mark.parametrize("form", [[], ["--json"]])
async def test_the_marked_image_is_written_with_its_boxes(
    tmp_path: Path, images: list[str], form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert await run(answering(ON_SECOND), *images, "--draw", str(out), "Find it.", *form) == 0
    drawn = opened(out)
    assert drawn.size == (100, 60)
    assert all(is_colored(drawn.getpixel(at)) for at in [(60, 40), (40, 50), (10, 45), (80, 5)])
    assert drawn.getpixel((35, 45)) == (255, 255, 255)
    assert capsys.readouterr().err == f"twinlens: drew 2 boxes in {out}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "out.png"]


@pytest.mark.parametrize("boxes", [None, Boxes(0, [])])
async def test_an_answer_without_boxes_is_printed_and_is_an_error(
    tmp_path: Path, images: list[str], boxes: Boxes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert await run(answering(boxes), *images, "--draw", str(out), "Find it.") != 0
    assert capsys.readouterr() == (
        "Here.\n",
        "twinlens: the answer marks no boxes, so nothing was drawn\n",
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("out.gif", ".png, .jpg, .jpeg, .webp"),
        ("out", ".png"),
        ("missing/out.png", "can be written"),
        ("folder.png", "can be written"),
    ],
)
async def test_what_cannot_be_written_is_refused_before_anything_is_asked(
    tmp_path: Path, images: list[str], name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    core = answering(ON_SECOND)
    assert await run(core, *images, "--draw", str(tmp_path / name), "Find it.") != 0
    assert reason in capsys.readouterr().err and core.requests == []


async def test_there_must_be_an_image_to_draw_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(answering(None), "--draw", str(tmp_path / "out.png"), "Find it.") != 0
    assert "--image" in capsys.readouterr().err


def boxes(*found: Box) -> list[inference_pb2.Box]:
    return [box_message(box, 0) for box in found]


def test_a_turned_image_is_drawn_upright(tmp_path: Path) -> None:
    out = tmp_path / "out.webp"
    draw_boxes([png(100, 60, orientation=6)], boxes(Box("", ((5, 50), (55, 95)))), out)
    assert opened(out).size == (60, 100)


def test_the_same_seed_draws_the_same() -> None:
    def drawn(seed: int) -> np.ndarray:
        image = Image.new("RGB", (200, 100), "white")
        marked = boxes(*(Box(f"thing {n}", ((n, n), (90 + n, 50 + n))) for n in range(9)))
        draw_on(image, marked, seed)
        return np.asarray(image)

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert (drawn(1) != drawn(2)).any()


def test_corners_in_any_order_and_at_the_edge_can_be_drawn() -> None:
    image = Image.new("RGB", (20, 10), "white")
    draw_on(image, boxes(Box("a", ((20, 10), (0, 0))), Box("b", ((0, 0), (0, 0)))), 0)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"old")

    def fail(self: Image.Image, path: Path, format: str) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    image = png(9, 9)
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(Exception, match="no space left"):
        draw_boxes([image], boxes(Box("", ((1, 1), (2, 2)))), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert out.read_bytes() == b"old" and stat.S_ISREG(out.stat().st_mode)

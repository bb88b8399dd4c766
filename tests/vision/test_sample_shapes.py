"""Shapes of items that the families accept."""

import math

import pytest

from common.checkpoint import open_checkpoint
from services.vision.sample_shapes import SMALL_PATCHES, small_image
from tests.golden import GoldenCase


@pytest.mark.parametrize(
    ("name", "family", "num_patches"),
    [
        ("a_image", "qwen2_5_vl", SMALL_PATCHES),
        ("a_chat_image", "qwen_vl", 1024),
        ("a_image", "wemm", 225),
    ],
)
def test_a_small_image_is_one_that_the_family_accepts(
    name: str, family: str, num_patches: int
) -> None:
    checkpoint = open_checkpoint(GoldenCase(name, family).checkpoint)
    shape = small_image(checkpoint, 1 << 14)
    assert shape is not None and shape.kind == "image"
    assert not checkpoint.family.objection_to_shape(checkpoint, shape.grid_thw, shape.content_size)
    assert math.prod(shape.grid_thw) == num_patches


def test_a_family_whose_images_are_larger_has_its_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(GoldenCase("a_image").checkpoint)
    monkeypatch.setattr("services.vision.sample_shapes.SMALL_PATCHES", 1)
    shape = small_image(checkpoint, 10)
    assert shape is not None and shape.grid_thw == (1, 2, 2)
    assert small_image(checkpoint, 3) is None

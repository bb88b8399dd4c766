"""The client's bounds of pixels, within those of the deployment."""

from dataclasses import replace

import pytest

from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest
from common.messages import Item
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from common.wire import Tensor
from services.preprocess import families
from services.preprocess.families import FamilyRules, ItemLimits
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.submit_checks import check_item
from services.preprocess.tasks import bounds_of
from tests.golden import GoldenCase
from tests.preprocess.cases import checkpoint_path, encoded, noise

CELL = 28 * 28
LIMITS = ItemLimits(4 * CELL, 100 * CELL)


def rules(limits: ItemLimits = LIMITS) -> FamilyRules:
    return families.load(open_checkpoint(str(checkpoint_path("a_image"))), limits)


def cells(bounds: PixelBounds, max_patches: int = 0, limits: ItemLimits = LIMITS) -> int:
    """Return the tokens of a large square image."""
    found = rules(limits)
    return found.num_tokens(*found.fitting_size(2000, 2000, max_patches, bounds))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        (NO_BOUNDS, 100),
        (PixelBounds(max_pixels=36 * CELL), 36),
        (PixelBounds(max_pixels=CELL), 4),
        (PixelBounds(max_pixels=10_000 * CELL), 100),
        (PixelBounds(min_pixels=10_000 * CELL), 100),
        (PixelBounds(min_pixels=1, max_pixels=1), 4),
    ],
)
def test_bounds_are_clamped_to_those_of_the_deployment(bounds: PixelBounds, expected: int) -> None:
    assert cells(bounds) == expected


def test_a_small_image_is_enlarged_to_min_pixels() -> None:
    found = rules()
    assert found.fitting_size(56, 56, 0) == (56, 56)
    assert found.fitting_size(56, 56, 0, PixelBounds(min_pixels=49 * CELL)) == (196, 196)


def test_the_largest_bucket_bounds_min_pixels() -> None:
    assert cells(PixelBounds(min_pixels=90 * CELL), max_patches=4 * 16) == 16
    with pytest.raises(InvalidRequest, match="the vision replicas take at most 64"):
        cells(NO_BOUNDS, 64, replace(LIMITS, resizes_oversized=False))
    kept = cells(PixelBounds(max_pixels=16 * CELL), 64, replace(LIMITS, resizes_oversized=False))
    assert kept == 16


def test_the_estimate_of_tokens_and_the_name_of_an_item_agree_with_its_size() -> None:
    path = checkpoint_path("a_image")
    preprocessor = Preprocessor(open_checkpoint(str(path)), rules())
    file = encoded(noise(400, 300))
    bounds = PixelBounds(max_pixels=20 * CELL)
    items = {
        bound: preprocessor.prepare_item("image", file, bounds=bound)
        for bound in (NO_BOUNDS, bounds, PixelBounds(max_pixels=16 * CELL))
    }
    for bound, item in items.items():
        opened = preprocessor.open_item("image", file)
        assert preprocessor.num_tokens_of(opened, 0, bound) == item.num_tokens
    assert items[bounds].num_tokens <= 20 < items[NO_BOUNDS].num_tokens
    assert len({item.mm_hash for item in items.values()}) == len(items)


@pytest.mark.parametrize(
    ("family", "case"),
    [("qwen_vl", "a_chat_image"), ("vlmo", "vqa_base")],
)
def test_a_family_of_one_size_refuses_bounds_that_exclude_it(family: str, case: str) -> None:
    found = families.load(open_checkpoint(GoldenCase(case, family).checkpoint))
    height, width = found.fitting_size(10, 20, 0)
    pixels = height * width
    assert found.fitting_size(10, 20, 0, PixelBounds(pixels, pixels)) == (height, width)
    for bounds in (PixelBounds(min_pixels=pixels + 1), PixelBounds(max_pixels=pixels - 1)):
        with pytest.raises(InvalidRequest, match=f"resizes the image to {width}x{height} pixels"):
            found.fitting_size(10, 20, 0, bounds)


def test_wemm_obeys_max_pixels_and_names_what_it_cannot_do() -> None:
    found = families.load(open_checkpoint(GoldenCase("a_image", "wemm").checkpoint))
    height, width = found.fitting_size(30, 40, 0)
    smaller = found.fitting_size(30, 40, 0, PixelBounds(max_pixels=height * width // 2))
    assert 0 < smaller[0] * smaller[1] <= height * width // 2
    assert found.fitting_size(30, 40, 0, PixelBounds(max_pixels=1)) < smaller
    assert found.fitting_size(30, 40, 0, PixelBounds(min_pixels=1)) == (height, width)
    with pytest.raises(InvalidRequest, match=r"min_pixels .* excludes that: leave it out"):
        found.fitting_size(30, 40, 0, PixelBounds(min_pixels=height * width + 1))


def test_frames_of_a_video_keep_to_the_bounds() -> None:
    video_rules = families.load_video(open_checkpoint(str(checkpoint_path("a_image"))), LIMITS)
    assert video_rules is not None
    assert video_rules.fitting_size(2000, 2000, 4, 0) == (280, 280)
    bounds = PixelBounds(max_pixels=16 * CELL)
    assert video_rules.fitting_size(2000, 2000, 4, 0, bounds) == (112, 112)


def test_bounds_of_a_submit_are_checked_and_named_by_their_item() -> None:
    data = Tensor.of_bytes(b"x")
    items = [Item("image", data), Item("image", data, max_pixels=9)]
    assert bounds_of(items, 3) == {4: PixelBounds(max_pixels=9)}
    with pytest.raises(InvalidRequest, match="image 0: min_pixels 9 is more than max_pixels 4"):
        check_item(Item("image", data, min_pixels=9, max_pixels=4), "image 0")
    with pytest.raises(InvalidRequest, match="max_pixels must be a whole number from 1"):
        check_item(Item("image", data, max_pixels=0), "image 0")

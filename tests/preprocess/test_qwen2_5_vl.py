"""Qwen2.5-VL's preprocessing equals the reference's, on the golden cases and beyond."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as reference_smart_resize,
)

from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest
from services.preprocess.families import ItemLimits
from services.preprocess.families.patches import patches
from services.preprocess.families.qwen2_5_vl import Qwen25VLRules, smart_resize
from services.preprocess.preprocessor import Preprocessor
from tests.preprocess.builders import create_preprocessor
from tests.preprocess.cases import (
    CASES,
    GOLDEN,
    WITH_IMAGES,
    checkpoint_path,
    encoded,
    expected,
    noise,
    request,
)

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
HUB_LIMITS = {"factor": 28, "min_pixels": 3136, "max_pixels": 12845056}


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    return create_preprocessor(open_checkpoint(checkpoint_path("a_image")))


def normalised(rows: np.ndarray) -> np.ndarray:
    """Return what the tower makes of patches uint8 [n, 3 * 14 * 14].

    It is float32 [n, 1176], ordered by channel, time, y, x.
    """
    pixels = rows.reshape(len(rows), 3, 1, 196).astype(np.float32) / 255
    pixels = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    return pixels.repeat(2, axis=2).reshape(len(rows), 1176)


@pytest.mark.parametrize("case", CASES)
def test_golden_requests_become_the_references_tensors(case: str) -> None:
    preprocessor = create_preprocessor(open_checkpoint(checkpoint_path(case)))
    want = expected(case)
    tensors = load_file(GOLDEN / case / "expected" / "tensors.safetensors")
    messages, files = request(case)
    plans = [preprocessor.prepare_item("image", data) for data in files]
    assert len(plans) == {"a_image": 1, "b_two_images_tied": 2, "c_gqa_tp8": 1, "d_text": 0}[case]
    assert [list(plan.grid_thw) for plan in plans] == want.get("image_grid_thw", [])

    found = preprocessor.expand(preprocessor.encode(preprocessor.render(messages)), plans)
    assert found.token_ids.dtype == np.int64 and found.token_ids.tolist() == want["input_ids"]
    assert found.num_tokens == want["num_prompt_tokens"]
    assert found.positions.dtype == np.int64 and np.array_equal(
        found.positions, tensors["position_ids"]
    )
    assert found.rope_delta == want["rope_delta"]
    assert found.placeholders.tolist() == runs(want["input_ids"], preprocessor.placeholder_id)
    assert found.placeholders[:, 1].sum() == sum(plan.num_tokens for plan in plans)


def runs(token_ids: list[int], wanted: int) -> list[list[int]]:
    """Return [offset, length] of each run of one id."""
    starts = [i for i, id in enumerate(token_ids) if id == wanted and token_ids[i - 1] != wanted]
    return [
        [i, next(n for n in range(len(token_ids)) if token_ids[i + n] != wanted)] for i in starts
    ]


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_golden_pixels_equal_the_references(case: str) -> None:
    preprocessor = create_preprocessor(open_checkpoint(checkpoint_path(case)))
    want = load_file(GOLDEN / case / "expected" / "tensors.safetensors")["pixel_values"]
    plans = [preprocessor.prepare_item("image", data) for data in request(case)[1]]
    rows = [plan.patches() for plan in plans]
    assert [part.shape for part in rows] == [(plan.num_patches, 588) for plan in plans]
    assert all(part.dtype == np.uint8 and part.flags.c_contiguous for part in rows)
    found = normalised(np.concatenate(rows))
    assert found.shape == want.shape and len(want) > 0
    assert np.abs(found - want).max() <= 1e-5


@pytest.mark.parametrize(
    ("height", "width"), [(45, 333), (300, 29), (720, 1280), (10, 17), (56, 56)]
)
def test_pixels_of_any_size_equal_the_references(
    preprocessor: Preprocessor, height: int, width: int
) -> None:
    rgb = noise(height, width)
    reference = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    want = reference(images=[rgb], return_tensors="np")
    plan = preprocessor.prepare_item("image", encoded(rgb))
    assert [list(plan.grid_thw)] == want["image_grid_thw"].tolist()
    assert np.abs(normalised(plan.patches()) - want["pixel_values"]).max() <= 1e-5


@pytest.mark.parametrize(
    ("size", "limits", "want"),
    [
        ((720, 1280), HUB_LIMITS, (728, 1288)),
        ((1, 1), HUB_LIMITS, (56, 56)),
        ((28, 28), HUB_LIMITS, (56, 56)),
        ((42, 70), HUB_LIMITS, (56, 56)),  # 1.5 and 2.5 are both rounded to 2
        ((98, 126), HUB_LIMITS, (112, 112)),  # 3.5 and 4.5 to 4
        ((13, 1000), HUB_LIMITS, (28, 504)),  # a side rounded to nothing counts as too small
        ((5, 1000), HUB_LIMITS, (28, 812)),
        (
            (10000, 10000),
            HUB_LIMITS,
            (3556, 3556),
        ),  # 3584 in exact arithmetic, in floating point just below
        ((720, 1280), HUB_LIMITS | {"max_pixels": 921600}, (700, 1260)),
        ((100, 100), HUB_LIMITS | {"min_pixels": 78400}, (280, 280)),
        # Rounding up gives (224, 1120), which is too much
        ((56, 280), HUB_LIMITS | {"min_pixels": 240_000, "max_pixels": 240_000}, (196, 1092)),
        ((28, 5600), HUB_LIMITS | {"max_pixels": 784}, (28, 392)),
    ],
)
def test_smart_resize_follows_the_table(
    size: tuple[int, int], limits: dict[str, int], want: tuple[int, int]
) -> None:
    assert smart_resize(*size, **limits) == want


sides = st.integers(1, 8000)


@given(sides, sides, st.sampled_from([3136, 78400]), st.sampled_from([100352, 921600, 12845056]))
def test_smart_resize_equals_the_reference(
    height: int, width: int, min_pixels: int, max_pixels: int
) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    want = reference_smart_resize(
        height, width, factor=28, min_pixels=min_pixels, max_pixels=max_pixels
    )
    assume(want[0] * want[1] <= max_pixels or height * width > min_pixels)
    assert smart_resize(height, width, 28, min_pixels, max_pixels) == want


@pytest.mark.parametrize("size", [(1, 201), (2010, 10), (1, 50_000)])
def test_smart_resize_refuses_a_strip_and_names_the_ratio(size: tuple[int, int]) -> None:
    assert smart_resize(1, 200, **HUB_LIMITS)
    with pytest.raises(
        InvalidRequest,
        match=rf"the image is {size[1]}x{size[0]}: one side may be at most 200 times",
    ):
        smart_resize(*size, **HUB_LIMITS)


def test_patches_stand_in_blocks_that_are_merged() -> None:
    rgb = noise(56, 84)
    found = patches(rgb, 14, 2)
    assert found.shape == (4 * 6, 588)
    want = [
        rgb[14 * y : 14 * y + 14, 14 * x : 14 * x + 14].transpose(2, 0, 1).ravel()
        for row in range(2)
        for column in range(3)
        for y in (2 * row, 2 * row + 1)
        for x in (2 * column, 2 * column + 1)
    ]
    assert np.array_equal(found, want)


def test_limits_are_read_in_both_layouts_and_may_be_overridden() -> None:
    flat, nested = (open_checkpoint(checkpoint_path(case)) for case in ("a_image", "c_gqa_tp8"))
    rules = [Qwen25VLRules(checkpoint, ItemLimits()) for checkpoint in (flat, nested)]
    assert [(r.min_pixels, r.max_pixels) for r in rules] == [(3136, 12845056), (3136, 31360)]
    given = create_preprocessor(nested, min_pixels=78400, max_pixels=921600)
    assert given.prepare_item("image", encoded(noise(720, 1280))).grid_thw == (1, 50, 90)
    with pytest.raises(ValueError, match="min_pixels is 5000 and max_pixels 4000"):
        create_preprocessor(flat, min_pixels=5000, max_pixels=4000)
    with pytest.raises(ValueError, match="at least 784"):
        create_preprocessor(flat, min_pixels=10, max_pixels=783)

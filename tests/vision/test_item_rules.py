"""A replica takes the videos that preprocess makes of its model, and no others."""

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from common.checkpoint import open_checkpoint
from common.messages import Offer, Peer
from common.wire import Tensor
from services.preprocess import families
from services.preprocess.families import ItemLimits
from services.vision.item_rules import ItemRules
from services.vision.tower_thread import ItemShape
from tests.golden import GoldenCase

CHECKPOINT = open_checkpoint(GoldenCase("e_video").checkpoint)
RULES = ItemRules.of(CHECKPOINT)
VIDEO_RULES = families.load_video(CHECKPOINT)
assert VIDEO_RULES is not None
VIDEO = VIDEO_RULES.prepare(np.zeros((3, 56, 84, 3), np.uint8), 1.0)
OFFER = Offer(
    request_id="r",
    attempt=0,
    item=0,
    kind="video",
    mm_hash=VIDEO.mm_hash,
    grid_thw=VIDEO.grid_thw,
    content_size=VIDEO.content_size,
    num_patches=VIDEO.num_patches,
    llm=Peer("llm-1", "ipc:///llm-1"),
    timeout=60,
)


@pytest.mark.parametrize("max_pixels", [None, 3136])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (1700, 1700)])
@pytest.mark.parametrize("num_frames", [1, 5, 16])
def test_every_video_that_preprocess_makes_is_taken(
    max_pixels: int | None, size: tuple[int, int], num_frames: int
) -> None:
    rules = families.load_video(CHECKPOINT, ItemLimits(None, max_pixels))
    assert rules is not None
    height, width = rules.fitting_size(*size, num_frames, 0)
    item = rules.prepare(np.zeros((num_frames, height, width, 3), np.uint8), 1.0)
    facts = {name: getattr(item, name) for name in ("mm_hash", "grid_thw", "content_size")}
    offer = msgspec.structs.replace(OFFER, num_patches=item.num_patches, **facts)
    taken = ItemRules.of(CHECKPOINT, None, max_pixels)
    assert taken.objection_to(offer) == ""
    assert taken.objection_to_patches(offer, Tensor.of(item.patches())) == ""
    assert taken.shape_of(offer) == ItemShape(item.grid_thw, item.content_size, "video", 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "image"}, "an image is one step in time"),
        ({"grid_thw": (6, 4, 2)}, "does not fill the grid"),
        ({"grid_thw": (4, 4, 3)}, "whole 2 x 2 squares"),
        ({"num_patches": 24}, "has not 24 patches"),
    ],
    ids=str,
)
def test_another_shape_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in RULES.objection_to(msgspec.structs.replace(OFFER, **changes))


def test_patches_of_one_frame_or_of_other_frames_are_refused() -> None:
    rows = VIDEO.patches()
    assert RULES.objection_to_patches(OFFER, Tensor.of(rows)) == ""
    assert "is wanted" in RULES.objection_to_patches(OFFER, Tensor.of(rows[:, :588]))
    assert "the pixels of" in RULES.objection_to_patches(OFFER, Tensor.of(rows + 1))


def test_a_compiled_tower_takes_images_only() -> None:
    compiled = ItemRules.of(CHECKPOINT, is_compiled=True)
    assert compiled.objection_to(OFFER) == "this replica takes no videos, only images"
    assert replace(compiled, kinds=RULES.kinds).objection_to(OFFER) == ""

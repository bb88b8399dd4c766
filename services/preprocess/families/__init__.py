"""How items and prompts are prepared, one file per model family.

Nothing outside this folder imports a family.
"""

from collections.abc import Callable

from common.checkpoint import Checkpoint
from services.preprocess.families import qwen2_5_vl, qwen_vl, vlmo, wemm
from services.preprocess.families.limits import ItemLimits
from services.preprocess.families.rules import FamilyRules
from services.preprocess.families.video_rules import VideoRules

__all__ = ["FAMILIES", "FamilyRules", "ItemLimits", "VideoRules", "load", "load_video"]

FAMILIES: dict[str, Callable[[Checkpoint, ItemLimits], FamilyRules]] = {
    "qwen2_5_vl": qwen2_5_vl.Qwen25VLRules,
    "qwen": qwen_vl.QwenVLRules,
    "wemm": wemm.WemmRules,
    "vlmo": vlmo.VlmoRules,
}
"""The rules of a family, by its `model_type`."""
VIDEO_FAMILIES: dict[str, Callable[[Checkpoint, ItemLimits], VideoRules]] = {
    "qwen2_5_vl": qwen2_5_vl.Qwen25VideoRules,
}
"""The rules for videos of a family that takes them, by its `model_type`."""


def load(checkpoint: Checkpoint, limits: ItemLimits = ItemLimits()) -> FamilyRules:
    """Return the rules of the checkpoint's family.

    Raises
    ------
    ValueError
        if the limits cannot be kept.
    """
    return FAMILIES[checkpoint.family.model_type](checkpoint, limits)


def load_video(checkpoint: Checkpoint, limits: ItemLimits = ItemLimits()) -> VideoRules | None:
    """Return the rules for videos of the checkpoint's family; None if it takes none."""
    model_type = checkpoint.family.model_type
    if "video" not in checkpoint.family.placeholder_ids(checkpoint):
        return None
    return VIDEO_FAMILIES[model_type](checkpoint, limits)

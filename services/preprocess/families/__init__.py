"""How items and prompts are prepared, one file per model family.

Nothing outside this folder imports a family.
"""

from collections.abc import Callable

from common.checkpoint import Checkpoint
from services.preprocess.families import qwen2_5_vl, qwen_vl, vlmo, wemm
from services.preprocess.families.limits import ItemLimits
from services.preprocess.families.rules import FamilyRules

__all__ = ["FAMILIES", "FamilyRules", "ItemLimits", "load"]

FAMILIES: dict[str, Callable[[Checkpoint, ItemLimits], FamilyRules]] = {
    "qwen2_5_vl": qwen2_5_vl.Qwen25VLRules,
    "qwen": qwen_vl.QwenVLRules,
    "wemm": wemm.WemmRules,
    "vlmo": vlmo.VlmoRules,
}
"""The rules of a family, by its `model_type`."""


def load(checkpoint: Checkpoint, limits: ItemLimits = ItemLimits()) -> FamilyRules:
    """Return the rules of the checkpoint's family.

    Raises
    ------
    ValueError
        if the limits cannot be kept.
    """
    return FAMILIES[checkpoint.family.model_type](checkpoint, limits)

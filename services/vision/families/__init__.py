"""Vision towers, one file per model family. Nothing outside this folder imports a family."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from common.checkpoint import BadCheckpoint, Checkpoint
from services.vision.families.qwen2_5_vl import Qwen25VisionTower
from services.vision.families.qwen_vl import QwenVisionTower
from services.vision.families.wemm import WemmVisionTower
from services.vision.tower import VisionTower

# Each family has a type of plan of its own, which nobody else looks into.
AnyTower: TypeAlias = VisionTower[Any]
Report: TypeAlias = Callable[[float], None]

FAMILIES: dict[str, Callable[[Checkpoint, torch.dtype, torch.device, Report], AnyTower]] = {
    "qwen2_5_vl": Qwen25VisionTower,
    "qwen": QwenVisionTower,
    "wemm": WemmVisionTower,
}
"""How the vision tower of a family is loaded, by its `model_type`."""


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    report_loading: Report = lambda fraction: None,
) -> AnyTower:
    """Return the checkpoint's vision tower.

    `report_loading` is called with the fraction that is loaded.

    Raises
    ------
    BadCheckpoint
        if the checkpoint cannot be served, or its family has no vision tower.
    """
    family = checkpoint.family
    if family.model_type not in FAMILIES:
        raise BadCheckpoint(f"{checkpoint.path}: models of {family.title} have no vision tower")
    return FAMILIES[family.model_type](checkpoint, dtype, device, report_loading)

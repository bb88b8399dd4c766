"""The real tower: wire tensors to torch and back around a family's vision tower."""

from collections.abc import Callable

import torch

from common.checkpoint import Checkpoint
from common.logs import get_logger
from common.member import Member
from common.messages import VisionInbound
from common.settings import VisionSettings
from common.wire import Tensor
from compute.device import prepare
from compute.torch_tensors import NAMES, to_torch, to_wire
from services.vision.families.qwen2_5_vl import VisionTower
from services.vision.graphed_tower import GraphedVisionTower
from services.vision.static_tower import StaticVisionTower
from services.vision.tower_thread import DeviceLost, ItemShape


class TorchTower:
    def __init__(
        self,
        settings: VisionSettings,
        checkpoint: Checkpoint,
        member: Member[VisionInbound],
        buckets: tuple[int, ...],
    ) -> None:
        device, dtype = prepare(settings, checkpoint)
        get_logger().info(
            "loading",
            id=member.id,
            dtype=str(dtype),
            device=str(device.torch_device),
            threads=torch.get_num_threads(),
        )
        self._tower = make_tower(
            checkpoint, dtype, device.torch_device, member.report_loading, buckets
        )
        self.dtype = NAMES[dtype]

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        try:
            return to_wire(self._tower.encode(to_torch(patches), shape.grid_thw))
        except torch.AcceleratorError as e:
            raise DeviceLost from e


def make_tower(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None],
    buckets: tuple[int, ...],
) -> VisionTower:
    if buckets:
        return StaticVisionTower(checkpoint, dtype, device, buckets, progress)
    return (GraphedVisionTower if device.type == "cuda" else VisionTower)(
        checkpoint, dtype, device, progress
    )

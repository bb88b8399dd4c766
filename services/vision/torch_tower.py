"""The real tower: wire tensors to torch and back around a family's vision tower."""

import torch

from common.checkpoint import Checkpoint
from common.device import prepare
from common.logs import get_logger
from common.member import Member
from common.settings import VisionSettings
from common.torch_tensors import to_torch, to_wire
from common.wire import Tensor
from services.vision.cuda_graphs import GraphedVisionTower
from services.vision.families.qwen2_5_vl import VisionTower
from services.vision.worker import DeviceLost


class TorchTower:
    def __init__(self, settings: VisionSettings, checkpoint: Checkpoint, member: Member) -> None:
        device, dtype = prepare(settings, checkpoint)
        get_logger().info("loading", id=member.id, dtype=str(dtype), device=str(device), threads=torch.get_num_threads())
        kind = GraphedVisionTower if device.type == "cuda" else VisionTower
        self._tower = kind(checkpoint, dtype, device, member.loading)

    def encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
        try:
            return to_wire(self._tower.encode(to_torch(patches), grid_thw))
        except torch.AcceleratorError as e:
            raise DeviceLost from e

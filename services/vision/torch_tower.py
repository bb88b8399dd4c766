"""The vision tower that computes: converts between tensors of the wire and those of torch."""

import math
from collections.abc import Callable

import torch

from common.checkpoint import Checkpoint
from common.logs import get_logger
from common.member import Member
from common.messages import VisionInbound
from common.settings import VisionSettings
from common.vision_artefact import VisionArtefact
from common.wire import Tensor
from compute.device import prepare
from compute.torch_tensors import DTYPES, NAMES, to_torch, to_wire
from services.vision.attention_choice import AttendingTower, choose_attention
from services.vision.compiled_tower import CompiledTower
from services.vision.eager_tower import EagerTower
from services.vision.families import load
from services.vision.graphed_tower import GraphedTower
from services.vision.sample_shapes import small_image
from services.vision.static_tower import StaticTower
from services.vision.tower import Encoder
from services.vision.tower_thread import DeviceLost, ItemShape

MAX_WARM_UP_PATCHES = 1 << 14
"""Families whose images all have more patches encode none at start."""


class TorchTower:
    """The vision tower of a checkpoint, as the replica's settings ask for it."""

    def __init__(
        self,
        settings: VisionSettings,
        checkpoint: Checkpoint,
        member: Member[VisionInbound],
        buckets: tuple[int, ...],
        artefact: VisionArtefact | None = None,
    ) -> None:
        """Load the weights of the checkpoint, or the artefact if there is one.

        `member` reports the progress of that.
        """
        device, dtype = prepare(settings, checkpoint)
        if artefact is not None:
            dtype = DTYPES[artefact.manifest.dtype]
        get_logger().info(
            "loading",
            id=member.id,
            dtype=str(dtype),
            device=str(device.torch_device),
            threads=torch.get_num_threads(),
        )
        self._encoder: Encoder
        if artefact is not None:
            self._encoder = CompiledTower(artefact, device.torch_device, member.report_loading)
        else:
            self._encoder = make_encoder(
                checkpoint, dtype, device.torch_device, member.report_loading, buckets
            )
        self.dtype = NAMES[dtype]

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """uint8 [num_patches, values per patch] -> [num_tokens, width of the embeddings].

        Raises
        ------
        DeviceLost
            if the process must be restarted before it can use the device again.
        """
        try:
            return to_wire(self._encoder.encode(to_torch(patches), shape))
        except torch.AcceleratorError as e:
            raise DeviceLost from e


def make_encoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    report_loading: Callable[[float], None],
    buckets: tuple[int, ...],
) -> Encoder:
    """Load the checkpoint's vision tower and choose how to run it.

    Buckets make it static. Without them, a CUDA device gets graphs, and the fastest attention. On
    CUDA it encodes an image, so that no request waits for a kernel to compile. `report_loading` is
    called with the fraction that is loaded.
    """
    tower = load(checkpoint, dtype, device, report_loading)
    if device.type != "cuda":
        return StaticTower(tower, buckets) if buckets else EagerTower(tower)
    encoder: Encoder
    if buckets:
        encoder = StaticTower(tower, buckets)
    else:
        if isinstance(tower, AttendingTower):
            choose_attention(tower)
            report_loading(1.0)
        encoder = GraphedTower(tower)
    warm_up(encoder, checkpoint, tower.values_per_patch, max(buckets, default=MAX_WARM_UP_PATCHES))
    report_loading(1.0)
    return encoder


def warm_up(
    encoder: Encoder, checkpoint: Checkpoint, values_per_patch: int, max_patches: int
) -> None:
    """Encode a black image, and wait for the result, if one of so few patches can be encoded."""
    shape = small_image(checkpoint, max_patches)
    if shape is not None:
        size = (math.prod(shape.grid_thw), shape.frames_per_patch * values_per_patch)
        encoder.encode(torch.zeros(size, dtype=torch.uint8), shape).cpu()

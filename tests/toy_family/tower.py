"""The vision tower of the toy family: one attention over all patches, and no windows.

Pixels beyond the content of an item are 0 after normalising, which no byte can say. So the plan has
a mask of the content.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import Checkpoint
from compute.weights import Weights
from services.vision.tower_thread import ItemShape

CHUNK = 6
"""Padded plans have whole chunks of this number of patches."""


@dataclass(frozen=True, slots=True)
class EyePlan:
    """What depends on an item's shape alone. The padding of a padded plan stands last."""

    content: Tensor
    """bool [length, values_per_patch]: the pixels that are not padding."""
    is_patch: Tensor
    """bool [length]."""


class Eye:
    """Encodes one item at a time. Implements `VisionTower[EyePlan]`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        report_loading: Callable[[float], None],
    ) -> None:
        self.dtype = dtype
        self.device = device
        eye = checkpoint.config["eye"]
        self._patch: int = eye["patch"]
        self._patches_per_token: int = eye["patches_per_token"]
        self.values_per_patch = 3 * self._patch**2
        self.output_width = checkpoint.sizes.hidden_size
        width: int = eye["width"]
        weights = Weights(checkpoint, lambda name: name.startswith("eye."), report_loading)
        self._look, self._mix, self._tell = (
            weights.tensor(f"eye.{name}", shape, dtype, device)
            for name, shape in (
                ("look", (width, self.values_per_patch)),
                ("mix", (width, width)),
                ("tell", (self.output_width, self._patches_per_token * width)),
            )
        )

    def num_tokens(self, shape: ItemShape) -> int:
        return prod(shape.grid_thw) // self._patches_per_token

    def padded_length(self, num_patches: int) -> int:
        return -(-num_patches // CHUNK) * CHUNK

    def plan(self, shape: ItemShape, length: int | None = None) -> EyePlan:
        num_patches = prod(shape.grid_thw)
        padding = 0 if length is None else length - num_patches
        content = F.pad(self._content(shape), (0, 0, 0, padding))
        is_patch = F.pad(torch.ones(num_patches, dtype=torch.bool), (0, padding))
        return EyePlan(content.to(self.device), is_patch.to(self.device))

    def _content(self, shape: ItemShape) -> Tensor:
        """bool [num_patches, values_per_patch]: patches in raster order, values by (channel, y,
        x)."""
        _, rows, columns = shape.grid_thw
        height, width = shape.content_size
        patch = self._patch
        pixels = torch.zeros(rows * patch, columns * patch, dtype=torch.bool)
        pixels[:height, :width] = True
        cells = pixels.view(rows, patch, columns, patch).transpose(1, 2)
        return cells.reshape(rows * columns, patch**2).repeat(1, 3)

    def forward(self, patches: Tensor, plan: EyePlan) -> Tensor:
        """Patches in raster order -> an embedding for every three of them."""
        pixels = (patches.float() / 127.5 - 1) * plan.content
        x = pixels.to(self.dtype) @ self._look.T
        scores = x @ self._mix @ x.T
        weights = scores.masked_fill(~plan.is_patch, -torch.inf).softmax(-1)
        x = x + weights @ x
        return x.view(-1, self._tell.shape[1]) @ self._tell.T


load = Eye

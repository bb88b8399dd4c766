"""What every family's vision tower implements.

`EagerTower`, `StaticTower` and `GraphedTower` run any such tower. None of them knows a family.
"""

import math
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from services.vision.tower_thread import ItemShape

MAX_CACHED_PLANS = 16
"""The plans that a way to run a tower keeps for the shapes that came last."""

Plan = TypeVar("Plan")


class VisionTower(Protocol[Plan]):
    """The vision tower of one model family, for one item at a time.

    A `Plan` is a dataclass of tensors and plain values. Only the tower that made it reads it.

    A compiled tower makes plans without any weights: the constructor then gets weights on the
    device `meta`. So plans must not depend on them.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        ...

    @property
    def output_width(self) -> int:
        """The width of the embeddings."""
        ...

    @property
    def values_per_patch(self) -> int:
        """The bytes in a row of patches of an image, which is one frame."""
        ...

    def num_tokens(self, shape: ItemShape) -> int:
        """Return how many embeddings an item of this shape becomes."""
        ...

    def padded_length(self, num_patches: int) -> int:
        """Return the smallest length, at least `num_patches`, that a padded plan can have."""
        ...

    def plan(self, shape: ItemShape, length: int | None = None) -> Plan:
        """Return everything that depends on the item's shape alone, on the tower's device.

        With `length`, one of those that `padded_length` returns, the plan is padded: it has room
        for `length` patches and masks those that the item does not have. All shapes and all plain
        values in such a plan depend on `length` alone.
        """
        ...

    def forward(self, patches: Tensor, plan: Plan) -> Tensor:
        """uint8 [length, values] -> [rows, output_width], both on the tower's device.

        There are `values_per_patch` values for each frame that a patch covers.

        The first `num_tokens` rows are the item's embeddings. A padded plan may add rows after
        them. Then every shape in the computation depends on `length` alone, and the patches after
        the item's own may have any values.

        CUDA graphs record this computation, so it never waits for the device.
        """
        ...


class Encoder(Protocol):
    """A tower together with a way to run it."""

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """uint8 [num_patches, values per patch] on any device -> [num_tokens, output width]."""
        ...


def check_patches(patches: Tensor, shape: ItemShape, values_per_patch: int) -> None:
    """Raise ValueError unless these are the patches of an item of this shape."""
    expected = (math.prod(shape.grid_thw), shape.frames_per_patch * values_per_patch)
    if patches.shape != expected or patches.dtype != torch.uint8:
        raise ValueError(
            f"the patches are {patches.dtype} {tuple(patches.shape)}, but a grid of "
            f"{shape.grid_thw} needs uint8 {expected}"
        )

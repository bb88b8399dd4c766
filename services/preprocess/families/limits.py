"""The limits that a deployment sets to the size of items."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ItemLimits:
    """The limits of resized items. The checkpoint decides what is None."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resizes_oversized: bool = True
    """Whether an item that is too large for every vision replica is made smaller, not refused."""

"""What a replica accepts of an item. Imports no torch."""

import math
from dataclasses import dataclass

from common.address import objection_to_peer
from common.checkpoint import Checkpoint
from common.item_hash import item_hash
from common.messages import ItemKind, Offer
from common.wire import Tensor
from services.vision.tower_thread import ItemShape


@dataclass(frozen=True)
class ItemRules:
    """The items that preprocess makes for one checkpoint.

    A replica checks what it caches: other pixels under the name of an item would change what every
    later request with that item reads.
    """

    checkpoint: Checkpoint
    max_patches: int
    """The most patches of an item, by the limits of pixels and by the largest bucket."""
    kinds: frozenset[ItemKind]
    """The kinds of items that the tower takes."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        buckets: tuple[int, ...] = (),
        is_compiled: bool = False,
    ) -> "ItemRules":
        """Return the rules of a replica. A limit that is None is the checkpoint's.

        A compiled tower takes images only: the patches and masks of videos have other shapes.
        """
        most = checkpoint.family.max_patches(checkpoint, min_pixels, max_pixels)
        kinds = checkpoint.family.placeholder_ids(checkpoint).keys()
        taken = kinds & {"image"} if is_compiled else kinds
        return cls(checkpoint, min(most, max(buckets, default=most)), frozenset(taken))

    def objection_to(self, offer: Offer) -> str:
        """Return why an item cannot be encoded; empty if it can."""
        num_patches = offer.num_patches
        if num_patches > self.max_patches:
            return (
                f"{num_patches} patches, this replica takes at most {self.max_patches}: give it "
                "the same --max-pixels as preprocess"
            )
        whole = self.checkpoint.patches_per_token
        if not num_patches or num_patches % whole or math.prod(offer.grid_thw) != num_patches:
            return f"a grid of {offer.grid_thw} has not {num_patches} patches in groups of {whole}"
        if offer.kind not in self.kinds:
            return f"this replica takes no {offer.kind}s, only {', '.join(sorted(self.kinds))}s"
        if offer.kind == "image" and offer.grid_thw[0] != 1:
            return "an image is one step in time"
        shape = self.checkpoint.family.objection_to_shape(
            self.checkpoint, offer.grid_thw, offer.content_size
        )
        return shape or objection_to_peer(offer.llm)

    def shape_of(self, offer: Offer) -> ItemShape:
        """Return the shape of an item that can be encoded."""
        num_frames = self._frames_per_patch(offer)
        return ItemShape(offer.grid_thw, offer.content_size, offer.kind, num_frames)

    def _frames_per_patch(self, offer: Offer) -> int:
        return self.checkpoint.family.frames_per_patch(self.checkpoint, offer.kind)

    def objection_to_patches(self, offer: Offer, patches: Tensor) -> str:
        """Return why these patches are not those of the offered item; empty if they are."""
        num_values = self.checkpoint.family.values_per_patch(self.checkpoint)
        wanted = (offer.num_patches, self._frames_per_patch(offer) * num_values)
        if patches.shape != wanted or patches.dtype != "uint8":
            return f"{patches} came for {offer.num_patches} patches: uint8 {wanted} is wanted"
        found = item_hash(
            self.checkpoint.fingerprint,
            offer.kind,
            offer.grid_thw,
            offer.content_size,
            patches.data,
        )
        return "" if found == offer.mm_hash else f"the pixels of {found} came for {offer.mm_hash}"

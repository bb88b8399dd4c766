"""The name of an item's content, which a vision replica can compute from what it gets."""

import json

from blake3 import blake3

from common.messages import ItemKind
from common.wire import Buffer


def item_hash(
    fingerprint: str,
    kind: ItemKind,
    grid_thw: tuple[int, int, int],
    content_size: tuple[int, int],
    patches: Buffer,
) -> str:
    """Return 64 hex digits that name the embeddings of an item.

    They cover all that decides the embeddings: the model with its configuration (`fingerprint`),
    the kind and the shape of the item, and the bytes of its patches. Equal pixels in two file
    formats have one name.
    """
    about = [fingerprint, kind, grid_thw, content_size]
    digest = blake3(json.dumps(about).encode() + b"\0")
    digest.update(patches)
    return digest.hexdigest()

"""Reference implementations, one file per model family."""

import importlib.util
from collections.abc import Callable

from common.checkpoint import BadCheckpoint, Checkpoint
from services.commands.client import ClientError
from services.commands.verification.families.qwen2_5_vl import Qwen25VLReference
from services.commands.verification.families.qwen_vl import QwenVLReference
from services.commands.verification.families.vlmo import VlmoReference
from services.commands.verification.families.wemm import WemmReference
from services.commands.verification.reference import ChatReference, PixelLimits, PoolingReference

CHAT: dict[str, Callable[[Checkpoint, PixelLimits], ChatReference]] = {
    "qwen2_5_vl": Qwen25VLReference,
    "qwen": QwenVLReference,
    "wemm": WemmReference,
}
"""The references of families that write, by their `model_type`."""
POOLING = {"vlmo": VlmoReference}
"""Those of families that answer with a label or a vector."""


def load_chat(checkpoint: Checkpoint, limits: PixelLimits) -> ChatReference:
    """Return the reference of a checkpoint that writes.

    Raises BadCheckpoint if it cannot read the files, ClientError if a package is missing.
    """
    make = CHAT[checkpoint.family.model_type]
    if make is Qwen25VLReference and not importlib.util.find_spec("transformers"):
        raise ClientError(
            "the reference of this family is transformers: pip install 'twinlens[reference]'"
        )
    try:
        return make(checkpoint, limits)
    except (OSError, KeyError) as e:
        raise BadCheckpoint(f"{checkpoint.path} cannot be read by its reference: {e}") from e


def load_pooling(checkpoint: Checkpoint, limits: PixelLimits) -> PoolingReference:
    """Return the reference of a checkpoint that answers with labels or vectors."""
    return POOLING[checkpoint.family.model_type](checkpoint, limits)

"""Reference implementations, one file per model family."""

from collections.abc import Callable

from common.checkpoint import BadCheckpoint, Checkpoint
from services.commands.client import ClientError
from services.commands.verification.families.qwen2_5_vl import Qwen25VLReference
from services.commands.verification.families.qwen_vl import QwenVLReference
from services.commands.verification.families.vlmo import VlmoReference
from services.commands.verification.families.wemm import WemmReference
from services.commands.verification.reference import ChatReference, PixelLimits, PoolingReference

Reference = ChatReference | PoolingReference
REFERENCES: dict[str, Callable[[Checkpoint, PixelLimits], Reference]] = {
    "qwen2_5_vl": Qwen25VLReference,
    "qwen": QwenVLReference,
    "wemm": WemmReference,
    "vlmo": VlmoReference,
}
"""The references of the families, by their `model_type`."""


def load(checkpoint: Checkpoint, limits: PixelLimits) -> Reference:
    """Return the reference of a checkpoint.

    Raises BadCheckpoint if it cannot read the files, ClientError if a package is missing or old.
    """
    make = REFERENCES[checkpoint.family.model_type]
    try:
        return make(checkpoint, limits)
    except BadCheckpoint:
        raise
    except ImportError as e:
        raise ClientError(
            "the reference of this family is transformers, in the version of "
            f"pip install 'twinlens[reference]' ({e})"
        ) from e
    except (OSError, KeyError, ValueError) as e:
        raise BadCheckpoint(f"{checkpoint.path} cannot be read by its reference: {e}") from e

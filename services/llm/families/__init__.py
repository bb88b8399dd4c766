"""Language models, one file per model family. Nothing outside this folder imports a family."""

from collections.abc import Callable

import torch

from common.checkpoint import Checkpoint
from services.llm.families import qwen2_5_vl, qwen_vl, vlmo, wemm
from services.llm.language_model import LanguageModel
from services.llm.loading import RankBounds, ShardLoader
from services.llm.lora_weights import LoraTarget
from services.llm.parallel import Shard
from services.llm.pooling_model import PoolingModel

FAMILIES: dict[str, Callable[[Checkpoint, ShardLoader], LanguageModel]] = {
    "qwen2_5_vl": qwen2_5_vl.load,
    "qwen": qwen_vl.load,
    "wemm": wemm.load,
}
"""How the model of a family is loaded, by its `model_type`."""
LORA_TARGETS: dict[str, Callable[[RankBounds], dict[str, LoraTarget]]] = {
    "qwen2_5_vl": qwen2_5_vl.lora_targets,
    "qwen": qwen_vl.lora_targets,
}
"""Where a rank adds the pairs of a LoRA adapter, for the families that have adapters."""
POOLING_FAMILIES: dict[str, Callable[[Checkpoint, ShardLoader], PoolingModel]] = {
    "vlmo": vlmo.load,
}
"""The same for models that generate no text."""


Pieces = Callable[[str, tuple[int, ...], Shard], list[tuple[int, int, int]]]
"""Returns (dimension, first, last) of each piece of a tensor that is a rank's; none if all is."""
PIECES: dict[str, Pieces] = {"vlmo": vlmo.pieces}
"""How `twinlens shard` cuts the tensors of a family."""


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = Shard(),
    report_loading: Callable[[float], None] = lambda fraction: None,
    quantization: str = "auto",
) -> LanguageModel:
    """Return one rank's share of the checkpoint's language model.

    Raises
    ------
    BadCheckpoint
        if the checkpoint cannot be served, or not by this number of ranks.
    """
    loader = ShardLoader(checkpoint, dtype, device, shard, report_loading, quantization)
    return FAMILIES[checkpoint.family.model_type](checkpoint, loader)


def load_pooling(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = Shard(),
    report_loading: Callable[[float], None] = lambda fraction: None,
) -> PoolingModel:
    """Return one rank's share of a checkpoint's model that generates no text.

    Raises BadCheckpoint as `load` does.
    """
    loader = ShardLoader(checkpoint, dtype, device, shard, report_loading)
    return POOLING_FAMILIES[checkpoint.family.model_type](checkpoint, loader)

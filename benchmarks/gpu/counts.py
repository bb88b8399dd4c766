"""The steps that `scripts/gpu` times, with the bytes and operations that they need at least."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from common.checkpoint import Checkpoint
from common.tensor_info import TensorInfo
from services.llm.families.qwen2_5_vl import TextConfig
from services.llm.model_runner import ModelRunner
from services.llm.step_plan import StepPlan
from services.vision.families.qwen2_5_vl import VisionConfig

DTYPE = torch.bfloat16
BYTES = {"F8_E4M3": 1, "I32": 4}
"""The bytes of an entry of quantized weights; all others are read as DTYPE."""


def plan_of(query_lens: Iterable[int], context_len: int, block_size: int) -> StepPlan:
    """Return a plan of sequences with `context_len` tokens each after the step.

    Each sequence has consecutive blocks.
    """
    lens = np.array(list(query_lens), np.int64)
    num_blocks = -(-context_len // block_size)
    tables = np.arange(len(lens) * num_blocks).reshape(len(lens), num_blocks)
    index = np.concatenate([np.arange(context_len - query, context_len) for query in lens])
    seqs = np.repeat(np.arange(len(lens)), lens)
    return StepPlan(
        token_ids=index % 1000,
        positions=np.tile(index, (3, 1)),
        slot_mapping=tables[seqs, index // block_size] * block_size + index % block_size,
        query_lens=lens,
        context_lens=np.full(len(lens), context_len),
        block_tables=tables,
        item_rows=np.zeros(0, np.int64),
        sampled_rows=lens.cumsum() - 1,
        rope_parameters=np.zeros(len(lens), np.int64),
        adapters=np.zeros(len(lens), np.int64),
    )


def num_values(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> int:
    """Return the number of entries of the matrices whose names begin with one of the prefixes."""
    return sum(math.prod(info.shape) for info in matrices(checkpoint, prefixes))


def matrices(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> Iterator[TensorInfo]:
    """Yield the matrices whose names begin with one of the prefixes."""
    canonical_name = checkpoint.family.canonical_name
    for name, info in checkpoint.tensors.items():
        if canonical_name(name).startswith(prefixes) and len(info.shape) > 1:
            yield info


def decode_bytes(checkpoint: Checkpoint, batch: int, context_len: int) -> int:
    """Return the bytes that a decode step must read.

    They are every matrix of layers and head once, and the keys and values of each sequence.
    """
    head = "model.language_model.embed_tokens." if TextConfig.of(checkpoint).tied else "lm_head."
    prefixes = ("model.language_model.layers.", head)
    weights = sum(
        math.prod(info.shape) * BYTES.get(info.dtype, DTYPE.itemsize)
        for info in matrices(checkpoint, prefixes)
    )
    return weights + batch * context_len * ModelRunner.kv_bytes_per_block(checkpoint, DTYPE, 1)


def prefill_operations(checkpoint: Checkpoint, num_tokens: int) -> int:
    """Return the operations of a prefill, without its one row of the head and masked scores."""
    sizes = checkpoint.sizes
    attention = 2 * num_tokens**2 * sizes.num_heads * sizes.head_dim * sizes.num_layers
    return 2 * num_tokens * num_values(checkpoint, ("model.language_model.layers.",)) + attention


def vision_operations(checkpoint: Checkpoint, num_patches: int) -> int:
    """Return the operations of an encode; the patch embedding computes the sum of its taps only."""
    config = VisionConfig.of(checkpoint)
    num_full = len(config.fullatt_block_indexes)
    window = (config.window_size // config.patch_size) ** 2
    attention = (
        4
        * num_patches
        * config.hidden_size
        * (num_full * num_patches + (config.depth - num_full) * window)
    )
    blocks, merger, embed = (
        num_values(checkpoint, (f"model.visual.{part}",))
        for part in ("blocks.", "merger.", "patch_embed.")
    )
    return (
        2 * num_patches * (blocks + embed // config.temporal_patch_size)
        + 2 * num_patches // config.merge_unit * merger
        + attention
    )

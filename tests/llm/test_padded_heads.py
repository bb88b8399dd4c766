"""Ranks that cannot share the query heads of a key head evenly get heads of zeros.

Qwen2.5-VL-7B has 7 query heads for each of 4 key heads, and is served by 8 ranks like this.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.families import ModelSizes
from common.families.family import TP_SIZES
from common.sizing import Footprint
from compute.kernels.library import int8_kernels
from services.llm.families import load
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from tests.golden import GoldenCase, max_difference
from tests.llm.test_model_runner import BLOCK_SIZE, CPU, ThreadGroup, forced_logits, runner_of

HEADS = 28
KV_HEADS = 4
HEAD_DIM = 32


@dataclass(frozen=True)
class Remade(GoldenCase):
    """A golden case with another checkpoint."""

    folder: Path = Path()

    @property
    def checkpoint(self) -> Path:
        return self.folder


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> GoldenCase:
    return padded_case(tmp_path_factory.mktemp("padded") / "model")


def padded_case(folder: Path) -> GoldenCase:
    """Return a golden case with random attention of 28 and 4 heads, written to a new folder."""
    given = GoldenCase("c_gqa_tp8")
    shutil.copytree(given.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(3)
    width = text["hidden_size"]
    for name in tensors:
        part = name.rsplit(".", 2)[-2]
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS, "o_proj": HEADS}
        if part not in heads or "visual" in name:
            continue
        rows = heads[part] * HEAD_DIM
        shape = {"o_proj": (width, rows)}.get(part, (rows, width))
        made = torch.randn(rows if name.endswith("bias") else shape, generator=random)
        tensors[name] = (made / shape[1] ** 0.5).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return Remade("c_gqa_tp8", folder=folder)


def logits_of_ranks(case: GoldenCase, world_size: int) -> list[np.ndarray]:
    return ThreadGroup(world_size).run(
        lambda shard: forced_logits(runner_of(case, shard=shard), case, 33)
    )


@pytest.mark.parametrize("world_size", [4, 8])
def test_ranks_compute_what_one_computes(case: GoldenCase, world_size: int) -> None:
    whole = forced_logits(runner_of(case), case, 33)
    ranks = logits_of_ranks(case, world_size)
    assert len(ranks) == world_size
    for logits in ranks:
        assert max_difference(logits, whole) < 1e-4


def test_memory_is_what_was_planned(case: GoldenCase) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    for rank in range(8):
        model = load(checkpoint, torch.float32, CPU, Shard(rank, 8))
        (layer, *_) = model.layers
        assert layer.qkv.product.shape == ((4 + 2) * HEAD_DIM, 256)
        assert layer.o.product.shape == (256, 4 * HEAD_DIM)
        shape = model.kv_cache_shape(5, BLOCK_SIZE)
        assert shape[-2:] == (1, HEAD_DIM)
        per_token = Footprint(checkpoint, 4).kv_bytes_per_token(8)
        assert np.prod(shape) * 4 == per_token * 5 * BLOCK_SIZE
    stored = ModelRunner(checkpoint, torch.float32, CPU, 1, 16, shard=Shard(0, 8)).num_bytes_read
    assert Footprint(checkpoint, 2).rank_bytes(8) == stored, "rank 0 holds no zeros"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "pads", "fitting"),
    [
        (28, 4, True, (1, 2, 4, 8)),
        (28, 4, False, (1, 2, 4)),
        (20, 4, True, (1, 2, 4, 8)),
        (6, 2, True, (1, 2, 4)),
        (4, 2, True, (1, 2, 4)),
        (7, 1, True, (1, 2, 4)),
        (5, 1, True, (1, 2)),
        (12, 12, True, (1, 2, 4)),
        (16, 2, True, (1, 2, 4, 8)),
    ],
)
def test_groups_are_padded_if_each_rank_has_a_head_of_its_own(
    heads: int, kv_heads: int, pads: bool, fitting: tuple[int, ...]
) -> None:
    sizes = ModelSizes(64, 64, 64, 2, heads, kv_heads, 8, pads)
    assert tuple(filter(sizes.fits, TP_SIZES)) == fitting
    for world_size in fitting:
        shares = [sizes.query_heads(rank, world_size) for rank in range(world_size)]
        assert [h for first, last in shares for h in range(first, last)] == list(range(heads))
        assert max(last - first for first, last in shares) == sizes.heads_per_rank(world_size)


def test_a_family_that_does_not_pad_names_the_sizes_that_divide() -> None:
    sizes = ModelSizes(64, 64, 64, 2, 28, 4, 8)
    with pytest.raises(BadCheckpoint, match=r"28 heads, 4 key heads.* use --tp 1, 2, 4$"):
        sizes.check_fits(8)


@pytest.mark.skipif(int8_kernels() is None, reason="no kernels for this CPU, or no compiler")
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_zeros_stay_zeros_in_half_precision_and_int8(case: GoldenCase, quantization: str) -> None:
    """Rows of zeros have no scale of their own, and the fused decode has heads of zeros."""

    def logits_of(shard: Shard) -> np.ndarray:
        return forced_logits(runner_of(case, torch.bfloat16, shard, quantization), case, 33)

    whole = logits_of(Shard())
    ranks = ThreadGroup(8).run(logits_of)
    spread = np.abs(whole).max()
    for logits in ranks:
        assert max_difference(logits, whole) < 0.1 * spread

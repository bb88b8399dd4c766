"""The language model of the toy family: a decoder with everything that a family may add."""

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from compute.quantized_weights import Weight
from services.llm.attention import RotaryTables
from services.llm.batch import Batch
from services.llm.decoder import (
    Decoder,
    Layer,
    LowRank,
    Projection,
    rotary_tables,
)
from services.llm.loading import Bounds, ShardLoader
from tests.toy_family.description import LOW_RANK

NORM_EPS = 1e-5
BASE = 500.0
FIRST_COMPONENT_SHARE = 5
"""How many of the frequencies turn by the first position component; the others by the second."""


def load(checkpoint: Checkpoint, loader: ShardLoader) -> Decoder:
    sizes = loader.sizes
    lookup, head = loader.vocabulary("stem.words", "stem.out")
    return Decoder(
        sizes=sizes,
        norm_eps=NORM_EPS,
        dtype=loader.dtype,
        device=loader.device,
        shard=loader.shard,
        rows_of_vocabulary=lookup,
        layers=[load_layer(loader, f"block.{i}") for i in range(sizes.num_layers)],
        norm=loader.whole("stem.norm", sizes.hidden_size),
        head=head,
        rotary=lambda batch: rotary(batch, sizes.head_dim),
        query_scale=query_scale,
        num_bytes_read=loader.num_bytes_read,
    )


def rotary(batch: Batch, head_dim: int) -> RotaryTables:
    """The rope parameter of a sequence stretches its base."""
    half = torch.arange(head_dim // 2).float()
    bases = BASE * batch.rope_parameters.float()
    frequencies = bases[:, None] ** -(2 * half / head_dim)
    component = (half >= FIRST_COMPONENT_SHARE).long()
    return rotary_tables(batch.positions[component].T.float() * frequencies)


def query_scale(batch: Batch) -> Tensor:
    return 1 + 0.1 * torch.log1p(batch.positions[0].float())


def load_layer(loader: ShardLoader, name: str) -> Layer:
    sizes = loader.sizes
    width = sizes.hidden_size
    inner = sizes.intermediate_size
    q_rows = sizes.num_heads * sizes.head_dim
    kv_rows = sizes.num_kv_heads * sizes.head_dim
    qkv = (("q", q_rows, loader.q_bounds), ("k", kv_rows, loader.kv_bounds))
    qkv += (("v", kv_rows, loader.kv_bounds),)
    mlp = (("gate", inner, loader.mlp_bounds), ("up", inner, loader.mlp_bounds))

    def wide(parts: tuple[tuple[str, int, Bounds], ...], low: str) -> tuple[list[Weight], LowRank]:
        """Rows of several tensors, each split among the ranks, with the rows of their pairs."""
        weights = [
            loader.weight_rows(f"{name}.{part}", (rows, width), b) for part, rows, b in parts
        ]
        ups = [loader.rows(f"{name}.{part}.low_up", (rows, LOW_RANK), b) for part, rows, b in parts]
        down = loader.whole(f"{name}.{low}.low_down", LOW_RANK, width)
        return weights, LowRank(down, torch.cat(ups))

    def narrow(part: str, columns: int, bounds: Bounds) -> tuple[list[Weight], LowRank]:
        """Columns of a tensor and of its pair: the ranks' results are summed."""
        weight = loader.weight_columns(f"{name}.{part}", (width, columns), bounds)
        down = loader.columns(f"{name}.{part}.low_down", (LOW_RANK, columns), bounds)
        return [weight], LowRank(down, loader.whole(f"{name}.{part}.low_up", width, LOW_RANK))

    def projection(weights: list[Weight], low_rank: LowRank) -> Projection:
        return loader.projection(weights, low_rank=low_rank)

    return Layer(
        input_norm=loader.whole(f"{name}.norm_1", width),
        qkv=projection(*wide(qkv, "qkv")),
        o=projection(*narrow("o", q_rows, loader.q_bounds)),
        mlp_norm=loader.whole(f"{name}.norm_2", width),
        gate_up=projection(*wide(mlp, "mlp")),
        down=projection(*narrow("down", inner, loader.mlp_bounds)),
    )

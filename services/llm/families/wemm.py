"""The language model of WeMM-Chat-2k-CN: InternLM2 with a low-rank pair beside each product.

The pairs (PLoRA) are added on the rows of images only.
"""

import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from common.families.wemm import LAYERS, LowRankFacts, low_rank_facts
from services.llm.attention import RotaryTables
from services.llm.batch import Batch
from services.llm.decoder import (
    Decoder,
    Layer,
    LowRank,
    Projection,
    SideBySide,
    rotary_tables,
)
from services.llm.loading import Bounds, ShardLoader

HEAD = "language_model.output.weight"


class Rotary:
    """Rotary tables of positions with one component."""

    def __init__(self, theta: float, head_dim: int, device: torch.device) -> None:
        half = torch.arange(head_dim // 2, device=device).float()
        self._frequencies = theta ** -(2 * half / head_dim)

    def __call__(self, batch: Batch) -> RotaryTables:
        return rotary_tables(batch.positions[0, :, None].float() * self._frequencies)


def load(checkpoint: Checkpoint, loader: ShardLoader) -> Decoder:
    """Return one rank's share of the decoder.

    Raises BadCheckpoint if config.json lacks a value.
    """
    sizes = loader.sizes
    given = checkpoint.text_config
    if missing := [name for name in ("rms_norm_eps", "rope_theta") if name not in given]:
        raise BadCheckpoint(f"{checkpoint.path}: config.json lacks {', '.join(missing)}")
    pairs = low_rank_facts(checkpoint)
    lookup, head = loader.vocabulary(checkpoint.family.embedding_name, HEAD)
    return Decoder(
        sizes=sizes,
        norm_eps=given["rms_norm_eps"],
        dtype=loader.dtype,
        device=loader.device,
        shard=loader.shard,
        rows_of_vocabulary=lookup,
        layers=[LayerLoader(loader, i, pairs).load() for i in range(sizes.num_layers)],
        norm=loader.whole("language_model.model.norm.weight", sizes.hidden_size),
        head=head,
        rotary=Rotary(given["rope_theta"], sizes.head_dim, loader.device),
        num_bytes_read=loader.num_bytes_read,
    )


class LayerLoader:
    """Loads one rank's share of a layer."""

    def __init__(self, loader: ShardLoader, index: int, pairs: LowRankFacts) -> None:
        self._loader = loader
        self._name = f"{LAYERS}.{index}"
        self._pairs = pairs

    def load(self) -> Layer:
        loader = self._loader
        sizes = loader.sizes
        q_rows = sizes.num_heads * sizes.head_dim
        return Layer(
            input_norm=loader.whole(f"{self._name}.attention_norm.weight", sizes.hidden_size),
            qkv=self._qkv(),
            o=self._by_columns("attention.wo", q_rows, loader.q_bounds),
            mlp_norm=loader.whole(f"{self._name}.ffn_norm.weight", sizes.hidden_size),
            gate_up=self._gate_up(),
            down=self._by_columns("feed_forward.w2", sizes.intermediate_size, loader.mlp_bounds),
        )

    def _qkv(self) -> Projection:
        """Every rank has A whole, and the rows of B that belong to its rows of the weight."""
        name = "attention.wqkv"
        hidden = self._loader.sizes.hidden_size
        weights = [
            self._loader.weight_rows(
                f"{self._name}.{name}.weight", (self._qkv_rows, hidden), bounds
            )
            for bounds in self._heads()
        ]
        rank = self._pairs.rank
        ups = [
            self._loader.rows(f"{self._name}.{name}.Plora_B.weight", (self._qkv_rows, rank), bounds)
            for bounds in self._heads()
        ]
        up = torch.cat(ups) * self._pairs.scale
        return self._loader.projection(weights, low_rank=LowRank(self._whole_a(name), up))

    @property
    def _qkv_rows(self) -> int:
        """The rows of all heads in the file."""
        sizes = self._loader.sizes
        return (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim

    def _heads(self) -> list[Bounds]:
        """Return this rank's rows of query heads, then key heads, then value heads.

        The file has groups: some query heads, then the key head and the value head that they share.
        """
        sizes = self._loader.sizes
        shard = self._loader.shard
        group = sizes.num_heads // sizes.num_kv_heads
        first, last = shard.split(sizes.num_heads)
        kv_heads = range(*shard.split_kv_heads(sizes.num_kv_heads))

        def rows(kv_head: int, begin: int, end: int) -> Bounds:
            """Return the rows of some heads of a group."""
            start = kv_head * (group + 2)
            return Bounds(*(sizes.head_dim * (start + i) for i in (begin, end)))

        queries = [
            rows(i, max(first - i * group, 0), min(last - i * group, group)) for i in kv_heads
        ]
        keys = [rows(i, group, group + 1) for i in kv_heads]
        values = [rows(i, group + 1, group + 2) for i in kv_heads]
        return [*queries, *keys, *values]

    def _gate_up(self) -> Projection:
        """Gate and up have a pair each. Every rank has A whole, and its rows of B."""
        sizes = self._loader.sizes
        bounds = self._loader.mlp_bounds
        parts = ("feed_forward.w1", "feed_forward.w3")
        weights = [
            self._loader.weight_rows(
                f"{self._name}.{part}.weight", (sizes.intermediate_size, sizes.hidden_size), bounds
            )
            for part in parts
        ]
        ups = [
            self._loader.rows(
                f"{self._name}.{part}.Plora_B.weight",
                (sizes.intermediate_size, self._pairs.rank),
                bounds,
            )
            for part in parts
        ]
        pairs = [
            LowRank(self._whole_a(part), up * self._pairs.scale)
            for part, up in zip(parts, ups, strict=True)
        ]
        return self._loader.projection(weights, low_rank=SideBySide(tuple(pairs)))

    def _by_columns(self, part: str, num_inputs: int, bounds: Bounds) -> Projection:
        """Every rank has the columns of A that belong to its columns of the weight, and B whole.

        The pair's results are parts of a sum, as those of the weight are.
        """
        hidden = self._loader.sizes.hidden_size
        rank = self._pairs.rank
        name = f"{self._name}.{part}"
        weight = self._loader.weight_columns(f"{name}.weight", (hidden, num_inputs), bounds)
        down = self._loader.columns(f"{name}.Plora_A.weight", (rank, num_inputs), bounds)
        up = self._loader.whole(f"{name}.Plora_B.weight", hidden, rank) * self._pairs.scale
        return self._loader.projection([weight], low_rank=LowRank(down, up))

    def _whole_a(self, part: str) -> Tensor:
        hidden = self._loader.sizes.hidden_size
        return self._loader.whole(f"{self._name}.{part}.Plora_A.weight", self._pairs.rank, hidden)

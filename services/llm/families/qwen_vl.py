"""The language model of Qwen-VL: a decoder with dynamic NTK and logn attention.

Both make contexts possible that are longer than those of the training. Dynamic NTK stretches the
rotary base by the length of the prompt. Logn attention scales the queries of late tokens up.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from common.families.qwen_vl import seq_length
from compute.quantized_weights import Weight
from services.llm.attention import RotaryTables
from services.llm.batch import Batch
from services.llm.decoder import Decoder, Layer, rotary_tables
from services.llm.loading import Bounds, RankBounds, ShardLoader
from services.llm.lora_weights import Columns, LoraTarget, Rows

PREFIX = "transformer"
SUPPORTED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}
"""The only values that these keys of config.json may have."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """What config.json says about the language model besides its sizes."""

    norm_eps: float
    rotary_base: float
    seq_length: int
    """The context of the training."""
    scales_queries: bool
    """Whether the model has logn attention."""
    tied: bool
    """Whether embedding and head share their weights."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "TextConfig":
        """Raises BadCheckpoint if a value is missing or not supported."""
        given = checkpoint.config
        for name, supported in SUPPORTED.items():
            if given.get(name, supported) != supported:
                raise BadCheckpoint(
                    f"{checkpoint.path}: {name} is {given[name]} in config.json, only {supported} "
                    "is supported"
                )
        try:
            return cls(
                norm_eps=given["layer_norm_epsilon"],
                rotary_base=given["rotary_emb_base"],
                seq_length=seq_length(checkpoint),
                scales_queries=bool(given["use_logn_attn"]),
                tied=bool(given.get("tie_word_embeddings")),
            )
        except KeyError as e:
            raise BadCheckpoint(f"{checkpoint.path}: config.json lacks {e}") from e


class DynamicNtk:
    """Rotary tables whose base the rope parameter of a sequence stretches."""

    def __init__(self, base: float, head_dim: int, device: torch.device) -> None:
        half = torch.arange(head_dim // 2, device=device).float()
        self._exponents = -2 * half / head_dim
        self._base = base
        self._stretch = head_dim / (head_dim - 2)

    def __call__(self, batch: Batch) -> RotaryTables:
        alpha = batch.rope_parameters.clamp_min(1).float()
        bases = self._base * alpha[:, None] ** self._stretch
        return rotary_tables(batch.positions[0, :, None].float() * bases**self._exponents)


class LognScale:
    """The factor of a token's queries: the logarithm of its place, to the base of `seq_length`.

    It is 1 for the first `seq_length` tokens.
    """

    def __init__(self, seq_length: int) -> None:
        self._log = math.log(seq_length)

    def __call__(self, batch: Batch) -> Tensor:
        return ((batch.positions[0] + 1).float().log() / self._log).clamp_min(1)


def load(checkpoint: Checkpoint, loader: ShardLoader) -> Decoder:
    """Return one rank's share of the decoder."""
    config = TextConfig.of(checkpoint)
    sizes = loader.sizes
    head_name = None if config.tied else "lm_head.weight"
    lookup, head = loader.vocabulary(checkpoint.family.embedding_name, head_name)
    return Decoder(
        sizes=sizes,
        norm_eps=config.norm_eps,
        dtype=loader.dtype,
        device=loader.device,
        shard=loader.shard,
        rows_of_vocabulary=lookup,
        layers=[load_layer(loader, f"{PREFIX}.h.{i}") for i in range(sizes.num_layers)],
        norm=loader.whole(f"{PREFIX}.ln_f.weight", sizes.hidden_size),
        head=head,
        rotary=DynamicNtk(config.rotary_base, sizes.head_dim, loader.device),
        query_scale=LognScale(config.seq_length) if config.scales_queries else None,
        num_bytes_read=loader.num_bytes_read,
    )


def load_layer(loader: ShardLoader, name: str) -> Layer:
    sizes = loader.sizes
    hidden = sizes.hidden_size
    inner = sizes.intermediate_size
    q_rows = sizes.num_heads * sizes.head_dim
    # Unlike the names suggest, w2 is the gate.
    gate_up = [
        loader.weight_rows(f"{name}.mlp.{part}.weight", (inner, hidden), loader.mlp_bounds)
        for part in ("w2", "w1")
    ]
    down = loader.weight_columns(f"{name}.mlp.c_proj.weight", (hidden, inner), loader.mlp_bounds)
    o = loader.weight_columns(f"{name}.attn.c_proj.weight", (hidden, q_rows), loader.q_bounds)
    return Layer(
        input_norm=loader.whole(f"{name}.ln_1.weight", hidden),
        qkv=loader.projection(*load_qkv(loader, f"{name}.attn.c_attn")),
        o=loader.projection([o]),
        mlp_norm=loader.whole(f"{name}.ln_2.weight", hidden),
        gate_up=loader.projection(gate_up),
        down=loader.projection([down]),
    )


def lora_targets(bounds: RankBounds) -> dict[str, LoraTarget]:
    """Return where a rank adds the pairs of an adapter, by the modules of a layer."""
    mlp = bounds.mlp_bounds
    return {
        "attn.c_attn": Rows("qkv", tuple(qkv_blocks(bounds))),
        "attn.c_proj": Columns("o", bounds.q_bounds),
        "mlp.w2": Rows("gate_up", (mlp,)),
        "mlp.w1": Rows("gate_up", (mlp,), mlp.length),
        "mlp.c_proj": Columns("down", mlp),
    }


def qkv_blocks(bounds: RankBounds) -> list[Bounds]:
    """Return a rank's query, key and value rows, which are three blocks of one tensor."""
    rows = bounds.sizes.num_heads * bounds.sizes.head_dim
    first, last, _ = bounds.q_bounds
    return [Bounds(block * rows + first, block * rows + last) for block in range(3)]


def load_qkv(loader: ShardLoader, name: str) -> tuple[list[Weight], Tensor]:
    """Return this rank's query, key and value rows, and one bias of all."""
    sizes = loader.sizes
    rows = sizes.num_heads * sizes.head_dim
    blocks = qkv_blocks(loader)
    weights = [
        loader.weight_rows(f"{name}.weight", (3 * rows, sizes.hidden_size), bounds)
        for bounds in blocks
    ]
    biases = [loader.rows(f"{name}.bias", (3 * rows,), bounds) for bounds in blocks]
    return weights, torch.cat(biases)

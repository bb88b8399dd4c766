"""The language model of Qwen2.5-VL: Qwen2's decoder with M-RoPE."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from common.families.qwen2_5_vl import HEAD, is_tied
from compute.quantized_weights import Weight
from services.llm.attention import RotaryTables
from services.llm.batch import Batch
from services.llm.decoder import Decoder, Layer, rotary_tables
from services.llm.loading import RankBounds, ShardLoader
from services.llm.lora_weights import Columns, LoraTarget, Rows

PREFIX = "model.language_model"


@dataclass(frozen=True, slots=True)
class TextConfig:
    """What config.json says about the language model besides its sizes."""

    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """The frequencies that turn by the time, the height and the width index."""
    tied: bool
    """Whether embedding and head share their weights."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "TextConfig":
        """Raises BadCheckpoint if a value is missing or not supported."""
        given = checkpoint.text_config
        try:
            rope = given.get("rope_parameters") or given["rope_scaling"]
            config = cls._read(given, rope, is_tied(checkpoint))
        except KeyError as e:
            raise BadCheckpoint(f"{checkpoint.path}: config.json lacks {e}") from e
        except BadCheckpoint:
            raise
        except (AttributeError, TypeError, ValueError) as e:
            raise BadCheckpoint(
                f"{checkpoint.path}: mrope_section in config.json is not three counts, or "
                "rms_norm_eps or rope_theta is no number"
            ) from e
        head_dim = checkpoint.sizes.head_dim
        if 2 * sum(config.mrope_section) != head_dim:
            raise BadCheckpoint(
                f"{checkpoint.path}: mrope_section {config.mrope_section} does not fill heads of "
                f"{head_dim}"
            )
        if given.get("use_sliding_window"):
            raise BadCheckpoint(f"{checkpoint.path}: sliding-window attention is not supported")
        return config

    @classmethod
    def _read(cls, given: dict[str, Any], rope: dict[str, Any], tied: bool) -> "TextConfig":
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "mrope"):
            raise BadCheckpoint(f"rope of type {kind!r} is not supported")
        time, height, width = rope["mrope_section"]
        return cls(
            norm_eps=given["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or given["rope_theta"],
            mrope_section=(time, height, width),
            tied=tied,
        )


class MRope:
    """Rotary tables of positions with three components: time, height and width."""

    def __init__(self, config: TextConfig, head_dim: int, device: torch.device) -> None:
        half = torch.arange(head_dim // 2, device=device).float()
        self._frequencies = config.rope_theta ** -(2 * half / head_dim)
        sections = torch.tensor(config.mrope_section)
        # The component of a position that turns each frequency.
        self._components = torch.arange(3).repeat_interleave(sections).to(device)

    def __call__(self, batch: Batch) -> RotaryTables:
        return rotary_tables(batch.positions[self._components].T.float() * self._frequencies)


def load(checkpoint: Checkpoint, loader: ShardLoader) -> Decoder:
    """Return one rank's share of the decoder."""
    config = TextConfig.of(checkpoint)
    sizes = loader.sizes
    embedding_name = checkpoint.family.embedding_name
    lookup, head = loader.vocabulary(embedding_name, None if config.tied else HEAD)
    return Decoder(
        sizes=sizes,
        norm_eps=config.norm_eps,
        dtype=loader.dtype,
        device=loader.device,
        shard=loader.shard,
        rows_of_vocabulary=lookup,
        layers=[load_layer(loader, f"{PREFIX}.layers.{i}") for i in range(sizes.num_layers)],
        norm=loader.whole(f"{PREFIX}.norm.weight", sizes.hidden_size),
        head=head,
        rotary=MRope(config, sizes.head_dim, loader.device),
        num_bytes_read=loader.num_bytes_read,
    )


def load_layer(loader: ShardLoader, name: str) -> Layer:
    sizes = loader.sizes
    hidden = sizes.hidden_size
    inner = sizes.intermediate_size
    q_rows = sizes.num_heads * sizes.head_dim
    gate_up = [
        loader.weight_rows(f"{name}.mlp.{part}_proj.weight", (inner, hidden), loader.mlp_bounds)
        for part in ("gate", "up")
    ]
    down = loader.weight_columns(f"{name}.mlp.down_proj.weight", (hidden, inner), loader.mlp_bounds)
    o = loader.weight_columns(f"{name}.self_attn.o_proj.weight", (hidden, q_rows), loader.q_bounds)
    return Layer(
        input_norm=loader.whole(f"{name}.input_layernorm.weight", hidden),
        qkv=loader.projection(*load_qkv(loader, f"{name}.self_attn")),
        o=loader.projection([o]),
        mlp_norm=loader.whole(f"{name}.post_attention_layernorm.weight", hidden),
        gate_up=loader.projection(gate_up),
        down=loader.projection([down]),
    )


def lora_targets(bounds: RankBounds) -> dict[str, LoraTarget]:
    """Return where a rank adds the pairs of an adapter, by the modules of a layer."""
    q = bounds.q_bounds
    kv = bounds.kv_bounds
    mlp = bounds.mlp_bounds
    return {
        "self_attn.q_proj": Rows("qkv", (q,)),
        "self_attn.k_proj": Rows("qkv", (kv,), q.length),
        "self_attn.v_proj": Rows("qkv", (kv,), q.length + kv.length),
        "self_attn.o_proj": Columns("o", q),
        "mlp.gate_proj": Rows("gate_up", (mlp,)),
        "mlp.up_proj": Rows("gate_up", (mlp,), mlp.length),
        "mlp.down_proj": Columns("down", mlp),
    }


def load_qkv(loader: ShardLoader, name: str) -> tuple[list[Weight], Tensor]:
    """Return this rank's query, key and value rows, and one bias of all."""
    sizes = loader.sizes
    q_rows = sizes.num_heads * sizes.head_dim
    kv_rows = sizes.num_kv_heads * sizes.head_dim
    parts = (
        ("q", q_rows, loader.q_bounds),
        ("k", kv_rows, loader.kv_bounds),
        ("v", kv_rows, loader.kv_bounds),
    )
    weights = [
        loader.weight_rows(f"{name}.{part}_proj.weight", (rows, sizes.hidden_size), bounds)
        for part, rows, bounds in parts
    ]
    biases = [
        loader.rows(f"{name}.{part}_proj.bias", (rows,), bounds) for part, rows, bounds in parts
    ]
    return weights, torch.cat(biases)

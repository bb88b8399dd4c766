"""The language model of Qwen2.5-VL."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from common.sizing import TP_SIZES, is_divisible
from compute.kernels.operations import PackedWeights, rms_norm, rotate, silu_mul
from compute.linear import Linear
from compute.quantization import Int8Linear
from compute.weights import Weights
from services.llm.attention import StepAttention
from services.llm.parallel import Shard


@dataclass(frozen=True, slots=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tied: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "TextConfig":
        given = checkpoint.text_config
        try:
            config = cls._read(given, given.get("rope_parameters") or given["rope_scaling"])
        except KeyError as e:
            raise BadCheckpoint(f"{checkpoint.path}: config.json lacks {e}") from e
        if 2 * sum(config.mrope_section) != config.head_dim:
            raise BadCheckpoint(
                f"{checkpoint.path}: mrope_section {config.mrope_section} does not fill heads of "
                f"{config.head_dim}"
            )
        if given.get("use_sliding_window"):
            raise BadCheckpoint(f"{checkpoint.path}: sliding-window attention is not supported")
        return config

    @classmethod
    def _read(cls, given: dict[str, Any], rope: dict[str, Any]) -> "TextConfig":
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in ("default", "mrope"):
            raise BadCheckpoint(f"rope of type {kind!r} is not supported")
        time, height, width = rope["mrope_section"]
        return cls(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_layers=given["num_hidden_layers"],
            num_heads=given["num_attention_heads"],
            num_kv_heads=given["num_key_value_heads"],
            head_dim=given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
            norm_eps=given["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or given["rope_theta"],
            mrope_section=(time, height, width),
            tied=given.get("tie_word_embeddings", False),
        )

    def is_divisible(self, world_size: int) -> bool:
        return is_divisible(
            (self.num_heads, self.intermediate_size, self.vocab_size), self.num_kv_heads, world_size
        )

    def check_divisible(self, world_size: int) -> None:
        if not self.is_divisible(world_size):
            fitting = ", ".join(str(n) for n in TP_SIZES if self.is_divisible(n))
            raise BadCheckpoint(
                f"{self.num_heads} heads, {self.num_kv_heads} key heads, an MLP of "
                f"{self.intermediate_size} and a vocabulary of "
                f"{self.vocab_size} cannot be shared by {world_size} ranks: use --tp {fitting}"
            )


class Product(Protocol):
    @property
    def packed(self) -> PackedWeights | None: ...

    @property
    def max_kernel_rows(self) -> int: ...

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: Tensor
    qkv: Product
    o: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class LanguageModel:
    """A rank's share of the decoder: of the heads, of the MLP, and of the vocabulary's rows in
    embedding and head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = Shard(),
        progress: Callable[[float], None] = lambda fraction: None,
        quantization: str = "none",
    ) -> None:
        self.config = TextConfig.of(checkpoint)
        self.config.check_divisible(shard.world_size)
        self.dtype = dtype
        self.device = device
        self.shard = shard
        self._product: Callable[..., Product] = Int8Linear if quantization == "int8" else Linear
        self._q_heads = shard.split(self.config.num_heads)
        self._kv_heads = shard.split_kv_heads(self.config.num_kv_heads)
        weights = Weights(checkpoint, ("model.language_model.", "lm_head."), progress)
        self._vocabulary = shard.split(self.config.vocab_size)
        embedding = self._load_vocabulary(weights, "model.language_model.embed_tokens.weight")
        self.layers = [self._load_layer(weights, i) for i in range(self.config.num_layers)]
        self.norm = self._load_norm(weights, "norm.weight")
        self.head = Linear(
            embedding if self.config.tied else self._load_vocabulary(weights, "lm_head.weight")
        )
        # Where the kernels have laid out the head's weights, these are the embedding, too: a
        # vocabulary is large.
        tied = self.head.packed if self.config.tied else None
        self._rows_of_vocabulary = tied.rows if tied else partial(F.embedding, weight=embedding)
        self.num_bytes_read = weights.num_bytes_read
        half = torch.arange(self.config.head_dim // 2, device=device).float()
        self._frequencies = self.config.rope_theta ** -(2 * half / self.config.head_dim)
        # Which of a position's three components turns each frequency.
        self._components = (
            torch.arange(3).repeat_interleave(torch.tensor(self.config.mrope_section)).to(device)
        )

    @property
    def num_local_heads(self) -> int:
        return self._q_heads[1] - self._q_heads[0]

    @property
    def num_local_kv_heads(self) -> int:
        return self._kv_heads[1] - self._kv_heads[0]

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """[T, hidden]. An id outside the vocabulary is that of a placeholder, whose row is replaced
        later."""
        first, last = self._vocabulary
        local_ids_T = token_ids_T - first
        x = self._rows_of_vocabulary(local_ids_T.clamp(0, last - first - 1))
        if self.shard.world_size == 1:
            return x
        x[(local_ids_T < 0) | (local_ids_T >= last - first)] = 0
        return self.shard.all_reduce(x)

    def forward(
        self,
        x: Tensor,
        positions_3T: Tensor,
        attention: StepAttention,
        kv_cache: Tensor,
        sampled_rows: Tensor,
    ) -> Tensor:
        """[T, hidden] -> float32 logits [num_sampled, vocab_size]; `kv_cache` is [num_layers, 2,
        num_blocks, block_size, K, D]."""
        cos, signed_sin = self.rotary_tables(positions_3T)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            attended = self._attend(layer, x, cos, signed_sin, attention, cache)
            if layer is self.layers[-1]:
                # Nothing reads the other rows any more.
                x = x[sampled_rows]
                attended = attended[sampled_rows]
            x = self._add_product(x, layer.o, attended)
            x = self._add_product(
                x, layer.down, silu_mul(layer.gate_up(self._normalise(x, layer.mlp_norm)))
            )
        return self.shard.all_gather(self.head(self._normalise(x, self.norm)).float())

    def _attend(
        self,
        layer: Layer,
        x: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        attention: StepAttention,
        cache: Tensor,
    ) -> Tensor:
        """[T, hidden] -> [T, local heads * head_dim]."""
        num_q = self.num_local_heads
        num_kv = self.num_local_kv_heads
        qkv = layer.qkv(self._normalise(x, layer.input_norm)).view(
            len(x), num_q + 2 * num_kv, self.config.head_dim
        )
        rotate(qkv, num_q + num_kv, cos, signed_sin)
        return attention.run(
            qkv[:, :num_q], qkv[:, num_q : num_q + num_kv], qkv[:, num_q + num_kv :], cache
        )

    def _add_product(self, x: Tensor, linear: Product, part: Tensor) -> Tensor:
        """x and the sum of the ranks' products."""
        if self.shard.world_size == 1:
            return linear(part, residual=x)
        return x + self.shard.all_reduce(linear(part))

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.norm_eps)

    def rotary_tables(self, positions_3T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, float32 [T, head_dim]: the first half of the sines is negated
        for `rotate`."""
        angles = positions_3T[self._components].T.float() * self._frequencies
        cos = angles.cos()
        sin = angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def _load_layer(self, weights: Weights, index: int) -> Layer:
        name = f"layers.{index}"
        hidden = self.config.hidden_size
        q_rows = self.config.num_heads * self.config.head_dim
        kv_rows = self.config.num_kv_heads * self.config.head_dim
        inner = self.config.intermediate_size
        q_part, kv_part = (
            (first * self.config.head_dim, last * self.config.head_dim)
            for first, last in (self._q_heads, self._kv_heads)
        )
        inner_part = self.shard.split(inner)
        qkv = (("q", q_rows, q_part), ("k", kv_rows, kv_part), ("v", kv_rows, kv_part))

        def part(tensor: str, shape: tuple[int, ...], dim: int, bounds: tuple[int, int]) -> Tensor:
            start, stop = bounds
            return weights.slice(
                f"model.language_model.{name}.{tensor}",
                shape,
                dim,
                start,
                stop,
                self.dtype,
                self.device,
            )

        return Layer(
            input_norm=self._load_norm(weights, f"{name}.input_layernorm.weight"),
            qkv=self._product(
                torch.cat(
                    [
                        part(f"self_attn.{x}_proj.weight", (rows, hidden), 0, bounds)
                        for x, rows, bounds in qkv
                    ]
                ),
                torch.cat(
                    [
                        part(f"self_attn.{x}_proj.bias", (rows,), 0, bounds)
                        for x, rows, bounds in qkv
                    ]
                ),
            ),
            o=self._product(part("self_attn.o_proj.weight", (hidden, q_rows), 1, q_part)),
            mlp_norm=self._load_norm(weights, f"{name}.post_attention_layernorm.weight"),
            gate_up=self._product(
                torch.cat(
                    [
                        part(f"mlp.{x}_proj.weight", (inner, hidden), 0, inner_part)
                        for x in ("gate", "up")
                    ]
                )
            ),
            down=self._product(part("mlp.down_proj.weight", (hidden, inner), 1, inner_part)),
        )

    def _load_vocabulary(self, weights: Weights, name: str) -> Tensor:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return weights.slice(name, shape, 0, *self._vocabulary, self.dtype, self.device)

    def _load_norm(self, weights: Weights, name: str) -> Tensor:
        return weights.tensor(
            f"model.language_model.{name}", (self.config.hidden_size,), self.dtype, self.device
        )

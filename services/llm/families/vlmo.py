"""VLMo: one transformer for text and image, whose answer is a label or a vector.

Attention is shared. After it, the tokens of text and image go to experts of their own, in the last
layers to one for both.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import Checkpoint
from common.families import vlmo as family_rules
from common.families.vlmo import BIAS_TABLE, IMAGE_POSITIONS, TEXT_REACH
from compute.kernels.operations import attention, gelu
from compute.layer_norm import LayerNorm
from compute.linear import Linear
from services.llm.loading import Bounds, ShardLoader
from services.llm.parallel import Shard
from services.llm.pooling_model import PooledInput

NORM_EPS = 1e-6
TEXT_NORM_EPS = 1e-12
CLASSIFIER_NORM_EPS = 1e-5
MEAN = STD = 127.5
"""Pixels from 0 to 255 become values from -1 to 1."""
TEXT = "text"
IMAGE = "imag"
JOINT = "vl"


@dataclass(frozen=True, slots=True)
class Split:
    """A product whose inputs are split among the ranks."""

    product: Linear
    bias: Tensor
    """It is added once, to the sum of the ranks' parts."""
    shard: Shard

    def __call__(self, x: Tensor) -> Tensor:
        return self.shard.all_reduce(self.product(x)).add_(self.bias)


@dataclass(frozen=True, slots=True)
class Expert:
    """The second half of a layer: [n, width] -> [n, width]."""

    norm: LayerNorm
    up: Linear
    down: Split

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(self.norm(x))))


@dataclass(frozen=True, slots=True)
class Layer:
    """One rank's share of a layer."""

    norm: LayerNorm
    qkv: Linear
    proj: Split
    experts: dict[str, Expert]
    attention_scale: Tensor | None
    """[width]: what the first half adds is multiplied by it."""
    expert_scale: Tensor | None
    bias: Tensor | None
    """[heads of this rank, num_tokens, num_tokens] for text and image together: what is added to
    the scores. Those for one alone are a part of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """How tokens and patches become the first layer's input."""

    words: Tensor
    word_norm: LayerNorm
    text_offsets: Tensor
    """[text length, width]: added to the words before the norm."""
    text_type: Tensor
    """[width]: added after it."""
    patches: Linear
    class_token: Tensor
    """[1, width]."""
    image_offsets: Tensor
    """[1 + num_patches, width]: added to the image's class token and patches."""

    def text(self, token_ids: Tensor) -> Tensor:
        """int64 [B, text length] -> [B, text length, width]."""
        x = F.embedding(token_ids, self.words) + self.text_offsets
        return self.word_norm(x.flatten(0, 1)).view(x.shape) + self.text_type

    def image(self, patches: Tensor) -> Tensor:
        """uint8 [B, num_patches, values] -> [B, 1 + num_patches, width]."""
        pixels = ((patches.float() - MEAN) / STD).to(self.words.dtype)
        x = self.patches(pixels.flatten(0, 1)).view(*patches.shape[:2], -1)
        first = self.class_token.expand(len(x), 1, -1)
        return torch.cat((first, x), 1) + self.image_offsets


@dataclass(frozen=True, slots=True)
class Classifier:
    """[B, width] -> float32 [B, number of labels]: probabilities."""

    pooler: Linear
    up: Linear
    norm: LayerNorm
    out: Linear

    def __call__(self, x: Tensor, kind: str) -> Tensor:
        pooled = self.pooler(x).tanh()
        return self.out(gelu(self.norm(self.up(pooled)))).float().softmax(-1)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """[B, width] of texts or of images -> float32 [B, width]: vectors of length 1."""

    projections: dict[str, Linear]

    def __call__(self, x: Tensor, kind: str) -> Tensor:
        return F.normalize(self.projections[kind](x).float(), dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Vlmo:
    """One rank's share of the model. Implements `PoolingModel`."""

    dtype: torch.dtype
    device: torch.device
    shard: Shard
    num_bytes_read: int
    vocab_size: int
    values_per_patch: int
    num_heads: int
    """Those of this rank."""
    text_len: int
    pad_id: int
    inputs: Inputs
    layers: list[Layer]
    norm: LayerNorm
    head: Classifier | Retrieval

    def pool(self, inputs: Sequence[PooledInput]) -> Tensor:
        """Compute the prompts of one form together."""
        indices = defaultdict(list)
        for index, given in enumerate(inputs):
            indices[self._kind_of(given)].append(index)
        pooled: dict[int, Tensor] = {}
        for kind, members in indices.items():
            found = self._pool_kind(kind, [inputs[index] for index in members])
            pooled |= zip(members, found, strict=True)
        return torch.stack([pooled[index] for index in range(len(inputs))])

    def _kind_of(self, given: PooledInput) -> str:
        if given.patches is None:
            return TEXT
        return IMAGE if len(given.token_ids) == len(given.patches) + 1 else JOINT

    def _pool_kind(self, kind: str, inputs: list[PooledInput]) -> Tensor:
        """Return float32 [len(inputs), n] for prompts of one kind."""
        parts = []
        visible = None
        if kind != IMAGE:
            token_ids = torch.stack([given.token_ids[: self.text_len] for given in inputs])
            parts.append(self.inputs.text(token_ids))
            visible = token_ids != self.pad_id
        if kind != TEXT:
            patches = torch.stack([p for given in inputs if (p := given.patches) is not None])
            parts.append(self.inputs.image(patches))
            if visible is not None:
                visible = F.pad(visible, (0, parts[-1].shape[1]), value=True)
        x = torch.cat(parts, 1)
        shape = x.shape
        x = x.flatten(0, 1)
        for layer in self.layers:
            x = self._run_layer(layer, x, kind, shape[0], visible)
        return self.head(self.norm(x.view(shape)[:, 0]), kind)

    def _run_layer(
        self, layer: Layer, x: Tensor, kind: str, num_seqs: int, visible: Tensor | None
    ) -> Tensor:
        """[num_seqs * num_tokens, width] -> the same."""
        num_tokens = len(x) // num_seqs
        qkv = layer.qkv(layer.norm(x)).view(len(x), 3 * self.num_heads, -1)
        q, k, v = qkv.split(self.num_heads, 1)
        bias = self._bias_of(layer, kind)
        x = add(
            x,
            layer.proj(attention(q, k, v, num_seqs, bias=bias, visible=visible)),
            layer.attention_scale,
        )
        if kind != JOINT or JOINT in layer.experts:
            return add(x, layer.experts[kind](x), layer.expert_scale)
        rows = x.view(num_seqs, num_tokens, -1)
        text = layer.experts[TEXT](rows[:, : self.text_len].flatten(0, 1))
        image = layer.experts[IMAGE](rows[:, self.text_len :].flatten(0, 1))
        both = torch.cat(
            (
                text.view(num_seqs, self.text_len, -1),
                image.view(num_seqs, num_tokens - self.text_len, -1),
            ),
            1,
        )
        return add(x, both.flatten(0, 1), layer.expert_scale)

    def _bias_of(self, layer: Layer, kind: str) -> Tensor | None:
        if layer.bias is None or kind == JOINT:
            return layer.bias
        part = slice(self.text_len) if kind == TEXT else slice(self.text_len, None)
        return layer.bias[:, part, part]


def add(x: Tensor, part: Tensor, scale: Tensor | None) -> Tensor:
    return x + part if scale is None else torch.addcmul(x, part, scale)


def pieces(name: str, shape: tuple[int, ...], shard: Shard) -> list[tuple[int, int, int]]:
    """Return (dimension, first, last) of the pieces of a tensor that are a rank's.

    There are none if it needs the whole tensor. Queries, keys and values stand one after the other,
    and ranks share each.
    """
    dim = family_rules.cut_dim(name)
    if dim is None:
        return []
    num_blocks = 3 if name.endswith("qkv.weight") else 1
    block = shape[dim] // num_blocks
    first, last = shard.split(block)
    return [(dim, block * i + first, block * i + last) for i in range(num_blocks)]


def load(checkpoint: Checkpoint, loader: ShardLoader) -> Vlmo:
    """Return one rank's share of the model."""
    sizes = loader.sizes
    text_len = family_rules.max_text_len(checkpoint)
    side = family_rules.grid_side(checkpoint)
    first, last = loader.shard.split(sizes.num_heads)
    biases = load_biases(checkpoint, loader, text_len, side)
    layers = [load_layer(checkpoint, loader, i, biases[i]) for i in range(sizes.num_layers)]
    return Vlmo(
        dtype=loader.dtype,
        device=loader.device,
        shard=loader.shard,
        vocab_size=sizes.vocab_size,
        values_per_patch=checkpoint.family.values_per_patch(checkpoint),
        num_heads=last - first,
        text_len=text_len,
        pad_id=family_rules.special_id(checkpoint, "[PAD]"),
        inputs=load_inputs(checkpoint, loader, text_len, side),
        layers=layers,
        norm=load_norm(loader, "transformer.norm", sizes.hidden_size),
        head=load_head(checkpoint, loader),
        num_bytes_read=loader.num_bytes_read,
    )


def load_norm(loader: ShardLoader, name: str, width: int, eps: float = NORM_EPS) -> LayerNorm:
    weight, bias = (loader.whole(f"{name}.{part}", width) for part in ("weight", "bias"))
    return LayerNorm(weight, bias, eps)


def load_linear(loader: ShardLoader, name: str, rows: int, columns: int) -> Linear:
    """Return a product that every rank holds whole."""
    return Linear(loader.whole(f"{name}.weight", rows, columns), loader.whole(f"{name}.bias", rows))


def load_split(loader: ShardLoader, name: str, rows: int, columns: int, bounds: Bounds) -> Split:
    product = Linear(loader.columns(f"{name}.weight", (rows, columns), bounds))
    return Split(product, loader.whole(f"{name}.bias", rows), loader.shard)


def load_inputs(checkpoint: Checkpoint, loader: ShardLoader, text_len: int, side: int) -> Inputs:
    width = loader.sizes.hidden_size
    patch = family_rules.patch_size(checkpoint)
    types = loader.whole("token_type_embeddings.weight", 2, width)
    text_types = loader.whole("text_embeddings.token_type_embeddings.weight", 2, width)
    text_offsets = text_types[:1].expand(text_len, -1)
    image_offsets = types[1:].expand(1 + side**2, -1)
    if family_rules.has_absolute_positions(checkpoint):
        name = "text_embeddings.position_embeddings.weight"
        text_offsets = text_offsets + loader.whole(name, text_len, width)
        image_offsets = image_offsets + loader.whole(IMAGE_POSITIONS, 1, 1 + side**2, width)[0]
    weight = loader.whole("transformer.patch_embed.proj.weight", width, 3, patch, patch)
    return Inputs(
        words=loader.whole(checkpoint.family.embedding_name, loader.sizes.vocab_size, width),
        word_norm=load_norm(loader, "text_embeddings.LayerNorm", width, TEXT_NORM_EPS),
        text_offsets=text_offsets,
        text_type=types[0],
        patches=Linear(weight.flatten(1), loader.whole("transformer.patch_embed.proj.bias", width)),
        class_token=loader.whole("transformer.cls_token", 1, 1, width)[0],
        image_offsets=image_offsets,
    )


def load_layer(
    checkpoint: Checkpoint, loader: ShardLoader, index: int, bias: Tensor | None
) -> Layer:
    width = loader.sizes.hidden_size
    name = f"transformer.blocks.{index}"
    names = checkpoint.tensors
    kinds = [kind for kind in (TEXT, IMAGE, JOINT) if f"{name}.mlp_{kind}.fc1.weight" in names]
    scales = [
        loader.whole(gamma, width) if (gamma := f"{name}.gamma_{i}") in names else None
        for i in (1, 2)
    ]
    return Layer(
        norm=load_norm(loader, f"{name}.norm1", width),
        qkv=load_qkv(loader, f"{name}.attn"),
        proj=load_split(loader, f"{name}.attn.proj", width, width, loader.q_bounds),
        experts={kind: load_expert(loader, name, kind) for kind in kinds},
        attention_scale=scales[0],
        expert_scale=scales[1],
        bias=bias,
    )


def load_qkv(loader: ShardLoader, name: str) -> Linear:
    """Return this rank's query, key and value rows. Keys have no bias."""
    width = loader.sizes.hidden_size
    first, last, _ = loader.q_bounds
    weights = [
        loader.rows(
            f"{name}.qkv.weight",
            (3 * width, width),
            Bounds(part * width + first, part * width + last),
        )
        for part in range(3)
    ]
    q_bias, v_bias = (
        loader.rows(f"{name}.{part}", (width,), loader.q_bounds) for part in ("q_bias", "v_bias")
    )
    return Linear(torch.cat(weights), torch.cat((q_bias, torch.zeros_like(q_bias), v_bias)))


def load_expert(loader: ShardLoader, layer: str, kind: str) -> Expert:
    width = loader.sizes.hidden_size
    inner = loader.sizes.intermediate_size
    name = f"{layer}.mlp_{kind}"
    up = Linear(
        loader.rows(f"{name}.fc1.weight", (inner, width), loader.mlp_bounds),
        loader.rows(f"{name}.fc1.bias", (inner,), loader.mlp_bounds),
    )
    return Expert(
        norm=load_norm(loader, f"{layer}.norm2_{kind}", width),
        up=up,
        down=load_split(loader, f"{name}.fc2", width, inner, loader.mlp_bounds),
    )


def load_head(checkpoint: Checkpoint, loader: ShardLoader) -> Classifier | Retrieval:
    width = loader.sizes.hidden_size
    if "embed" in checkpoint.family.tasks_of(checkpoint):
        names = {TEXT: "itc_text_proj.fc.weight", IMAGE: "itc_image_proj.fc.weight"}
        return Retrieval(
            {kind: Linear(loader.whole(name, width, width)) for kind, name in names.items()}
        )
    name = "vqa_classifier"
    return Classifier(
        pooler=load_linear(loader, "pooler.dense", width, width),
        up=load_linear(loader, f"{name}.0", 2 * width, width),
        norm=load_norm(loader, f"{name}.1", 2 * width, CLASSIFIER_NORM_EPS),
        out=load_linear(loader, f"{name}.3", len(family_rules.labels(checkpoint)), 2 * width),
    )


def load_biases(
    checkpoint: Checkpoint, loader: ShardLoader, text_len: int, side: int
) -> list[Tensor | None]:
    """Return what each layer adds to the scores of this rank's heads."""
    sizes = loader.sizes
    if BIAS_TABLE not in checkpoint.tensors:
        return [None] * sizes.num_layers
    shape = family_rules.shape_of(checkpoint, BIAS_TABLE)
    table = loader.whole(BIAS_TABLE, *shape)
    index = joint_index(text_len, side).to(loader.device)
    first, last = loader.shard.split(sizes.num_heads)
    return [
        table[:, i * sizes.num_heads + first : i * sizes.num_heads + last].T[:, index].contiguous()
        for i in range(sizes.num_layers)
    ]


def joint_index(text_len: int, side: int) -> Tensor:
    """Return the entry of the bias table for each (query, key), int64 [num_tokens, num_tokens].

    Text comes first, then the image's class token and its patches in raster order. The entries are
    those of pairs of patches by their distance, three for the image's class token, two for pairs of
    text and image, those of pairs of words by their distance, and three for the first word.
    """
    image = image_index(side)
    num_image_entries = (2 * side - 1) ** 2 + family_rules.IMAGE_ROLES
    numbers = count(num_image_entries)
    index = torch.empty(text_len + len(image), text_len + len(image), dtype=torch.int64)
    index[:text_len, text_len:] = next(numbers)
    index[text_len:, :text_len] = next(numbers)
    index[text_len:, text_len:] = image
    places = torch.arange(text_len)
    words = num_image_entries + 2 + (places - places[:, None]) + TEXT_REACH - 2
    end = num_image_entries + 2 + 2 * TEXT_REACH
    index[:text_len, :text_len] = with_class_token(words[1:, 1:], end - 3)
    return index


def image_index(side: int) -> Tensor:
    """Return the same for an image alone, int64 [1 + side**2, 1 + side**2]."""
    span = 2 * side - 1
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows + side - 1
    right = columns[:, None] - columns + side - 1
    return with_class_token(down * span + right, span**2)


def with_class_token(index: Tensor, entry: int) -> Tensor:
    """Put a token in front, with entries of its own as query, as key, and of itself."""
    whole = F.pad(index, (1, 0, 1, 0))
    whole[0] = entry
    whole[:, 0] = entry + 1
    whole[0, 0] = entry + 2
    return whole

"""The reference of VLMo, written from its published structure: one text, one image, or both."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.checkpoint import Checkpoint
from common.families import vlmo as description
from common.vocabulary import open_vocabulary
from services.commands.verification.mathematics import (
    HALF,
    attended,
    layer_norm,
    linear,
    normalised,
)
from services.commands.verification.questions import Question, read_rgb
from services.commands.verification.reference import PixelLimits, PoolingReference
from services.commands.verification.weights import Float32Weights

EPS = 1e-6
TEXT_EPS = 1e-12
CLASSIFIER_EPS = 1e-5
TEXT_REACH = 196
"""The relative positions of texts are stored for this length."""


class VlmoReference(PoolingReference):
    """The whole model in float32, one layer after the other."""

    title = "plain code of this family"

    def __init__(self, checkpoint: Checkpoint, limits: PixelLimits) -> None:
        limits.check_unset(checkpoint.family.title)
        self._weights = Float32Weights(checkpoint)
        self._vocabulary = open_vocabulary(checkpoint)
        self._sizes = checkpoint.sizes
        self._text_len = description.max_text_len(checkpoint)
        self._side = description.grid_side(checkpoint)
        self._patch = description.patch_size(checkpoint)
        self._begin, self._end, self._pad = (
            description.special_id(checkpoint, token) for token in ("[CLS]", "[SEP]", "[PAD]")
        )
        self._asks = "classify" in checkpoint.family.tasks_of(checkpoint)

    @torch.inference_mode()
    def pool(self, question: Question) -> np.ndarray:
        parts: list[Tensor] = []
        visible: list[Tensor] = []
        if question.text:
            ids = self.text_ids(question.text)
            parts.append(self._read(ids))
            visible.append(ids != self._pad)
        if question.images:
            parts.append(self._see(question.images[0]))
            visible.append(torch.ones(len(parts[-1]), dtype=torch.bool))
        kinds = ["text"] * bool(question.text) + ["imag"] * bool(question.images)
        x = self._transform(torch.cat(parts), torch.cat(visible), kinds)
        first = layer_norm(self._weights, "transformer.norm", x[:1], EPS)
        return (self._label(first) if self._asks else self._project(first, kinds[0]))[0].numpy()

    def text_ids(self, text: str) -> Tensor:
        """Return a text as ids, cut or padded: int64 [text_len]."""
        ids = self._vocabulary.encode(text, frozenset())[: self._text_len - 2]
        ids = [self._begin, *ids, self._end]
        return torch.tensor(ids + [self._pad] * (self._text_len - len(ids)))

    def _read(self, ids: Tensor) -> Tensor:
        name = "text_embeddings"
        x = self._weights[f"{name}.word_embeddings.weight"][ids]
        x = x + self._weights[f"{name}.token_type_embeddings.weight"][0]
        if "transformer.pos_embed" in self._weights:
            x = x + self._weights[f"{name}.position_embeddings.weight"]
        x = layer_norm(self._weights, f"{name}.LayerNorm", x, TEXT_EPS)
        return x + self._weights["token_type_embeddings.weight"][0]

    def _see(self, image: bytes) -> Tensor:
        """Return the class token and the patches of an image."""
        size = (self._side * self._patch,) * 2
        pixels = read_rgb(image).resize(size, Image.Resampling.BICUBIC)
        patches = F.conv2d(
            normalised(pixels, HALF, HALF)[None],
            self._weights["transformer.patch_embed.proj.weight"],
            self._weights["transformer.patch_embed.proj.bias"],
            stride=self._patch,
        )
        x = torch.cat((self._weights["transformer.cls_token"][0], patches[0].flatten(1).T))
        if "transformer.pos_embed" in self._weights:
            x = x + self._weights["transformer.pos_embed"][0]
        return x + self._weights["token_type_embeddings.weight"][1]

    def _transform(self, x: Tensor, visible: Tensor, kinds: list[str]) -> Tensor:
        """Run all layers on [n, width]. `kinds` says which of text and image there are."""
        biases = self._biases(kinds)
        hidden = torch.zeros(len(x)).masked_fill(~visible, -math.inf)
        for layer in range(self._sizes.num_layers):
            name = f"transformer.blocks.{layer}"
            normed = layer_norm(self._weights, f"{name}.norm1", x, EPS)
            q, k, v = F.linear(normed, self._weights[f"{name}.attn.qkv.weight"]).chunk(3, -1)
            q = q + self._weights[f"{name}.attn.q_bias"]
            v = v + self._weights[f"{name}.attn.v_bias"]
            q, k, v = (part.view(len(x), self._sizes.num_heads, -1) for part in (q, k, v))
            bias = hidden.expand(self._sizes.num_heads, len(x), -1)
            bias = bias if biases is None else bias + biases[layer]
            found = linear(self._weights, f"{name}.attn.proj", attended(q, k, v, bias=bias))
            x = x + self._scaled(f"{name}.gamma_1", found)
            x = x + self._scaled(f"{name}.gamma_2", self._experts(name, x, kinds))
        return x

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        return x * self._weights[name] if name in self._weights else x

    def _experts(self, layer: str, x: Tensor, kinds: list[str]) -> Tensor:
        """Send text and image to an expert each, or both together to that for both."""
        if len(kinds) == 1:
            return self._expert(layer, kinds[0], x)
        if f"{layer}.mlp_vl.fc1.weight" in self._weights:
            return self._expert(layer, "vl", x)
        text, image = x[: self._text_len], x[self._text_len :]
        return torch.cat((self._expert(layer, "text", text), self._expert(layer, "imag", image)))

    def _expert(self, layer: str, kind: str, x: Tensor) -> Tensor:
        normed = layer_norm(self._weights, f"{layer}.norm2_{kind}", x, EPS)
        inner = F.gelu(linear(self._weights, f"{layer}.mlp_{kind}.fc1", normed))
        return linear(self._weights, f"{layer}.mlp_{kind}.fc2", inner)

    def _biases(self, kinds: list[str]) -> Tensor | None:
        """Return what is added to the scores, [layers, heads, n, n]; None if there is nothing."""
        if description.BIAS_TABLE not in self._weights:
            return None
        table = self._weights[description.BIAS_TABLE]
        image = image_entries(self._side)
        num_image = (2 * self._side - 1) ** 2 + 3
        text = text_entries(self._text_len, num_image + 2, len(table))
        if kinds == ["text"]:
            entries = text
        elif kinds == ["imag"]:
            entries = image
        else:
            above = torch.full((len(text), len(image)), num_image)
            below = torch.full((len(image), len(text)), num_image + 1)
            entries = torch.cat((torch.cat((text, above), 1), torch.cat((below, image), 1)))
        return table[entries].permute(2, 0, 1).unflatten(0, (self._sizes.num_layers, -1))

    def _label(self, first: Tensor) -> Tensor:
        """[1, width]: the first token to the log-probabilities of labels."""
        x = linear(self._weights, "pooler.dense", first).tanh()
        x = linear(self._weights, "vqa_classifier.0", x)
        x = F.gelu(layer_norm(self._weights, "vqa_classifier.1", x, CLASSIFIER_EPS))
        return linear(self._weights, "vqa_classifier.3", x).log_softmax(-1)

    def _project(self, first: Tensor, kind: str) -> Tensor:
        name = {"text": "itc_text_proj.fc", "imag": "itc_image_proj.fc"}[kind]
        return F.normalize(linear(self._weights, name, first), dim=-1)


def image_entries(side: int) -> Tensor:
    """Return the entry of the bias table for each pair of the class token and the patches."""
    span = 2 * side - 1
    entries = torch.zeros(side**2 + 1, side**2 + 1, dtype=torch.int64)
    for patch in range(side**2):
        rows = patch // side - torch.arange(side**2) // side + side - 1
        columns = patch % side - torch.arange(side**2) % side + side - 1
        entries[patch + 1, 1:] = rows * span + columns
    return with_first(entries, span**2)


def text_entries(length: int, begin: int, end: int) -> Tensor:
    """Return the same for words. Entries of pairs start at `begin`; the last three are the first
    word's own."""
    places = torch.arange(length)
    entries = places[None] - places[:, None] + TEXT_REACH - 2 + begin
    return with_first(entries, end - 3)


def with_first(entries: Tensor, entry: int) -> Tensor:
    """Replace what stands for the first token as query, as key, and for itself."""
    entries[0, :] = entry
    entries[:, 0] = entry + 1
    entries[0, 0] = entry + 2
    return entries

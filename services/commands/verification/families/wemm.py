"""The reference of WeMM-Chat-2k-CN, written from its published structure.

One image, one prompt, no cache: every product of the model as one line. Its tower is that of
Idefics2 (SigLIP with positions by fractions of a side), its decoder InternLM2 with a low-rank pair
for each product, which is added on the rows of images.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.checkpoint import Checkpoint
from common.families import wemm as description
from common.vocabulary import open_vocabulary
from services.commands.verification.mathematics import (
    HALF,
    attended,
    layer_norm,
    linear,
    normalised,
    rms_norm,
    rotated,
)
from services.commands.verification.questions import Question, read_rgb
from services.commands.verification.reference import (
    ChatReference,
    PixelLimits,
    answer_log_probs,
    forced,
    placed,
)
from services.commands.verification.weights import Float32Weights

TOWER = "vision_tower"
DECODER = "language_model.model"
NO_TOKENS = frozenset[str]()


class WemmReference(ChatReference):
    """The whole model in float32, one layer after the other."""

    title = "plain code of this family"
    max_images = 1

    def __init__(self, checkpoint: Checkpoint, limits: PixelLimits) -> None:
        limits.check_unset(checkpoint.family.title)
        self._checkpoint = checkpoint
        self._weights = Float32Weights(checkpoint)
        self._vocabulary = open_vocabulary(checkpoint)
        self._patch = description.patch_size(checkpoint)
        self._placeholder = checkpoint.sizes.vocab_size
        self._pair_scale = description.low_rank_facts(checkpoint).scale

    def prompt_ids(self, question: Question) -> list[int]:
        encode = self._vocabulary.encode
        start, end = (
            description.special_id(self._checkpoint, token)
            for token in (description.START, description.END)
        )
        begin = self._checkpoint.text_config.get("bos_token_id", 1)
        said = encode(f"user\n{question.text}", NO_TOKENS)
        if question.images:
            rows, columns = self._grid(question)
            num_rows = -(-rows // 4) * -(-columns // 4) + 2
            text = encode(f"\n{question.text}", NO_TOKENS, continues=True)
            said = [*encode("user\n", NO_TOKENS), *[self._placeholder] * num_rows, *text]
        return [begin, start, *said, end, start, *encode("assistant\n", NO_TOKENS)]

    @torch.inference_mode()
    def log_probs(
        self, question: Question, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> np.ndarray:
        ids, steps = forced(prompt_ids, answer_ids)
        is_image = ids == self._placeholder
        table = self._weights[f"{DECODER}.tok_embeddings.weight"]
        x = table[ids.where(~is_image, 0)]
        items = self.image_rows(question) if question.images else x[:0]
        x = placed(x, items, is_image)
        for layer in range(self._checkpoint.sizes.num_layers):
            x = self._decode(f"{DECODER}.layers.{layer}", x, is_image[:, None].float())
        eps = self._checkpoint.text_config["rms_norm_eps"]
        x = rms_norm(self._weights, f"{DECODER}.norm", x[steps], eps)
        return answer_log_probs(linear(self._weights, "language_model.output", x))

    def _decode(self, name: str, x: Tensor, on_images: Tensor) -> Tensor:
        """Run a layer of the decoder on [n, hidden]. `on_images` [n, 1] is 1 on images' rows."""
        config = self._checkpoint.text_config
        sizes = self._checkpoint.sizes

        def product(part: str, x: Tensor) -> Tensor:
            pair = linear(self._weights, f"{name}.{part}.Plora_A", x)
            pair = linear(self._weights, f"{name}.{part}.Plora_B", pair)
            return linear(self._weights, f"{name}.{part}", x) + self._pair_scale * on_images * pair

        normed = rms_norm(self._weights, f"{name}.attention_norm", x, config["rms_norm_eps"])
        # Each key head stands behind the query heads that it serves, and before its values.
        groups = product("attention.wqkv", normed).view(
            len(x), sizes.num_kv_heads, -1, sizes.head_dim
        )
        q = rotated(groups[:, :, :-2].flatten(1, 2), config["rope_theta"])
        k = rotated(groups[:, :, -2], config["rope_theta"])
        x = x + product("attention.wo", attended(q, k, groups[:, :, -1], is_causal=True))
        normed = rms_norm(self._weights, f"{name}.ffn_norm", x, config["rms_norm_eps"])
        inner = F.silu(product("feed_forward.w1", normed)) * product("feed_forward.w3", normed)
        return x + product("feed_forward.w2", inner)

    def image_rows(self, question: Question) -> Tensor:
        """Return what the decoder reads of the image, float32 [rows, hidden]."""
        x = self._encode(question)
        x = F.pad(x.permute(2, 0, 1)[None], (0, -x.shape[1] % 4, 0, -x.shape[0] % 4), "replicate")
        x = F.conv2d(x, self._weights["downsampler.group_op.weight"], stride=4)[0]
        x = x.flatten(1).T
        for layer in range(1, self._checkpoint.section("downsampler_config").get("depth", 2)):
            x = linear(self._weights, f"downsampler.linear_model.{2 * layer - 1}", F.gelu(x))
        first, last = self._weights["visual_source_spliter_emb.weight"][:2]
        return torch.cat((first[None], x, last[None]))

    def _encode(self, question: Question) -> Tensor:
        """Run the tower: float32 [rows, columns, width]."""
        config = self._checkpoint.vision_config
        eps = config.get("layer_norm_eps", 1e-6)
        rows, columns = self._grid(question)
        side = config["image_size"] // self._patch
        table = self._weights[f"{TOWER}.embeddings.position_embedding.weight"].view(side, side, -1)
        x = F.conv2d(
            self.pixels(question)[None],
            self._weights[f"{TOWER}.embeddings.patch_embedding.weight"],
            self._weights[f"{TOWER}.embeddings.patch_embedding.bias"],
            stride=self._patch,
        )[0].permute(1, 2, 0)
        x = (x + table[parts(rows, side)][:, parts(columns, side)]).flatten(0, 1)
        for layer in range(config["num_hidden_layers"]):
            name = f"{TOWER}.encoder.layers.{layer}"
            normed = layer_norm(self._weights, f"{name}.layer_norm1", x, eps)
            q, k, v = (
                linear(self._weights, f"{name}.self_attn.{part}_proj", normed).view(
                    len(x), config["num_attention_heads"], -1
                )
                for part in "qkv"
            )
            x = x + linear(self._weights, f"{name}.self_attn.out_proj", attended(q, k, v))
            normed = layer_norm(self._weights, f"{name}.layer_norm2", x, eps)
            inner = F.gelu(linear(self._weights, f"{name}.mlp.fc1", normed), approximate="tanh")
            x = x + linear(self._weights, f"{name}.mlp.fc2", inner)
        return layer_norm(self._weights, f"{TOWER}.post_layernorm", x, eps).view(rows, columns, -1)

    def pixels(self, question: Question) -> Tensor:
        """Return the resized image with zeros up to whole patches, float32 [3, height, width]."""
        width, height = self._size(question)
        image = read_rgb(question.images[0]).resize((width, height), Image.Resampling.BILINEAR)
        return F.pad(
            normalised(image, HALF, HALF), (0, -width % self._patch, 0, -height % self._patch)
        )

    def _grid(self, question: Question) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        width, height = self._size(question)
        return -(-height // self._patch), -(-width // self._patch)

    def _size(self, question: Question) -> tuple[int, int]:
        """Return (width, height): the longer side has a fixed length, none is below another."""
        width, height = read_rgb(question.images[0]).size
        shortest, longest = description.edges(self._checkpoint)
        aspect = width / height
        if width >= height:
            width, height = longest, int(longest / aspect)
        else:
            width, height = int(longest * aspect), longest
        return max(width, shortest), max(height, shortest)


def parts(count: int, side: int) -> Tensor:
    """Return in which of `side` equal parts of an edge each of `count` patches begins, int64.

    A patch may begin exactly where a part does. There rounding decides, so the numbers are float32
    and come about as in transformers 4.51.3.
    """
    begins = torch.arange(0, 1 - 1e-6, float(torch.tensor(1.0) / count))
    borders = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(begins, borders, right=True)

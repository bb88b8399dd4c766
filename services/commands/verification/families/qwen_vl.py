"""The reference of Qwen-VL and Qwen-VL-Chat, written from their published structure.

One prompt, no cache: every product of the model as one line.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.checkpoint import Checkpoint
from common.families import qwen_vl as description
from common.vocabulary import open_vocabulary
from services.commands.verification.mathematics import (
    CLIP_MEAN,
    CLIP_STD,
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

DECODER = "transformer"
TOWER = "transformer.visual"
EPS = 1e-6
IMAGE_TOKENS = 256
STORED_SIDE = 16
"""Positions are stored for 16 x 16 patches."""
POOL_HEAD_DIM = 128
MAX_IMAGES = 8


class QwenVLReference(ChatReference):
    """The whole model in float32, one layer after the other."""

    title = "plain code of this family"
    max_images = MAX_IMAGES

    def __init__(self, checkpoint: Checkpoint, limits: PixelLimits) -> None:
        limits.check_unset(checkpoint.family.title)
        self._config = checkpoint.config
        self._visual = checkpoint.vision_config
        self._weights = Float32Weights(checkpoint)
        self._vocabulary = open_vocabulary(checkpoint)
        self._is_chat = description.chat_format(checkpoint) == "chatml"
        self._begin, self._end, self._image, self._pad, self._image_end = (
            description.token_id(checkpoint, token)
            for token in ("<|im_start|>", "<|im_end|>", "<img>", "<imgpad>", "</img>")
        )

    def prompt_ids(self, question: Question) -> list[int]:
        user = self._content(question)
        if not self._is_chat:
            return user
        system = self._encode("You are a helpful assistant.")
        return [
            *self._turn("system", system),
            *self._turn("user", user),
            *[self._begin, *self._encode("assistant"), *self._encode("\n")],
        ]

    def _turn(self, role: str, content: list[int]) -> list[int]:
        line_end = self._encode("\n")
        return [self._begin, *self._encode(role), *line_end, *content, self._end, *line_end]

    def _content(self, question: Question) -> list[int]:
        """Return numbered images, each on a line, then the text."""
        ids: list[int] = []
        before = ""
        for number in range(1, len(question.images) + 1):
            ids += self._encode(f"{before}Picture {number}: ")
            ids += [self._image, *[self._pad] * IMAGE_TOKENS, self._image_end]
            before = "\n"
        return [*ids, *self._encode(before + question.text)]

    def _encode(self, text: str) -> list[int]:
        return self._vocabulary.encode(text, frozenset(description.MARKUP_TOKENS))

    @torch.inference_mode()
    def log_probs(
        self, question: Question, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> np.ndarray:
        ids, steps = forced(prompt_ids, answer_ids)
        is_image = ids == self._pad
        # An answer may hold the placeholder, too, which stands for no image there.
        is_image[len(prompt_ids) :] = False
        x = self._weights["transformer.wte.weight"][ids]
        x = placed(x, self.image_rows(question), is_image)
        for layer in range(self._config["num_hidden_layers"]):
            x = self._decode(f"{DECODER}.h.{layer}", x, len(prompt_ids))
        x = rms_norm(self._weights, f"{DECODER}.ln_f", x[steps], self._config["layer_norm_epsilon"])
        is_tied = self._config.get("tie_word_embeddings")
        return answer_log_probs(
            linear(self._weights, "transformer.wte" if is_tied else "lm_head", x)
        )

    def _decode(self, name: str, x: Tensor, num_prompt_tokens: int) -> Tensor:
        """Run a layer of the decoder on [n, hidden]."""
        config = self._config
        eps = config["layer_norm_epsilon"]
        normed = rms_norm(self._weights, f"{name}.ln_1", x, eps)
        q, k, v = (
            part.view(len(x), config["num_attention_heads"], -1)
            for part in linear(self._weights, f"{name}.attn.c_attn", normed).chunk(3, -1)
        )
        base = self._rotary_base(num_prompt_tokens, q.shape[-1])
        q, k = rotated(q, base) * self._query_scale(len(x)), rotated(k, base)
        x = x + linear(self._weights, f"{name}.attn.c_proj", attended(q, k, v, is_causal=True))
        normed = rms_norm(self._weights, f"{name}.ln_2", x, eps)
        value = linear(self._weights, f"{name}.mlp.w1", normed)
        gate = linear(self._weights, f"{name}.mlp.w2", normed)
        return x + linear(self._weights, f"{name}.mlp.c_proj", value * F.silu(gate))

    def _rotary_base(self, num_prompt_tokens: int, head_dim: int) -> float:
        """Return the base, which a prompt beyond the training's length stretches."""
        base: float = self._config["rotary_emb_base"]
        if not self._config.get("use_dynamic_ntk"):
            return base
        doublings = math.ceil(math.log2(num_prompt_tokens / self._config["seq_length"]) + 1)
        alpha = max(2**doublings - 1, 1)
        return base * alpha ** (head_dim / (head_dim - 2))

    def _query_scale(self, num_tokens: int) -> Tensor:
        """Return what queries are multiplied by, [num_tokens, 1, 1]: above 1 for late ones."""
        if not self._config["use_logn_attn"]:
            return torch.ones(num_tokens, 1, 1)
        places = torch.arange(1, num_tokens + 1)[:, None, None]
        return (places.log() / math.log(self._config["seq_length"])).clamp(min=1)

    def image_rows(self, question: Question) -> Tensor:
        """Return what the decoder reads of all images, float32 [256 * images, hidden]."""
        rows = [self._pool(self._see(image)) for image in question.images]
        return torch.cat([torch.zeros(0, self._visual["output_dim"]), *rows])

    def _see(self, image: bytes) -> Tensor:
        """Run the tower: float32 [patches, width]."""
        visual = self._visual
        size = (visual["image_size"],) * 2
        pixels = read_rgb(image).resize(size, Image.Resampling.BICUBIC)
        x = F.conv2d(
            normalised(pixels, CLIP_MEAN, CLIP_STD)[None],
            self._weights[f"{TOWER}.conv1.weight"],
            stride=visual["patch_size"],
        )
        x = x[0].flatten(1).T
        x = x + self._enlarged(f"{TOWER}.positional_embedding")
        x = layer_norm(self._weights, f"{TOWER}.ln_pre", x, EPS)
        for layer in range(visual["layers"]):
            name = f"{TOWER}.transformer.resblocks.{layer}"
            normed = layer_norm(self._weights, f"{name}.ln_1", x, EPS)
            # Query, key and value of a head stand together, and heads one after the other.
            heads = linear(self._weights, f"{name}.attn.in_proj", normed)
            q, k, v = heads.view(len(x), visual["heads"], -1).chunk(3, -1)
            x = x + linear(self._weights, f"{name}.attn.out_proj", attended(q, k, v))
            normed = layer_norm(self._weights, f"{name}.ln_2", x, EPS)
            inner = F.gelu(linear(self._weights, f"{name}.mlp.c_fc", normed))
            x = x + linear(self._weights, f"{name}.mlp.c_proj", inner)
        return x

    def _pool(self, x: Tensor) -> Tensor:
        """Let 256 learned queries read all patches: float32 [256, hidden]."""
        pool = f"{TOWER}.attn_pool"
        width = self._visual["output_dim"]
        if f"{pool}.kv_proj.weight" in self._weights:
            x = linear(self._weights, f"{pool}.kv_proj", x)
        x = layer_norm(self._weights, f"{pool}.ln_kv", x, EPS)
        queries = layer_norm(self._weights, f"{pool}.ln_q", self._weights[f"{pool}.query"], EPS)
        found, _ = F.multi_head_attention_forward(
            (queries + self._weights[f"{pool}.pos_embed"])[:, None],
            (x + self._enlarged(f"{pool}.pos_embed"))[:, None],
            x[:, None],
            embed_dim_to_check=width,
            num_heads=width // POOL_HEAD_DIM,
            in_proj_weight=self._weights[f"{pool}.attn.in_proj_weight"],
            in_proj_bias=self._weights[f"{pool}.attn.in_proj_bias"],
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self._weights[f"{pool}.attn.out_proj.weight"],
            out_proj_bias=self._weights[f"{pool}.attn.out_proj.bias"],
            training=False,
            need_weights=False,
        )
        found = layer_norm(self._weights, f"{TOWER}.ln_post", found[:, 0], EPS)
        return found @ self._weights[f"{TOWER}.proj"]

    def _enlarged(self, name: str) -> Tensor:
        """Return a table of positions for the image's patches, float32 [patches, width]."""
        side = self._visual["image_size"] // self._visual["patch_size"]
        table = self._weights[name].T.unflatten(1, (STORED_SIDE, STORED_SIDE))[None]
        if side != STORED_SIDE:
            table = F.interpolate(table, (side, side), mode="bicubic", align_corners=False)
        return table[0].flatten(1).T

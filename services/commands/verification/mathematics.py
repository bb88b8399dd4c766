"""The few formulas that several references need, in float32 and as plain as they are written."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from services.commands.verification.weights import Float32Weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return an RGB image as float32 [3, height, width], with this mean and deviation taken off."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def linear(weights: Float32Weights, name: str, x: Tensor) -> Tensor:
    """Return the product with a named weight, plus its bias if there is one."""
    return F.linear(x, weights[f"{name}.weight"], weights.find(f"{name}.bias"))


def layer_norm(weights: Float32Weights, name: str, x: Tensor, eps: float) -> Tensor:
    scale = weights[f"{name}.weight"]
    return F.layer_norm(x, scale.shape, scale, weights[f"{name}.bias"], eps)


def rms_norm(weights: Float32Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]


def rotated(x: Tensor, theta: float) -> Tensor:
    """Turn each pair of [n, heads, head_dim] by its position; halves of a head are the pairs."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half) / half)
    angles = torch.arange(len(x))[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    turned = (
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    )
    return torch.cat(turned, -1)


def attended(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Return softmax(q k / sqrt(head_dim) + bias) v, with heads side by side: [n, heads * d].

    `q` is [n, heads, d]; `k` and `v` are [m, heads, d], or have fewer heads, each for some of q's.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal)
    return found[0].transpose(0, 1).flatten(1)

"""Element-wise work as fused kernels: with matrix products in bf16, it is most of the time
otherwise.

`torch.compiler.set_stance("force_eager")` runs them as they stand, without a C++ compiler.
"""

import torch
import torch.nn.functional as F

# every layout of q and k (windows, prompts) is compiled on its own
torch._dynamo.config.recompile_limit = 64

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


def activation_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


@torch.compile(dynamic=True)
def rms(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).to(dtype)


@torch.compile(dynamic=True)
def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


@torch.compile(dynamic=True)
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rotations(half_angles: torch.Tensor) -> tuple[Rotation, Rotation]:
    """Half of a head's angles -> for q, with the attention's 1 / sqrt(size) in them, and for k"""
    angles = torch.cat((half_angles, half_angles), -1)[:, None]
    scale = angles.shape[-1] ** -0.5
    dtype = activation_dtype()
    cos = angles.cos()
    sin = angles.sin()
    return ((cos * scale).to(dtype), (sin * scale).to(dtype)), (cos.to(dtype), sin.to(dtype))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Written out: on a CPU in bf16, forward and backward, it takes a third of the time of torch's
    own."""
    scores = q @ k.mT
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v

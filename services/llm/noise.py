"""Noise for the sampler that a hash gives: the same for the same key and token id, on any device
and in any batch."""

import torch
from torch import Tensor

MASK_64 = 2**64 - 1
# The increment and the multipliers of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom
# number generators, 2014).
INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [n]: -log(-log(u)) of a u in (0, 1) that (key, token id) determines."""
    bits = mix_tensor(keys + (token_ids + 1) * signed(INCREMENT))
    # 1 - u is what the hash gives: large noise, that of a small 1 - u, is the finest then.
    complement = ((shift_right(bits, 32).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-torch.log1p(-complement)).log()


def mix(state: int) -> int:
    """splitmix64's output for a state, of which the low 64 bits count."""
    x = (state + INCREMENT) & MASK_64
    x = ((x ^ (x >> 30)) * MULTIPLIER_1) & MASK_64
    x = ((x ^ (x >> 27)) * MULTIPLIER_2) & MASK_64
    return x ^ (x >> 31)


def mix_tensor(x: Tensor) -> Tensor:
    """The same of int64 states that were incremented already: products wrap, as they must."""
    x = (x ^ shift_right(x, 30)) * signed(MULTIPLIER_1)
    x = (x ^ shift_right(x, 27)) * signed(MULTIPLIER_2)
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Of int64 as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x: int) -> int:
    """The int64 of the same 64 bits."""
    return x - 2**64 if x >= 2**63 else x

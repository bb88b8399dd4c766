"""Noise for the sampler, made by a hash.

The same key and token id give the same noise on any device and in any batch.
"""

import numpy as np
import torch
from torch import Tensor

MASK_64 = 2**64 - 1
# The noise lies between -2.9 and 22.9, so a token further behind the best cannot win.
NOISE_RANGE = 26.0
# The increment and the multipliers of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom
# number generators, 2014).
INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Return -log(-log(u)), float32 [n], of a u in (0, 1) that (key, token id) determines."""
    bits = mix_tensor(keys + (token_ids + 1) * signed(INCREMENT))
    # The hash gives 1 - u, because large noise comes from a small 1 - u and needs fine steps.
    complement = ((shift_right(bits, 32).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-torch.log1p(-complement)).log()


def states_of(seeds: list[int]) -> np.ndarray:
    """Return the states that the noise of each seed begins with, uint64 [n]."""
    return mix_array(np.array(seeds, np.uint64))


def keys_of(states: np.ndarray, positions: list[int]) -> np.ndarray:
    """Return the keys of the noise of tokens at these positions of their outputs, int64 [n].

    `states` are those of their seeds.
    """
    return mix_array(states + np.array(positions, np.uint64)).view(np.int64)


def mix(state: int) -> int:
    """Return the output of splitmix64 for a state, of which the low 64 bits count."""
    x = (state + INCREMENT) & MASK_64
    x = ((x ^ (x >> 30)) * MULTIPLIER_1) & MASK_64
    x = ((x ^ (x >> 27)) * MULTIPLIER_2) & MASK_64
    return x ^ (x >> 31)


def mix_array(states: np.ndarray) -> np.ndarray:
    """Return the outputs of splitmix64 for states, uint64 [n] both.

    numpy takes a fifth of torch's time for as few as a batch has.
    """
    x = states + INCREMENT
    x = (x ^ (x >> 30)) * MULTIPLIER_1
    x = (x ^ (x >> 27)) * MULTIPLIER_2
    return x ^ (x >> 31)


def mix_tensor(x: Tensor) -> Tensor:
    """Return the outputs of splitmix64 for int64 states that are incremented already.

    Products wrap around, as they must.
    """
    x = (x ^ shift_right(x, 30)) * signed(MULTIPLIER_1)
    x = (x ^ shift_right(x, 27)) * signed(MULTIPLIER_2)
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x: int) -> int:
    """Return the signed number of the same 64 bits."""
    return x - 2**64 if x >= 2**63 else x

"""Random quantized weights of any shape, with groups of any kind."""

import torch
from torch import Tensor

from compute.quantized_weights import Fp8Weight, Int4Weight


def random_for(*shape: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(shape))


def in_order(num_inputs: int, size: int, first: int = 0) -> Tensor:
    """Return groups of `size` inputs, of which the first has lost its first `first` inputs."""
    return (torch.arange(num_inputs) + first) // size


def shuffled(groups: Tensor) -> Tensor:
    return groups[torch.randperm(len(groups), generator=random_for(len(groups)))]


def int4_weight(num_outputs: int, groups: Tensor) -> Int4Weight:
    random = random_for(num_outputs, len(groups))
    num_groups = int(groups.max()) + 1
    values = torch.randint(16, (num_outputs, len(groups)), generator=random, dtype=torch.uint8)
    zeros = torch.randint(17, (num_outputs, num_groups), generator=random, dtype=torch.uint8)
    scales = torch.rand(num_outputs, num_groups, generator=random).half().float() / 64
    return Int4Weight(values, scales, zeros, groups)


def fp8_weight(num_outputs: int, groups: Tensor) -> Fp8Weight:
    """Return weights that have every finite number of eight bits, if they are 254 or more."""
    random = random_for(num_outputs, len(groups))
    bits = torch.arange(num_outputs * len(groups)).to(torch.uint8)
    bits = bits.where(bits & 0x7F != 0x7F, 0)[torch.randperm(len(bits), generator=random)]
    values = bits.view(torch.float8_e4m3fn).view(num_outputs, -1)
    scales = torch.rand(num_outputs, int(groups.max()) + 1, generator=random) / 256
    return Fp8Weight(values, scales, groups)

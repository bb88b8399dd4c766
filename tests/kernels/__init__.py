"""Tests of the Triton kernels, which run on a card if there is one."""

import torch

HAS_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CARD else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_CARD
"""The interpreter's product of bfloat16 is wrong in Triton 3.9."""

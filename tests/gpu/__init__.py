"""What needs a CUDA device. Everywhere else these tests skip; the logic around the device is tested
on the CPU."""

import pytest
import torch

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CUDA = torch.device("cuda")

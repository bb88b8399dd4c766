"""What needs a CUDA device. Everywhere else these tests skip; the logic around the device is tested
on the CPU."""

import pytest
import torch

from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.protocol import PagedBackend, Shapes
from services.llm.attention_backends.trials import objection_to

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CUDA = torch.device("cuda")


def backend_for(name: str, shapes: Shapes) -> type[PagedBackend]:
    """Return the backend of a name; skip the test if it cannot run here."""
    kind = BACKENDS[name]
    if objection := objection_to(kind, shapes, CUDA):
        pytest.skip(f"{name}: {objection}")
    return kind

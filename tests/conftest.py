"""What holds for all tests."""

import os

import torch
from hypothesis import settings

# A busy machine makes a test slow, not wrong.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

# Triton reads it when a kernel is defined, so it is set before any test imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

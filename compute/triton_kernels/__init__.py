"""Kernels in Triton for CUDA cards, and for the CPU under Triton's interpreter in tests.

Importing this package imports no Triton: it may not be installed. Its modules do.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

INTERPRETED = ContextVar("INTERPRETED", default=False)
"""Whether this is inside of `interpreted`."""


@cache
def is_installed() -> bool:
    """Whether Triton is installed. torch's CUDA builds bring it."""
    return importlib.util.find_spec("triton") is not None


def serve(device: torch.device) -> bool:
    """Whether the kernels compute with tensors of this device."""
    return is_installed() and (device.type == "cuda" or INTERPRETED.get())


@contextmanager
def interpreted() -> Iterator[None]:
    """Compute with these kernels on the CPU, too.

    TRITON_INTERPRET must have been set before the kernels were imported.
    """
    token = INTERPRETED.set(True)
    try:
        yield
    finally:
        INTERPRETED.reset(token)

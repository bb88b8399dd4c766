"""Kernels in Triton for CUDA cards, and for the CPU under Triton's interpreter in tests.

Importing this package imports no Triton: it may not be installed. Its modules do.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

INTERPRETED = ContextVar("INTERPRETED", default=False)
"""Whether this is inside of `interpreted`."""


@cache
def is_installed() -> bool:
    """Whether Triton is installed. torch's CUDA builds bring it."""
    return importlib.util.find_spec("triton") is not None


def errors() -> tuple[type[Exception], ...]:
    """Return what Triton raises if it cannot compile or launch a kernel for a card."""
    if not is_installed():
        return ()
    from triton.errors import TritonError

    return (TritonError,)


@cache
def objection() -> str:
    """Return why Triton cannot launch kernels from this host; "" if nothing is known of it.

    It compiles a module in C for each kind of launch.
    """
    if not is_installed():
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler: install gcc"
    if not (headers() / "Python.h").exists():
        return f"Triton finds no Python.h in {headers()}: install Python's headers"
    return ""


def headers() -> Path:
    """Return the folder in which Triton looks for Python's headers."""
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for packages from elsewhere, where no headers are.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_path("include", scheme))


def serve(device: torch.device) -> bool:
    """Whether the kernels compute with tensors of this device."""
    if INTERPRETED.get():
        return is_installed()
    return device.type == "cuda" and not objection()


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

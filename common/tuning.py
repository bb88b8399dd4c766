"""The environment variables that tune the libraries under vision and llm, and why.

The libraries read these variables once, when they are loaded. A service that was started without
them therefore executes itself again with them, before it imports anything heavy. A value that the
operator sets always wins, even an empty one.
"""

import os
import sys
from collections.abc import Mapping

COMPUTING = {
    # Idle OpenMP threads sleep, because vision and language may share the cores.
    "OMP_WAIT_POLICY": "passive",
    # Large tensors use huge pages, which makes a decode step 5-8% shorter.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # oneDNN and torch keep what they compile for each shape, and every prompt length is a shape.
    # With their own limits a language group grows by hundreds of megabytes.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
TUNING: dict[str, dict[str, str]] = {
    "vision": COMPUTING,
    # A step without the fused kernel is over a hundred short products, and waking a thread takes as
    # long as one of them. So threads spin for a moment before they sleep.
    "llm": COMPUTING | {"GOMP_SPINCOUNT": "1000"},
}
"""The variables of each role; a role that is not here needs none (figures: docs/performance.md)."""

MARK = "TUNED_PID"


def with_tuning(role: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the role's variables added where it does not set them itself."""
    return TUNING.get(role, {}) | dict(environment)


def apply_tuning(role: str) -> None:
    """Execute this process again with the role's variables, unless it has them all.

    It keeps its pid, its arguments and the interpreter's options. Call this before heavy imports.
    """
    tuned = with_tuning(role, os.environ)
    mark = str(os.getpid())
    # The mark ends this even if something, such as a privileged interpreter, drops a variable.
    if tuned == dict(os.environ) or os.environ.get(MARK) == mark:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], tuned | {MARK: mark})

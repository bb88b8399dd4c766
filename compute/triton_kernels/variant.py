"""One specialisation of a kernel, for compilation ahead of time."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with the types of its arguments and the values of its constants."""

    name: str
    kernel: Any
    """A function that triton.jit decorates."""
    signature: dict[str, str]
    """The type of each argument, as Triton writes it: "*fp32", "i32", "constexpr"."""
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    min_arch: int = 80
    """The first architecture that runs it: 80 is compute capability 8.0."""
    max_arch: int = 1000
    """The last one."""

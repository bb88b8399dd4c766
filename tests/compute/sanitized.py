"""A pytest plugin that compiles the C kernels with sanitizers, for `make sanitize`.

AddressSanitizer finds accesses outside a buffer, UndefinedBehaviorSanitizer for instance misaligned
ones. Both end the process at the first finding.
"""

import os

import pytest

from compute.kernels import library

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
COMPILE_SECONDS = 600
INSTRUCTION_SETS = {"avx2": library.AVX2, "avx512": library.AVX512}

# The kernels need AddressSanitizer in this process, but the compiler does not.
PRELOAD = os.environ.pop("LD_PRELOAD", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--instruction-set", choices=sorted(INSTRUCTION_SETS), required=True)


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--instruction-set")
    if not INSTRUCTION_SETS[name].needed_flags <= library.cpu_flags():
        pytest.exit(f"skipped: this CPU cannot run the kernels for {name}", returncode=0)
    use_sanitized(name)


def use_sanitized(name: str) -> None:
    """From now on load the kernels of this instruction set only, with sanitizers."""
    flags = library.cpu_flags()
    if name == "avx2":
        flags = frozenset(flag for flag in flags if not flag.startswith("avx512"))
    library.cpu_flags = lambda: flags
    library.NATIVE = INSTRUCTION_SETS[name].portable
    library.FLAGS = (*library.FLAGS, *SANITIZERS)
    library.COMPILE_SECONDS = COMPILE_SECONDS

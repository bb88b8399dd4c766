"""The sanitized kernels notice a wrong access. `make sanitize` runs this, `make test` does not."""

import os
import subprocess
import sys

import pytest

from tests.compute import sanitized

PROGRAM = """
import ctypes
from tests.compute.sanitized import use_sanitized
use_sanitized("{instruction_set}")
from compute.kernels.library import bfloat16_kernels

WIDTH = 1000
kernels = bfloat16_kernels()
rows = ctypes.create_string_buffer(4 * 2 * WIDTH)
row = ctypes.create_string_buffer(2 * WIDTH)
tables = ctypes.create_string_buffer(1000)
{call}
print("not noticed")
"""


@pytest.mark.parametrize(
    ("call", "finding"),
    [
        ("kernels.silu_mul(rows, row, 1, WIDTH, 1)", None),
        ("kernels.silu_mul(rows, row, 2, WIDTH, 1)", "heap-buffer-overflow"),
        ("kernels.rms_norm(row, row, rows, 1e-6, 2, WIDTH, 1)", "heap-buffer-overflow"),
        ("kernels.rotate(rows, 64, tables, tables, 9, 1, 64, 1)", "heap-buffer-overflow"),
        ("kernels.scatter(rows, WIDTH, row, tables, 1, WIDTH + 1)", "heap-buffer-overflow"),
        ("kernels.linear(ctypes.byref(tables, 1), 0, 0, 0, 0, 0, 1)", "misaligned address"),
    ],
    ids=["none", "write", "read", "read of floats", "copy", "alignment"],
)
def test_a_wrong_access_ends_the_process(
    call: str, finding: str | None, request: pytest.FixtureRequest
) -> None:
    name = request.config.getoption("--instruction-set")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(instruction_set=name, call=call)],
        env=os.environ | {"LD_PRELOAD": sanitized.PRELOAD},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (finding or "not noticed") in done.stdout + done.stderr
    assert (done.returncode == 0) == (finding is None)

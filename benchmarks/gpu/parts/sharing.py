"""Vision and language as processes that share a card by MPS, next to the same without it.

Without MPS, two processes take turns on a card. MPS lets their kernels run at the same time. The
daemon is started for this measurement, with folders of its own, and stopped again. No setting of
the card is changed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory

from benchmarks.gpu.part import Skip, Task
from benchmarks.gpu.parts import serve
from benchmarks.gpu.served import measure
from benchmarks.gpu.setup import Setup

CONTROL = "nvidia-cuda-mps-control"
START_SECONDS = 10.0
TRY = "import torch; print(torch.ones(8, device='cuda').sum().item())"
TRY_SECONDS = 60.0


def run(task: Task) -> None:
    model = str(Setup(task).checkpoint().path)
    if not any(row["table"] == serve.TABLE for row in task.rows_of("serve")):
        measure(task, model, serve.TABLE, serve.SYSTEM)
    if task.dry_run:
        measure(task, model, serve.TABLE, "with MPS")
        return
    with mps():
        measure(task, model, serve.TABLE, "with MPS")


@contextmanager
def mps() -> Iterator[None]:
    """Have processes that start meanwhile share the card by MPS.

    Raises Skip if there is no daemon, or it does not serve.
    """
    program = shutil.which(CONTROL)
    if program is None:
        raise Skip(f"no {CONTROL} on the PATH")
    with TemporaryDirectory(prefix="mps") as folder:
        names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
        os.environ.update(dict.fromkeys(names, folder))
        try:
            start(program)
            yield
        finally:
            with suppress(OSError, subprocess.TimeoutExpired):
                command(program, "quit -t 2\n")
            for name in names:
                del os.environ[name]


def start(program: str) -> None:
    try:
        started = subprocess.run(
            [program, "-d"], capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
        tried = subprocess.run(
            [sys.executable, "-c", TRY],
            capture_output=True,
            text=True,
            timeout=TRY_SECONDS,
            check=False,
        )
        servers = command(program, "get_server_list\n").split()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skip(f"MPS cannot be used here: {error}") from error
    if started.returncode or tried.returncode or not servers:
        said = (started.stderr + tried.stderr).strip().splitlines() or ["no server was started"]
        raise Skip(f"MPS cannot be used here: {said[-1]}")


def command(program: str, text: str) -> str:
    """Return what the daemon answers to a command."""
    return subprocess.run(
        [program], input=text, capture_output=True, text=True, timeout=START_SECONDS, check=False
    ).stdout

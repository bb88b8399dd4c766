"""`twinlens shard`: writes the weights of a model as a file for each tensor-parallel rank."""

import subprocess
import sys
from dataclasses import asdict

from common.config import arguments_of
from common.settings import ShardSettings


def shard(settings: ShardSettings) -> int:
    """Cut the weights in a process of its own, and return its exit status.

    The commands import no torch.
    """
    arguments = arguments_of(asdict(settings))
    return subprocess.run([sys.executable, "-m", "services.llm.shard", *arguments]).returncode

"""`twinlens compile`: writes an artefact from which a vision service starts."""

import subprocess
import sys
from dataclasses import asdict

from common.config import arguments_of
from common.settings import CompileSettings


def compile_model(settings: CompileSettings) -> int:
    """Compile in a process of its own, and return its exit status.

    The commands import no torch, and a compiler's libraries may end their process.
    """
    arguments = arguments_of(asdict(settings))
    return subprocess.run([sys.executable, "-m", "services.vision.compile", *arguments]).returncode

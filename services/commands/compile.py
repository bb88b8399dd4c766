"""`twinlens compile`: writes an artefact from which a vision service starts."""

import subprocess
import sys
from dataclasses import fields

from common.config import flag
from common.settings import CompileSettings


def compile_model(settings: CompileSettings) -> int:
    """Compile in a process of its own, and return its exit status.

    The commands import no torch, and a compiler's libraries may end their process.
    """
    arguments = [
        f"{flag(field.name)}={value}"
        if not isinstance(value := getattr(settings, field.name), bool)
        else flag(field.name if value else f"no_{field.name}")
        for field in fields(settings)
    ]
    return subprocess.run([sys.executable, "-m", "services.vision.compile", *arguments]).returncode

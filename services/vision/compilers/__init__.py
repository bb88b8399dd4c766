"""The compilers of vision towers. A vendor's compiler is one file here, and a line in the table."""

from services.vision.compilers.compiler import Compiler, Runtime, TowerProgram
from services.vision.compilers.torch_export import TorchExport

__all__ = ["COMPILERS", "Compiler", "Runtime", "TowerProgram"]

COMPILERS: dict[str, Compiler] = {compiler.name: compiler for compiler in (TorchExport(),)}
"""The compilers by the name that a manifest has."""

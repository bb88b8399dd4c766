"""What the compiler of a card must do.

A compiler gets the exported programs of a vision tower, one for each static shape, and makes files
of them. Its runtime loads these files and runs them. Everything around that (plans, padding, the
manifest, the service) is the same for all compilers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from common.vision_artefact import CompiledProgram, VisionArtefact


@dataclass(frozen=True)
class TowerProgram:
    """The forward pass of a tower at one static shape.

    The inputs of `exported` are those that `compiled` lists: `patches`, uint8 [length, values of a
    patch], and then the tensors of the plan. Its outputs are the columns of the embeddings, in
    order: each is [rows, width]. Its weights are the constants of `exported`. Programs of one tower
    share them: equal weights are the same tensor object.
    """

    exported: ExportedProgram
    compiled: CompiledProgram
    """What the manifest says of it."""


class Runtime(Protocol):
    """Compiled programs, loaded on a device."""

    def run(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        """Run the program of this name, and return the columns of the embeddings.

        The inputs are on any device, and have the types and shapes that the manifest says.
        """
        ...


class Compiler(Protocol):
    """Compiles the programs of a tower, and loads what it compiled."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def compile(
        self, programs: list[TowerProgram], folder: Path, report: Callable[[str], None]
    ) -> list[str]:
        """Write the compiled programs into `folder`, and return the names of the files.

        `report` is called with a line for each step that takes long.
        """
        ...

    def load(
        self,
        artefact: VisionArtefact,
        device: torch.device,
        report_loading: Callable[[float], None],
    ) -> Runtime:
        """Load what `compile` wrote.

        `report_loading` is called with the fraction that is loaded.

        Raises
        ------
        BadCheckpoint
            if a file is missing or damaged, or needs another version of the compiler.
        """
        ...

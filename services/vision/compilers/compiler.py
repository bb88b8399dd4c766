"""What the compiler of a card must do.

A compiler gets the exported programs of a vision tower, one for each static shape, and makes files
of them. Its runtime loads these files and runs them. Everything around that (plans, padding, the
manifest, the service) is the same for all compilers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from common.vision_artefact import VisionArtefact


@dataclass(frozen=True)
class TowerProgram:
    """The forward pass of a tower at one static shape.

    Its first input is `patches`, uint8 [length, values_per_patch]. The others are the tensors of
    the plan, in order. Its outputs are the columns of the embeddings, in order: each is
    [rows, width]. Its weights are the constants of `exported`. Programs of one tower share them:
    equal weights are the same tensor object.
    """

    num_patches: int
    """The bucket: the most patches of an item that this program encodes."""
    exported: ExportedProgram
    input_names: tuple[str, ...]
    """`patches`, and the fields of the plan."""
    plan_values: str
    """What `values_of` must return for each plan that this program gets."""


class Runtime(Protocol):
    """Compiled programs, loaded on a device."""

    def run(self, num_patches: int, plan_values: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the program of a bucket, and return the columns of the embeddings.

        Raises ValueError if the program was not compiled for such inputs.
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

"""A vision tower that was compiled in advance, without the model's weights or code of its own.

The plan of an item is computed here, by the family's tower without its weights. The program gets
its tensors as inputs.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.buckets import bucket_of
from common.checkpoint import BadCheckpoint
from common.vision_artefact import VisionArtefact
from compute.torch_tensors import DTYPES
from services.vision.compilers import COMPILERS
from services.vision.families import load
from services.vision.plans import described, inputs_of, values_of
from services.vision.tower import MAX_CACHED_PLANS, check_patches
from services.vision.tower_thread import ItemShape

CPU = torch.device("cpu")


class CompiledTower:
    """Runs the programs of an artefact. Implements `Encoder`."""

    def __init__(
        self,
        artefact: VisionArtefact,
        device: torch.device,
        report_loading: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """Load the artefact. `report_loading` is called with the fraction that is loaded.

        Raises
        ------
        BadCheckpoint
            if it is damaged, or this machine has no runtime for it.
        """
        manifest = artefact.manifest
        compiler = COMPILERS.get(manifest.compiler)
        if compiler is None:
            raise BadCheckpoint(
                f"{artefact.path} was compiled by {manifest.compiler[:80]}, and there is no "
                f"runtime for that here; there is one for {', '.join(COMPILERS)}"
            )
        self.buckets = artefact.buckets
        self._planner = load(artefact.checkpoint, DTYPES[manifest.dtype], CPU)
        self._values_per_patch = manifest.values_per_patch
        self._programs = {
            bucket: [program for program in manifest.programs if program.num_patches == bucket]
            for bucket in artefact.buckets
        }
        self._runtime = compiler.load(artefact, device, report_loading)
        self._plan = lru_cache(MAX_CACHED_PLANS)(self._planner.plan)

    @torch.inference_mode()
    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """uint8 [num_patches, values_per_patch] on any device -> [num_tokens, output_width].

        Raises
        ------
        ValueError
            if the item has more patches than the largest bucket, or the program was not compiled
            for its plan.
        """
        check_patches(patches, shape, self._values_per_patch)
        bucket = bucket_of(len(patches), self.buckets)
        if not bucket:
            raise ValueError(f"{len(patches)} patches fit into none of the buckets {self.buckets}")
        length = self._programs[bucket][0].length
        plan = self._plan(shape, length)
        inputs = inputs_of(F.pad(patches, (0, 0, 0, length - len(patches))), plan)
        name = self._program_for(bucket, inputs, values_of(plan))
        columns = self._runtime.run(name, list(inputs.values()))
        return torch.cat(columns, dim=1)[: self._planner.num_tokens(shape)]

    def _program_for(self, bucket: int, inputs: dict[str, Tensor], plan_values: str) -> str:
        """Return the name of the program that was compiled for such inputs."""
        found = (described(inputs), plan_values)
        for program in self._programs[bucket]:
            if (program.inputs, program.plan_values) == found:
                return program.name
        raise ValueError(
            f"the vision artefact has no program for {bucket} patches with {plan_values} and "
            f"{found[0]}: compile the model again"
        )

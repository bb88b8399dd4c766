"""Compiles the vision tower of a model for fixed patch counts. `twinlens compile` runs this."""

from common.tuning import apply_tuning

if __name__ == "__main__":
    apply_tuning("vision")  # first, because the libraries read it when they are imported

import argparse
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from common.buckets import parse_buckets
from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.config import BadSetting, load
from common.process import EXIT_OK, EXIT_USAGE, write_utf8
from common.settings import KNOWN_NAMES, CompileSettings
from common.vision_artefact import (
    FORMAT,
    FORMAT_VERSION,
    CompiledProgram,
    Manifest,
    copy_model_files,
    hashes_of,
    open_artefact,
    tower_tensors,
    write_manifest,
)
from compute.device import set_threads
from compute.kernels.library import portable
from compute.torch_tensors import DTYPES, NAMES
from services.vision.compiled_tower import CPU, CompiledTower
from services.vision.compilers import COMPILERS, Compiler, TowerProgram
from services.vision.compilers.graph import BadGraph
from services.vision.families import AnyTower
from services.vision.families import load as load_tower
from services.vision.plans import (
    UnfitPlan,
    described,
    inputs_of,
    tensors_of,
    values_of,
    with_tensors,
)
from services.vision.sample_shapes import samples
from services.vision.static_tower import StaticTower

COLUMNS_PER_CHUNK = 640
"""The widest part of the embeddings that leaves a card at once, if they leave in chunks."""
MAX_PROGRAMS = 4
"""The most programs of a bucket."""
MAX_DIFFERENCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far a compiled tower may be from its model's, relative to the largest embedding."""


class StaticForward(nn.Module):
    """The forward pass of a tower at one static shape, as torch.export wants it."""

    def __init__(self, tower: AnyTower, plan: Any, column_widths: list[int]) -> None:
        super().__init__()
        self._tower = tower
        self._plan = plan
        self._names = list(tensors_of(plan))
        self._column_widths = column_widths

    def forward(self, patches: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The patches and the tensors of a plan -> the columns of the embeddings."""
        plan = with_tensors(self._plan, dict(zip(self._names, tensors, strict=True)))
        rows = self._tower.forward(patches, plan)
        return rows.split(self._column_widths, dim=1)


def export(
    tower: AnyTower, checkpoint: Checkpoint, num_patches: int, column_widths: list[int]
) -> list[TowerProgram]:
    """Return the programs of a bucket.

    There is one, unless items differ in more than the values of tensors, as videos do from images.

    Raises
    ------
    BadCheckpoint
        if no item is that small.
    UnfitPlan
        if too many programs would be needed.
    """
    length = tower.padded_length(num_patches)
    programs: dict[Any, TowerProgram] = {}
    for shape in samples(checkpoint, num_patches):
        plan = tower.plan(shape, length)
        patches = noise(length, shape.frames_per_patch * tower.values_per_patch)
        inputs = inputs_of(patches, plan)
        key = (described(inputs), values_of(plan))
        if key not in programs:
            name = f"{num_patches}-{len(programs)}" if programs else f"{num_patches}"
            compiled = CompiledProgram(name, num_patches, length, *key)
            module = StaticForward(tower, plan, column_widths)
            programs[key] = TowerProgram(trace(module, tuple(inputs.values())), compiled)
        if len(programs) > MAX_PROGRAMS:
            raise UnfitPlan(f"plans for {length} patches differ in more than values of tensors")
    if not programs:
        raise BadCheckpoint(
            f"no image of {checkpoint.name} has {num_patches} patches or fewer: name larger buckets"
        )
    return list(programs.values())


def trace(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Return the module as a program without in-place operations.

    Otherwise nothing is taken apart: the compiler of a card knows best what to do with an attention
    or a norm.
    """
    with warnings.catch_warnings():
        # torch copies a structure that warns about its own class.
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
        return torch.export.export(module, inputs, strict=False).run_decompositions({})


def column_widths_of(width: int, in_chunks: bool) -> list[int]:
    """Return the widths in which embeddings of this width leave the tower."""
    most = COLUMNS_PER_CHUNK if in_chunks else width
    return [min(most, width - begin) for begin in range(0, width, most)]


def compile_vision(
    checkpoint: Checkpoint,
    buckets: tuple[int, ...],
    dtype: torch.dtype,
    out: Path,
    *,
    in_chunks: bool = False,
    compiler: Compiler = COMPILERS["torch.export"],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the artefact of a checkpoint's vision tower into the new folder `out`.

    Raises
    ------
    BadCheckpoint
        if the tower cannot be loaded.
    BadGraph
        if it cannot be compiled.
    """
    began = time.monotonic()
    report(f"loading the vision tower of {checkpoint.name}")
    unfinished = out.with_name(f"{out.name}.unfinished")
    with ExitStack() as stack:
        stack.enter_context(portable())
        stack.enter_context(torch.no_grad())
        tower = load_tower(checkpoint, dtype, CPU)
        widths = column_widths_of(tower.output_width, in_chunks)
        programs: list[TowerProgram] = []
        for bucket in buckets:
            report(f"bucket {bucket}: exporting")
            programs += export(tower, checkpoint, bucket, widths)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        stack.callback(shutil.rmtree, unfinished, ignore_errors=True)
        names = compiler.compile(programs, unfinished, report)
        names += copy_model_files(checkpoint, unfinished)
        files = hashes_of(unfinished, names)
        write_manifest(
            unfinished, manifest_of(tower, checkpoint, programs, widths, compiler, files)
        )
        report(f"bucket {buckets[0]}: checking")
        difference = check(unfinished, tower, checkpoint)
        unfinished.rename(out)
    report(f"checked: within {difference:.1e} of the tower that was compiled")
    report(f"wrote {out} in {time.monotonic() - began:.1f} s")


def manifest_of(
    tower: AnyTower,
    checkpoint: Checkpoint,
    programs: list[TowerProgram],
    column_widths: list[int],
    compiler: Compiler,
    files: dict[str, str],
) -> Manifest:
    return Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        compiler=compiler.name,
        compiler_version=compiler.version,
        model=checkpoint.name,
        family=checkpoint.family.model_type,
        fingerprint=checkpoint.fingerprint,
        dtype=NAMES[tower.dtype],
        values_per_patch=tower.values_per_patch,
        column_widths=tuple(column_widths),
        programs=tuple(program.compiled for program in programs),
        tensors=tower_tensors(checkpoint),
        files=files,
    )


def check(folder: Path, tower: AnyTower, checkpoint: Checkpoint) -> float:
    """Load the artefact and compare it with its tower, on noise in the smallest bucket.

    Return the largest difference relative to the largest embedding.

    Raises
    ------
    BadGraph
        if they differ too much.
    """
    artefact = open_artefact(folder)
    smallest = artefact.buckets[0]
    static = StaticTower(tower, (smallest,))
    compiled = CompiledTower(artefact, CPU)
    difference = 0.0
    # The first sample of each kind has the most patches.
    firsts = {shape.kind: shape for shape in reversed([*samples(checkpoint, smallest)])}
    for shape in firsts.values():
        num_values = shape.frames_per_patch * tower.values_per_patch
        patches = noise(math.prod(shape.grid_thw), num_values)
        expected = static.encode(patches, shape).float()
        found = compiled.encode(patches, shape).float()
        difference = max(difference, float((found - expected).abs().max() / expected.abs().max()))
    if not difference <= MAX_DIFFERENCES[tower.dtype]:
        raise BadGraph(f"the compiled tower differs from the model's by {difference:.1e}")
    return difference


def noise(num_patches: int, num_values: int) -> Tensor:
    """Return random patches of this number of values, equal each time."""
    random = torch.Generator().manual_seed(0)
    size = (num_patches, num_values)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=random)


def main(settings: CompileSettings) -> None:
    out = Path(settings.out).expanduser()
    if not settings.out:
        raise BadSetting("--out: name the folder that gets the artefact")
    if out.exists():
        raise BadSetting(f"--out {out}: it exists; remove it, or choose another folder")
    checkpoint = open_checkpoint(settings.model)
    buckets = parse_buckets(settings.buckets, checkpoint.patches_per_token, "--buckets")
    if not buckets:
        raise BadSetting("--buckets: name the numbers of patches to compile for, such as 5120")
    set_threads(None, 1)
    dtype = checkpoint.dtype if settings.dtype == "auto" else settings.dtype
    compile_vision(
        checkpoint,
        buckets,
        DTYPES[dtype],
        out,
        in_chunks=settings.column_chunks,
        report=lambda line: print(line, flush=True),
    )


def run() -> int:
    """Run the command and return its exit status."""
    write_utf8()
    parser = argparse.ArgumentParser("twinlens compile", description=__doc__, allow_abbrev=False)
    settings = load(CompileSettings, parser, None, KNOWN_NAMES)
    try:
        main(settings)
    except (BadCheckpoint, BadSetting, BadGraph, UnfitPlan) as e:
        print(f"twinlens compile: {e}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run())

"""The compiler that every machine has: torch.export, whose programs torch runs on any device.

weights.safetensors   the weights of all programs, once
graph-NAME.json       a program: portable ATen operations (`graph.py`)

Neither file is code: a graph can only call operations of a table, and nothing is unpickled.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint import BadCheckpoint
from common.model_files import read_file
from common.safetensors_files import read_table
from common.vision_artefact import VisionArtefact
from services.vision.compilers.compiler import TowerProgram
from services.vision.compilers.graph import (
    BadGraph,
    Program,
    check_results,
    graph_of,
    read_graph,
)

WEIGHTS = "weights.safetensors"
DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
"""The types of weights, as safetensors names them."""


def graph_file(name: str) -> str:
    return f"graph-{name}.json"


class TorchExport:
    """Implements `Compiler`."""

    name = "torch.export"
    version = str(torch.__version__)

    def compile(
        self, programs: list[TowerProgram], folder: Path, report: Callable[[str], None]
    ) -> list[str]:
        """Raises BadGraph if a program cannot be written."""
        weights = {
            id(constant): constant
            for program in programs
            for constant in program.exported.constants.values()
        }
        names = {key: f"weight.{number}" for number, key in enumerate(weights)}
        written = []
        for program in programs:
            name = program.compiled.name
            graph = graph_of(program.exported, names)
            (folder / graph_file(name)).write_bytes(msgspec.json.encode(graph))
            written.append(graph_file(name))
            report(f"program {name}: {len(graph.steps)} operations")
        # Cloned, because a safetensors file holds no views of other tensors.
        stored = {names[key]: weight.detach().clone() for key, weight in weights.items()}
        save_file(stored, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors lets only the owner read it
        num_bytes = sum(weight.nbytes for weight in stored.values())
        report(f"weights: {len(stored)} tensors, {num_bytes / 2**20:.1f} MiB")
        return [WEIGHTS, *written]

    def load(
        self,
        artefact: VisionArtefact,
        device: torch.device,
        report_loading: Callable[[float], None],
    ) -> "LoadedGraphs":
        weights = load_weights(artefact, device, report_loading)
        programs = {}
        for compiled in artefact.manifest.programs:
            file = artefact.file(graph_file(compiled.name))
            try:
                graph = read_graph(read_file(file))
                check_results(graph, compiled.inputs, weights, artefact.manifest.column_widths)
                programs[compiled.name] = Program(graph, weights, device)
            except BadGraph as e:
                raise BadCheckpoint(f"{file} is damaged: {e}") from e
        return LoadedGraphs(programs)


class LoadedGraphs:
    """The loaded programs by their names. Implements `Runtime`."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self._programs = programs

    def run(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        program = self._programs[name]
        return program.run([x.to(program.device) for x in inputs])


def load_weights(
    artefact: VisionArtefact, device: torch.device, report_loading: Callable[[float], None]
) -> dict[str, Tensor]:
    """Load all weights. The file is read once: it is checked while its tensors are loaded.

    Raises
    ------
    BadCheckpoint
        if it is damaged.
    """
    file = artefact.path / WEIGHTS
    table = sorted(read_table(file).items(), key=lambda entry: entry[1].offset)
    digest = hashlib.sha256()
    weights: dict[str, Tensor] = {}
    with file.open("rb") as opened:
        digest.update(opened.read(table[0][1].offset if table else 0))
        for number, (name, info) in enumerate(table, 1):
            data = torch.empty(info.num_bytes, dtype=torch.uint8)
            if info.dtype not in DTYPES or opened.tell() != info.offset:
                raise BadCheckpoint(f"{file} is damaged: {name[:80]} is not one of our tensors")
            opened.readinto(data.numpy().data)
            digest.update(data.numpy().data)
            weights[name] = data.view(DTYPES[info.dtype]).reshape(info.shape).to(device)
            report_loading(number / len(table))
        digest.update(opened.read())
    artefact.check_digest(WEIGHTS, digest.hexdigest())
    return weights

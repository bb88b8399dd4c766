"""Finds the files with the weights of a model directory, and reads their tables of contents."""

from pathlib import Path

from common import safetensors_files, torch_files
from common.families.family import BadCheckpoint
from common.model_files import read_json, shown
from common.tensor_info import TensorInfo

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""The files that name the shards, the preferred format first."""


def find_weight_files(model: Path) -> list[Path]:
    """Return the files of one of the usual layouts. Return none if there is none.

    The files that an index names need not exist.

    Raises
    ------
    BadCheckpoint
        if an index is damaged, or names a file that is not in the directory.
    """
    for index in (model / name for name in INDEXES):
        if index.exists():
            return read_index(index)
        if (file := index.with_name(index.name.removesuffix(".index.json"))).exists():
            return [file]
    return []


def read_index(index: Path) -> list[Path]:
    """Return the files that an index of shards names. They need not exist."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise BadCheckpoint(f"{index} has no weight_map of tensor names to files")
    if not weight_map:
        raise BadCheckpoint(f"{index} lists no tensors: download the whole repository")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise BadCheckpoint(
                f"{index} names the weight file {shown(name)}, which is not in this directory"
            )
    return [index.with_name(name) for name in names]


def read_table(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file of weights by their names.

    A file is a safetensors file if its name says so; otherwise it is a torch file.

    Raises
    ------
    BadCheckpoint
        if it is not such a file, or is damaged.
    """
    if not file.is_file():
        raise BadCheckpoint(f"{file} is not a regular file")
    if file.suffix == ".safetensors":
        return safetensors_files.read_table(file)
    return torch_files.read_table(file)

"""`twinlens convert`: writes a model directory with other names of its tensors."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from common.families import FAMILIES, BadCheckpoint
from common.model_files import check_place, parse_json, read_json
from common.process import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from common.safetensors_files import read_table
from common.weight_files import INDEXES, find_weight_files

CONVERT_HELP = """Write a copy of a model directory whose tensors have the family's short names. For
wemm that removes `original_linear.` from the names of the published files. Both are served alike;
other software may want one of them. Weights are copied one file at a time."""
LENGTH_BYTES = 8
ALIGNMENT = 8
"""The data of a safetensors file begin at a multiple of this number of bytes."""
METADATA = "__metadata__"
"""The entry of the table that is no tensor."""
CHUNK_BYTES = 16 * 2**20

Rename = Callable[[str], str]


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = CONVERT_HELP
    convertible = sorted(name for name, family in FAMILIES.items() if family.converts_names)
    parser.add_argument("family", choices=convertible, help="the family of the model")
    parser.add_argument("--model", required=True, type=Path, help="the model directory")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the copy")


def convert(arguments: argparse.Namespace) -> int:
    """Convert a model directory, and return the exit status."""
    try:
        convert_model(arguments.model, arguments.out, FAMILIES[arguments.family].canonical_name)
    except BadCheckpoint as e:
        print(f"twinlens convert: {e}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as e:
        print(f"twinlens convert: {e.filename or arguments.out}: {e.strerror}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def convert_model(model: Path, out: Path, rename: Rename) -> None:
    """Copy a model directory into the new folder `out`, with other names of its tensors.

    Raises
    ------
    BadCheckpoint
        if it is not one in safetensors format, two tensors would have one name, or `out` exists.
    """
    if not (model / "config.json").exists():
        raise BadCheckpoint(f"{model} has no config.json: give --model a model directory")
    if out.exists():
        raise BadCheckpoint(f"{out} exists and is not overwritten: give --out a new folder")
    weights = find_weight_files(model)
    check_weights(model, weights, rename)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in sorted(model.iterdir()):
        target = unfinished / file.name
        if file in weights:
            copy_weights(file, target, rename)
        elif file.name in INDEXES:
            copy_index(file, target, rename)
        elif file.is_file():
            check_place(model, file)
            shutil.copyfile(file, target)
    unfinished.rename(out)


def check_weights(model: Path, weights: list[Path], rename: Rename) -> None:
    """Raise BadCheckpoint if a file is missing, or two tensors would have the same name."""
    if not weights or any(file.suffix != ".safetensors" for file in weights):
        raise BadCheckpoint(f"{model} has no weights in safetensors format")
    if missing := [file.name for file in weights if not file.exists()]:
        raise BadCheckpoint(f"{model} is incomplete: {', '.join(missing[:5])} missing")
    names: dict[str, str] = {}
    for name in (name for file in weights for name in read_table(file)):
        other = names.setdefault(rename(name), name)
        if other != name:
            raise BadCheckpoint(f"{model}: {other} and {name} would have the same name")


def copy_weights(file: Path, target: Path, rename: Rename) -> None:
    """Copy a safetensors file. Only its table of contents changes."""
    with file.open("rb") as source, target.open("wb") as copy:
        length = int.from_bytes(source.read(LENGTH_BYTES), "little")
        entries = parse_json(source.read(length), str(file))
        renamed = {
            name if name == METADATA else rename(name): entry for name, entry in entries.items()
        }
        table = json.dumps(renamed, ensure_ascii=False, separators=(",", ":")).encode()
        table += b" " * (-(LENGTH_BYTES + len(table)) % ALIGNMENT)
        copy.write(len(table).to_bytes(LENGTH_BYTES, "little") + table)
        shutil.copyfileobj(source, copy, CHUNK_BYTES)


def copy_index(file: Path, target: Path, rename: Rename) -> None:
    content = read_json(file)
    content["weight_map"] = {rename(name): shard for name, shard in content["weight_map"].items()}
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

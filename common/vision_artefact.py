"""A compiled vision tower: a folder from which a vision service starts without the model directory.

manifest.json   what was compiled for what, and the SHA-256 of every other file
config.json ... the small files of the model that say which items it takes
(others)        whatever the compiler made; only its own runtime reads that

Nothing in it is executed or unpickled before its manifest fits. What a compiler's files may do is
said by its runtime (`services/vision/compilers`).
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from common.buckets import MAX_BUCKET_PATCHES
from common.checkpoint import Checkpoint, TensorInfo
from common.config import BadSetting
from common.families import FAMILIES, BadCheckpoint
from common.messages import MAX_BUCKETS
from common.model_files import check_place, read_file, read_json, shown
from common.sizing import ITEM_BYTES

MANIFEST = "manifest.json"
FORMAT = "twinlens-vision-artefact"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20
MODEL_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
"""The files of a model that are copied if it has them, besides those that its family requires."""


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of the model's own files. The artefact need not hold it in this form."""

    dtype: str
    """The name of the type in safetensors: BF16, F32, ..."""
    shape: tuple[int, ...]


class ProgramInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that a program gets for each item."""

    name: str
    """`patches`, or a field of the plan."""
    dtype: str
    """uint8, bool, int64, float32, ..."""
    shape: tuple[int, ...]


class CompiledProgram(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tower at one static shape.

    A bucket has several if the plans of its items differ in more than the values of tensors.
    """

    name: str
    """A name for files."""
    num_patches: int
    """The bucket: the most patches of an item that is encoded with it."""
    length: int
    """The patches that it computes with, padding included."""
    inputs: tuple[ProgramInput, ...]
    """In the order in which it gets them. The patches come first."""
    plan_values: str
    """The plain values of the plans that it was made for."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an artefact is made for."""

    format: str
    format_version: int
    compiler: str
    compiler_version: str
    model: str
    """The name of the model's directory, for people."""
    family: str
    """The `model_type` of the model."""
    fingerprint: str
    """The model's fingerprint, under which the service joins the others."""
    dtype: str
    """The dtype of the embeddings."""
    values_per_patch: int
    column_widths: tuple[int, ...]
    """The widths of the parts in which the embeddings leave the tower, in order."""
    programs: tuple[CompiledProgram, ...]
    """In rising order of their patches."""
    tensors: dict[str, StoredTensor]
    """The tower's tensors by their names in the model's files, which say what its plans are."""
    files: dict[str, str]
    """The SHA-256 of every other file, by its name."""

    @property
    def output_width(self) -> int:
        return sum(self.column_widths)


@dataclass(frozen=True)
class CompiledCheckpoint(Checkpoint):
    """What an artefact keeps of its model: the configuration and the names, but no weights."""

    manifest: Manifest

    has_weights = False

    @property
    def name(self) -> str:
        return self.manifest.model

    @cached_property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @cached_property
    def stored_tensors(self) -> dict[str, TensorInfo]:
        """The tower's tensors. Their values are nowhere."""
        return {
            name: TensorInfo(self.path / MANIFEST, stored.dtype, stored.shape, 0, 0)
            for name, stored in self.manifest.tensors.items()
        }


@dataclass(frozen=True)
class VisionArtefact:
    """An opened artefact. Its large files are not checked before they are loaded."""

    path: Path
    manifest: Manifest

    @cached_property
    def checkpoint(self) -> CompiledCheckpoint:
        """The model, without its weights."""
        return CompiledCheckpoint(self.path, read_json(self.path / "config.json"), self.manifest)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The patch counts that it was compiled for, in rising order."""
        return tuple(dict.fromkeys(program.num_patches for program in self.manifest.programs))

    def file(self, name: str) -> Path:
        """Return the path of one of the artefact's files, after a check of its contents.

        Raises
        ------
        BadCheckpoint
            if the file is missing or was changed.
        """
        path = self.path / name
        if not path.is_file():
            raise incomplete(self.path, name)
        self.check_digest(name, sha256_of(path))
        return path

    def check_digest(self, name: str, digest: str) -> None:
        """Check that a file with this SHA-256 is the one that was compiled.

        Raises
        ------
        BadCheckpoint
            if it is another one, or the artefact has no such file.
        """
        if name not in self.manifest.files:
            raise incomplete(self.path, name)
        if digest != self.manifest.files[name]:
            raise BadCheckpoint(
                f"{self.path / name} is damaged: it is not the file that was compiled"
            )


def incomplete(path: Path, name: str) -> BadCheckpoint:
    return BadCheckpoint(f"{path} is incomplete: {name} is missing; compile it again")


def open_artefact(path: str | Path) -> VisionArtefact:
    """Open a compiled vision tower, and check all of it but the compiler's own files.

    Raises
    ------
    BadCheckpoint
        if it is missing, incomplete, damaged, or made by another version.
    """
    path = Path(path).expanduser()
    if not (path / MANIFEST).exists():
        raise BadCheckpoint(
            f"no vision artefact {path}: it has no {MANIFEST}; make one with `twinlens compile`"
        )
    check_place(path, path / MANIFEST)
    manifest = parse_manifest(path / MANIFEST)
    artefact = VisionArtefact(path, manifest)
    for name in manifest.files:
        if not (path / name).is_file():
            raise incomplete(path, name)
    for name in manifest.files.keys() & set(model_files(manifest.family)):
        check_place(path, path / name)
        artefact.file(name)
    artefact.checkpoint.check()
    if artefact.checkpoint.family.model_type != manifest.family:
        raise BadCheckpoint(f"{path}: config.json is not of the family {shown(manifest.family)}")
    return artefact


def parse_manifest(file: Path) -> Manifest:
    """Read and check a manifest. Raises BadCheckpoint if it is not one that can be used."""
    data = read_file(file, MAX_MANIFEST_BYTES)
    fields = read_json(file)
    if fields.get("format") != FORMAT:
        raise BadCheckpoint(f"{file} is not the manifest of a vision artefact")
    if fields.get("format_version") != FORMAT_VERSION:
        raise BadCheckpoint(
            f"{file.parent} has version {shown(fields.get('format_version'))} of the format, and "
            f"this is a Twinlens that reads version {FORMAT_VERSION}: compile the model again"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as e:
        raise BadCheckpoint(f"{file} is damaged: {e}") from e
    if reason := objection_to(manifest):
        raise BadCheckpoint(f"{file} is damaged: {reason}")
    if manifest.family not in FAMILIES:
        raise BadCheckpoint(
            f"{file.parent} is of the family {shown(manifest.family)}, which is not supported"
        )
    return manifest


def objection_to(manifest: Manifest) -> str:
    """Return what is wrong with the values of a manifest; empty if nothing is."""
    counts = [program.num_patches for program in manifest.programs]
    if not 1 <= len(set(counts)) <= MAX_BUCKETS or counts != sorted(counts):
        return "its programs are not in the order of their patches"
    for program in manifest.programs:
        if not 1 <= program.num_patches <= program.length <= 2 * MAX_BUCKET_PATCHES:
            return f"{program.num_patches} patches do not fit into {program.length}"
    if not manifest.column_widths or min(manifest.column_widths) < 1:
        return "it has no columns"
    if manifest.dtype not in ITEM_BYTES:
        return f"its dtype {shown(manifest.dtype)} is not that of embeddings"
    names = [*manifest.files, *(program.name for program in manifest.programs)]
    if any(Path(name).name != name or "\0" in name for name in names):
        return "it names a file that is not in its folder"
    if "config.json" not in manifest.files:
        return "it names no config.json"
    return ""


def model_files(family: str) -> tuple[str, ...]:
    """Return the names of the model's files that an artefact of this family holds."""
    return tuple(dict.fromkeys((*MODEL_FILES, *FAMILIES[family].required_files)))


def copy_model_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy what an artefact needs of the model besides its tower, and return the names."""
    names = model_files(checkpoint.family.model_type)
    present = [name for name in names if (checkpoint.path / name).exists()]
    for name in present:
        check_place(checkpoint.path, checkpoint.path / name)
        shutil.copyfile(checkpoint.path / name, folder / name)
    return present


def tower_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the tensors of the vision tower by their names in the model's files."""
    family = checkpoint.family
    return {
        name: StoredTensor(info.dtype, info.shape)
        for name, info in checkpoint.tensors.items()
        if family.canonical_name(name).startswith(family.tower_prefixes)
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which is the last file of an artefact."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (folder / MANIFEST).write_bytes(text + b"\n")


def hashes_of(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in names}


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_artefact_settings(
    artefact: VisionArtefact, settings: Mapping[str, object], fingerprint: str | None = None
) -> None:
    """Check that the settings of a vision service go with its artefact.

    Raises
    ------
    BadSetting
        if one of them says otherwise than the artefact. `fingerprint` is that of the model which
        the rest of the system serves, if it is known.
    """
    if fingerprint not in (None, artefact.manifest.fingerprint):
        raise BadSetting(
            f"--vision-artefact {artefact.path}: it was compiled from another model "
            f"({artefact.manifest.model}): compile --model again"
        )
    if settings["vision_buckets"]:
        compiled = ",".join(map(str, artefact.buckets))
        raise BadSetting(
            f"--vision-buckets: the vision artefact has the buckets that it was compiled for "
            f"({compiled}); leave the flag out"
        )
    if settings["simulate_vision_ms"] is not None:
        raise BadSetting("--simulate-vision-ms needs no --vision-artefact: leave one of them out")
    if settings["dtype"] not in ("auto", artefact.manifest.dtype):
        raise BadSetting(
            f"--dtype {settings['dtype']}: the vision artefact was compiled in "
            f"{artefact.manifest.dtype}; compile it again with another --dtype"
        )

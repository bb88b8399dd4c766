"""A model directory in Hugging Face layout: its configuration, tensors and fingerprint."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from common.config_checks import CONFIG, GENERATION, PREPROCESSOR, ROPE, SIZE, check_fields
from common.families import FAMILIES, BadCheckpoint, Family, ModelSizes
from common.model_files import (
    MAX_SHOWN_CHARS,
    check_place,
    parse_json,
    read_file,
    read_json,
    read_optional_json,
    shown,
)

__all__ = ["BadCheckpoint", "Checkpoint", "TensorInfo", "open_checkpoint"]

INDEX = "model.safetensors.index.json"
FINGERPRINTED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)
MAX_HEADER_BYTES = 100 * 2**20
SAMPLE_BYTES = 64
MAX_TENSORS = 2**20
MAX_DIMENSIONS = 8
MAX_NAME_CHARS = 1024
ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""The size of an element by its type. Other types are not checked, and not loaded either."""


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in its file, its type and its shape."""

    file: Path
    dtype: str
    """The name of the type in safetensors: BF16, F32, ..."""
    shape: tuple[int, ...]
    num_bytes: int
    offset: int
    """The position of its first byte in the file."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened, checked model directory."""

    path: Path
    config: dict[str, Any]

    has_weights: ClassVar[bool] = True
    """Whether `tensors` can be read. Those of a compiled model have only names and shapes."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def family(self) -> Family:
        return FAMILIES[self.config["model_type"]]

    @property
    def required_files(self) -> tuple[str, ...]:
        """What the directory must hold besides config.json and the weights."""
        return self.family.vocabulary_file, *self.family.required_files

    @cached_property
    def sizes(self) -> ModelSizes:
        """The sizes of the language model. Raises BadCheckpoint if config.json lacks one."""
        return self.family.sizes(self)

    @property
    def patches_per_token(self) -> int:
        """The number of an item's patches that become one embedding."""
        return self.family.patches_per_token(self)

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The language model's configuration.

        Published files are flat. transformers 5 nests it in `text_config`.
        """
        flat = {k: v for k, v in self.config.items() if k not in ("vision_config", "text_config")}
        return flat | self._section("text_config")

    @cached_property
    def vision_config(self) -> dict[str, Any]:
        return self._section("vision_config")

    def _section(self, name: str) -> dict[str, Any]:
        """Return an object in config.json, which is empty if it is missing."""
        section = self.config.get(name, {})
        if not isinstance(section, dict):
            raise BadCheckpoint(f"{self.path}: {name} in config.json is not an object")
        return section

    def check(self) -> None:
        """Check the fields of config.json, and that no file leads out of the directory.

        Raises
        ------
        BadCheckpoint
            if something is wrong; the message names it.
        """
        file = self.path / "config.json"
        for config in (self.text_config, self.vision_config):
            check_fields(config, CONFIG, file)
            for name in ("rope_parameters", "rope_scaling"):
                check_fields(config.get(name) or {}, ROPE, file)
        for name in (*FINGERPRINTED, INDEX):
            check_place(self.path, self.path / name)

    @property
    def max_model_len(self) -> int:
        """The context in tokens, prompt and answer together."""
        try:
            return self.family.max_model_len(self)
        except KeyError as e:
            raise BadCheckpoint(f"{self.path}: config.json lacks {e}") from e

    @property
    def dtype(self) -> str:
        """The dtype that the weights are stored in, as torch names it."""
        return (
            self.config.get("dtype")
            or self.config.get("torch_dtype")
            or self.text_config.get("dtype")
            or "bfloat16"
        )

    @cached_property
    def preprocessor_config(self) -> dict[str, Any]:
        file = self.path / "preprocessor_config.json"
        config = read_json(file)
        check_fields(config, PREPROCESSOR, file)
        check_fields(config.get("size") or {}, SIZE, file)
        return config

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's own sampling defaults; empty if it has none."""
        file = self.path / "generation_config.json"
        config = read_optional_json(file)
        check_fields(config, GENERATION, file)
        return config

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ids = self.generation_config.get("eos_token_id", self.text_config.get("eos_token_id"))
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all safetensors files, by their names in the files."""
        return {
            name: info for file in self.weight_files for name, info in read_header(file).items()
        }

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files. They need not exist."""
        index = self.path / INDEX
        if not index.exists():
            return [self.path / "model.safetensors"]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise BadCheckpoint(f"{index} has no weight_map of tensor names to files")
        names = sorted(set(weight_map.values()))
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
                raise BadCheckpoint(
                    f"{index} names the weight file {shown(name)}, which is not in this directory"
                )
        return [self.path / name for name in names]

    @cached_property
    def fingerprint(self) -> str:
        """A name of the model.

        Two directories with one fingerprint hold the same configuration, and the same tensors by
        name, type and place. The weights are too large to be read by every process: a few bytes of
        each tensor distinguish a fine-tuned model from its base.
        """
        digest = hashlib.sha256()
        for name in dict.fromkeys((*FINGERPRINTED, *self.required_files)):
            if (file := self.path / name).exists():
                digest.update(name.encode() + b"\0" + read_file(file) + b"\0")
        for name, info in sorted(self.tensors.items()):
            digest.update(
                f"{name} {info.file.name} {info.dtype} {info.shape}\n".encode() + read_sample(info)
            )
        return digest.hexdigest()[:16]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory and check that it is whole.

    Raises
    ------
    BadCheckpoint
        if it is missing or incomplete, or its family is not supported.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise BadCheckpoint(
            f"no model directory {path}: give --model a folder with config.json, the tokenizer and "
            "*.safetensors"
        )
    if not (path / "config.json").exists():
        raise BadCheckpoint(
            f"{path} has no config.json: it is not a model directory in Hugging Face layout"
        )
    check_place(path, path / "config.json")
    checkpoint = Checkpoint(path, read_json(path / "config.json"))
    checkpoint.check()
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items())
        raise BadCheckpoint(
            f"{path} is of the family {model_type!r}, which is not supported; supported: {known}"
        )
    for name in checkpoint.required_files:
        if not (path / name).exists():
            raise BadCheckpoint(
                f"{path} is incomplete: {name} is missing; download the whole repository"
            )
        check_place(path, path / name)
    missing = [file.name for file in checkpoint.weight_files if not file.exists()]
    if missing:
        raise BadCheckpoint(
            f"{path} is incomplete: {', '.join(missing[:5])} missing; download the whole repository"
        )
    if not checkpoint.tensors:
        raise BadCheckpoint(f"{path} holds no tensors: download the whole repository")
    return checkpoint


def read_sample(info: TensorInfo) -> bytes:
    """Read some bytes from the middle of a tensor.

    Its beginning may hold the embeddings of tokens that no training changes.
    """
    with info.file.open("rb", buffering=0) as f:
        f.seek(info.offset + info.num_bytes // 2)
        return f.read(min(SAMPLE_BYTES, info.num_bytes - info.num_bytes // 2))


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the table of contents of a safetensors file.

    The file begins with the length of the table in 8 bytes, and the table itself in JSON
    (https://huggingface.co/docs/safetensors).
    """
    if not file.is_file():
        raise BadCheckpoint(f"{file} is not a regular file")
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise BadCheckpoint(
                f"{file} is not a safetensors file, or is cut off: download it again"
            )
        table = f.read(length)
    try:
        header = parse_json(table, "its table of contents")
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{file} is not a safetensors file: {e}") from e
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise BadCheckpoint(f"{file} has more than {MAX_TENSORS} tensors")
    return {name: read_entry(file, name, entry, 8 + length, size) for name, entry in header.items()}


def read_entry(file: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    """Return one tensor of a file of `size` bytes. The file's data begins at byte `start`."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end
            and all(type(n) is int and 0 <= n <= size for n in shape)
            and len(shape) <= MAX_DIMENSIONS
            and len(name) <= MAX_NAME_CHARS
        ):
            pass
        case _:
            raise BadCheckpoint(
                f"{file} is not a safetensors file: its entry of {name[:MAX_SHOWN_CHARS]} is "
                "malformed"
            )
    if dtype in ITEM_BITS and prod(shape) * ITEM_BITS[dtype] != 8 * (end - begin):
        raise BadCheckpoint(
            f"{file} is damaged: {name[:MAX_SHOWN_CHARS]} has {end - begin} bytes, which is not "
            f"{shape} of {dtype}; download it again"
        )
    if start + end > size:
        raise BadCheckpoint(f"{file} is cut off at {size} bytes: download it again")
    return TensorInfo(file, dtype, tuple(shape), end - begin, start + begin)

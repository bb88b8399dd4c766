"""A model directory in Hugging Face layout: its configuration, tensors and fingerprint."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from common.config_checks import CONFIG, GENERATION, PREPROCESSOR, ROPE, SIZE, check_fields
from common.embedding_table import find_table, table_info
from common.families import FAMILIES, BadCheckpoint, Family, ModelSizes
from common.model_files import check_place, read_file, read_json, read_optional_json, shown
from common.quantization import read_schemes
from common.quantized_weights import QuantizedWeight, find_quantized
from common.tensor_info import TensorInfo
from common.weight_files import INDEXES, find_weight_files, read_table

__all__ = ["BadCheckpoint", "Checkpoint", "TensorInfo", "open_checkpoint"]

FINGERPRINTED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)
ALTERNATIVES = {"preprocessor_config.json": "processor_config.json"}
"""The files in which transformers 5 writes what older ones held."""
SAMPLE_BYTES = 64
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What torch calls the types of weights, by their names in safetensors."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened, checked model directory."""

    path: Path
    config: dict[str, Any]
    embeddings: Path | None = field(default=None, kw_only=True)
    """A file with the token embeddings, which replace those among the weights."""
    rank: int = field(default=0, kw_only=True)
    """Whose tensors these are, if the weights were cut into a file for each rank."""

    has_weights: ClassVar[bool] = True
    """Whether `tensors` can be read. Those of a compiled model have only names and shapes."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def names(self) -> tuple[str, ...]:
        """What the model may be called.

        It is the name of its folder, that of its repository if the folder is in the cache of a hub
        (`models--OWNER--NAME/snapshots/REVISION`), and the one in config.json.
        """
        folder = self.path.resolve()
        repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
        said = self.config.get("_name_or_path")
        found = (folder.name, repository, said if isinstance(said, str) else "")
        return tuple(filter(None, found))

    @cached_property
    def family(self) -> Family:
        """The family of the model. Raises BadCheckpoint if it is not supported."""
        for family in FAMILIES.values():
            if family.recognises(self.path, self.config):
                return family
        if not (self.path / "config.json").exists():
            raise BadCheckpoint(f"{self.path} has no config.json: it is not a model directory")
        known = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items())
        raise BadCheckpoint(
            f"{self.path} is of the family {shown(self.config.get('model_type'))}, which is not "
            f"supported; supported: {known}"
        )

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
        """A number of which the patch counts of items are multiples."""
        return self.family.patches_per_token(self)

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The language model's configuration.

        Published files are flat. Newer transformers nest it in `text_config`, or write both; some
        of them write null there for what only the flat part says.
        """
        flat = {k: v for k, v in self.config.items() if k not in ("vision_config", "text_config")}
        nested = self.section("text_config")
        return flat | {k: v for k, v in nested.items() if v is not None or k not in flat}

    @cached_property
    def vision_config(self) -> dict[str, Any]:
        """The vision tower's configuration, which Qwen-VL calls `visual`."""
        return self.section("vision_config") or self.section("visual")

    def section(self, name: str) -> dict[str, Any]:
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
        for name in self.family.config_sections:
            section = self.section(name)
            check_fields(section, CONFIG, file)
            check_fields(section.get("size") or {}, SIZE, file)
        for name in (*FINGERPRINTED, *INDEXES, *self.family.optional_files):
            check_place(self.path, self.path / name)

    def check_stage(self, role: str) -> None:
        """Raise BadCheckpoint unless requests to this model pass through a role."""
        stages = self.family.stages_of(self)
        if role not in stages:
            raise BadCheckpoint(
                f"{self.path}: {self.family.title} needs no {role} service, only "
                f"{', '.join(('gateway', *stages))} and the controller: do not start this one"
            )

    @property
    def max_model_len(self) -> int:
        """The context in tokens, prompt and answer together."""
        try:
            return self.family.max_model_len(self)
        except KeyError as e:
            raise BadCheckpoint(f"{self.path}: config.json lacks {e}") from e

    def objection_to_context(self, length: int) -> str:
        """Return why the model cannot be served with this context; empty if it can."""
        if not 0 < length <= self.max_model_len:
            return f"the model's context is {self.max_model_len}: give at most that"
        if length < self.max_model_len and self.family.prompt_forms(self) is not None:
            return f"this model's prompts need a context of {self.max_model_len}: leave it out"
        return ""

    @property
    def dtype(self) -> str:
        """The dtype that the weights are stored in, as torch names it."""
        return (
            self.config.get("dtype")
            or self.config.get("torch_dtype")
            or self.text_config.get("dtype")
            or self._stored_dtype
        )

    @property
    def _stored_dtype(self) -> str:
        """The dtype of the largest tensor."""
        largest = max(self.stored_tensors.values(), key=lambda info: info.num_bytes)
        return DTYPES.get(largest.dtype, "bfloat16")

    @cached_property
    def preprocessor_config(self) -> dict[str, Any]:
        """How items are prepared: preprocessor_config.json, or what newer files say instead."""
        file = self.path / "preprocessor_config.json"
        config: Any = read_optional_json(file)
        if not file.exists():
            file = self.path / ALTERNATIVES[file.name]
            config = read_json(file).get("image_processor")
        if not isinstance(config, dict):
            raise BadCheckpoint(f"{file} does not say how images are prepared")
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
        named = tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)
        return tuple(dict.fromkeys((*named, *self.family.end_token_ids(self))))

    @cached_property
    def stored_tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all files with weights, by their names in the files."""
        return {name: info for file in self.weight_files for name, info in read_table(file).items()}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by their names in the files, with the embeddings from their own file."""
        if self.embeddings is None:
            return self.stored_tensors
        name, shape = self.embedding_table
        return self.stored_tensors | {name: table_info(self.embeddings, shape)}

    @cached_property
    def quantized(self) -> dict[str, QuantizedWeight]:
        """The quantized weights, by the canonical names that they would have as one tensor.

        Raises BadCheckpoint if they are in a format that is not supported, or are damaged.
        """
        schemes = read_schemes(self.config, self.path / "config.json")
        found = find_quantized(schemes, self.stored_tensors)
        return {self.family.canonical_name(name): weight for name, weight in found.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights by their canonical names.

        Quantized weights have the shape of the weights that they mean.
        """
        canonical = {self.family.canonical_name(n): info.shape for n, info in self.tensors.items()}
        plain = {name: shape for name, shape in canonical.items() if not self.is_quantized(name)}
        return plain | {name: weight.shape for name, weight in self.quantized.items()}

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor, by its canonical name, is a part of quantized weights."""
        module, _, last = name.rpartition(".")
        return last != "bias" and f"{module}.weight" in self.quantized

    def check_quantized(self) -> None:
        """Raise BadCheckpoint as `quantized` does."""
        _ = self.quantized

    @property
    def embedding_table(self) -> tuple[str, tuple[int, ...]]:
        """The name and the shape of the token embeddings, which need not be among the weights."""
        wanted = self.family.embedding_name
        for name, info in self.stored_tensors.items():
            if self.family.canonical_name(name) == wanted:
                return name, info.shape
        return wanted, (self.sizes.vocab_size, self.sizes.hidden_size)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files with the weights. They need not exist."""
        found = find_weight_files(self.path) or self.family.weight_files(self.path, self.rank)
        return found or [self.path / "model.safetensors"]

    @cached_property
    def fingerprint(self) -> str:
        """A name of the model.

        Two directories with one fingerprint hold the same configuration, and the same tensors by
        name, type and place. The weights are too large to be read by every process: a few bytes of
        each tensor distinguish a fine-tuned model from its base. Embeddings in a file of their own
        are not covered: only language groups know of them.
        """
        digest = hashlib.sha256()
        names = (*FINGERPRINTED, *self.required_files, *self.family.optional_files)
        for name in dict.fromkeys(names):
            if (file := self.path / name).exists():
                digest.update(name.encode() + b"\0" + read_file(file) + b"\0")
        for name, info in sorted(self.stored_tensors.items()):
            digest.update(
                f"{name} {info.file.name} {info.dtype} {info.shape}\n".encode() + read_sample(info)
            )
        return digest.hexdigest()[:16]


def open_checkpoint(path: str | Path, embeddings: str = "") -> Checkpoint:
    """Open a model directory and check that it is whole.

    `embeddings` is a file with the token embeddings in float16, or its folder.

    Raises
    ------
    BadCheckpoint
        if it is missing or incomplete, or its family is not supported, or the embeddings are not
        those of the model.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise BadCheckpoint(
            f"no model directory {path}: give --model a folder with config.json, the tokenizer and "
            "the weights"
        )
    check_place(path, path / "config.json")
    config = read_optional_json(path / "config.json")
    table = find_table(embeddings) if embeddings else None
    checkpoint = Checkpoint(path, config, embeddings=table)
    checkpoint.check()
    for name in checkpoint.required_files:
        names = (name, ALTERNATIVES.get(name, name))
        if not any((path / name).exists() for name in names):
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
    checkpoint.family.check(checkpoint)
    checkpoint.check_quantized()
    return checkpoint


def read_sample(info: TensorInfo) -> bytes:
    """Read some bytes from the middle of a tensor.

    Its beginning may hold the embeddings of tokens that no training changes.
    """
    with info.file.open("rb", buffering=0) as f:
        f.seek(info.offset + info.num_bytes // 2)
        return f.read(min(SAMPLE_BYTES, info.num_bytes - info.num_bytes // 2))

"""LoRA adapters in the layout of PEFT, read and checked without torch.

A directory holds adapter_config.json and adapter_model.safetensors
(https://huggingface.co/docs/peft/developer_guides/checkpoint). An adapter adds B @ A * scale to the
weights of some modules. It may be made to do harm.
"""

import io
import math
import re
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

from common.checkpoint import BadCheckpoint, Checkpoint
from common.model_files import check_place, parse_json, read_file, shown
from common.safetensors_files import parse_table
from common.tensor_info import TensorInfo

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_TABLE_BYTES = 16 * 2**20
"""The most that an adapter's file holds besides its tensors."""
ITEM_BYTES = 4
"""The most bytes of an element."""
DTYPES = ("F32", "F16", "BF16")
IDENTITY_BYTES = 32

TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")
LITERAL_KEY = re.compile(r"[\w.]+")
"""A key of `rank_pattern` that is a name. PEFT allows regular expressions, too."""
RELATIVE_TO_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations of which the training changes the base, so the pairs do not fit the model."""
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "megatron_config",
)
"""The keys of adapter_config.json that must be absent or empty, because they change what an adapter
computes."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """What an adapter adds to one module: B @ A * scale."""

    layer: int
    module: str
    """The name of the module in its layer, as `Family.lora_modules` has it."""
    a: TensorInfo
    """[rank, inputs of the module]."""
    b: TensorInfo
    """[outputs of the module, rank]."""
    scale: float


@dataclass(frozen=True)
class LoraFiles:
    """A checked adapter, as its directory held it at one moment."""

    path: Path
    pairs: tuple[LoraPair, ...]
    data: bytes
    """The file with the tensors, into which the offsets of the pairs point."""
    identity: bytes
    """Hash of both files: adapters with equal hashes compute the same."""


def open_adapter(path: str | Path, checkpoint: Checkpoint, max_rank: int) -> LoraFiles:
    """Read an adapter, and check that it fits the model.

    Raises
    ------
    BadCheckpoint
        if it is incomplete or damaged, does not fit the model, or asks for something that is not
        supported; the message names it.
    """
    path = Path(path).expanduser()
    family = checkpoint.family
    if not family.lora_modules:
        raise BadCheckpoint(f"{path}: there are no LoRA adapters for {family.title}")
    if not path.is_dir():
        raise BadCheckpoint(
            f"no directory {path}: a LoRA adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    check_place(path, path / CONFIG_FILE)
    config_data = read_file(path / CONFIG_FILE, MAX_CONFIG_BYTES)
    config = LoraConfig(path / CONFIG_FILE, parse_json(config_data, str(path / CONFIG_FILE)))
    file = path / WEIGHTS_FILE
    if not file.exists():
        raise BadCheckpoint(
            f"{path} has no {WEIGHTS_FILE}: weights in other formats are not read; save the "
            "adapter with safe_serialization"
        )
    modules = modules_of(checkpoint)
    data = read_file(file, MAX_TABLE_BYTES + most_bytes(modules, max_rank))
    table = parse_table(file, io.BytesIO(data), len(data))
    pairs = PairReader(file, config, checkpoint, modules, max_rank).read(table)
    return LoraFiles(path, pairs, data, identity_of(config_data, data))


def identity_of(config: bytes, data: bytes) -> bytes:
    lengths = len(config).to_bytes(8, "little")
    return blake2b(lengths + config + data, digest_size=IDENTITY_BYTES).digest()


def modules_of(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of each module that an adapter may change.

    They come from the weights, by the canonical names of these without `.weight`.
    """
    family = checkpoint.family
    wanted = {
        f"{family.layers_name}.{layer}.{module}"
        for layer in range(checkpoint.sizes.num_layers)
        for module in family.lora_modules
    }
    named = ((name.removesuffix(".weight"), shape) for name, shape in checkpoint.shapes.items())
    return {name: (shape[0], shape[1]) for name, shape in named if name in wanted}


def most_bytes(modules: dict[str, tuple[int, int]], max_rank: int) -> int:
    """Return the most bytes that the tensors of an adapter may have."""
    return ITEM_BYTES * max_rank * sum(map(sum, modules.values()))


class LoraConfig:
    """What adapter_config.json says, checked."""

    def __init__(self, file: Path, given: dict[str, Any]) -> None:
        self._file = file
        self._given = given
        if given.get("peft_type") != "LORA":
            self._refuse(f"peft_type is {shown(given.get('peft_type'))}, only LORA is supported")
        if given.get("bias", "none") != "none":
            self._refuse(f"bias is {shown(given['bias'])}, only none is supported")
        for key in UNSUPPORTED:
            if given.get(key):
                self._refuse(f"{key} is {shown(given[key])}, which is not supported")
        start = str(given.get("init_lora_weights", "")).lower()
        if start.startswith(RELATIVE_TO_ANOTHER_BASE):
            self._refuse(
                f"init_lora_weights is {shown(start)}, whose pairs belong to a changed base: save "
                "the adapter converted to LoRA (path_initial_model_for_weight_conversion of PEFT)"
            )
        self._rank = self._positive_count("r", given.get("r"))
        self._alpha = self._number("lora_alpha", given.get("lora_alpha"))
        self._uses_rslora = bool(given.get("use_rslora"))
        self._ranks = self._pattern("rank_pattern")
        self._alphas = self._pattern("alpha_pattern")

    def rank_of(self, module: str) -> int:
        """Return the rank that a module's pair has."""
        found = value_for(module, self._ranks, self._rank)
        return self._positive_count("rank_pattern", found)

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's pair."""
        rank = self.rank_of(module)
        alpha = self._number("alpha_pattern", value_for(module, self._alphas, self._alpha))
        return alpha / (math.sqrt(rank) if self._uses_rslora else rank)

    def _pattern(self, key: str) -> dict[str, Any]:
        """Return values by names of modules. PEFT takes the first key that a name ends in."""
        found = self._given.get(key) or {}
        if not isinstance(found, dict):
            self._refuse(f"{key} is {shown(found)}, an object is wanted")
        for name in found:
            if not LITERAL_KEY.fullmatch(name):
                self._refuse(f"{key} has {shown(name)}: regular expressions are not supported")
        return found

    def _positive_count(self, key: str, value: object) -> int:
        if type(value) is not int or value < 1:
            self._refuse(f"{key} has {shown(value)}, a rank of 1 or more is wanted")
        assert isinstance(value, int)
        return value

    def _number(self, key: str, value: object) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e6:  # type: ignore[arg-type]
            self._refuse(f"{key} has {shown(value)}, a number below a million is wanted")
        return float(value)  # type: ignore[arg-type]

    def _refuse(self, reason: str) -> None:
        raise BadCheckpoint(f"{self._file}: {reason}")


def value_for(module: str, pattern: dict[str, Any], default: Any) -> Any:
    """Return what a pattern says about a module."""
    keys = (key for key in pattern if module == key or module.endswith("." + key))
    key = next(keys, None)
    return default if key is None else pattern[key]


class PairReader:
    """Reads the pairs of an adapter from the table of its tensors."""

    def __init__(
        self,
        file: Path,
        config: LoraConfig,
        checkpoint: Checkpoint,
        modules: dict[str, tuple[int, int]],
        max_rank: int,
    ) -> None:
        self._file = file
        self._config = config
        self._family = checkpoint.family
        self._modules = modules
        self._max_rank = max_rank

    def read(self, table: dict[str, TensorInfo]) -> tuple[LoraPair, ...]:
        """Return the pairs. Raises BadCheckpoint for anything else that the table has."""
        sides: dict[str, dict[str, TensorInfo]] = {}
        for name, info in table.items():
            module, side = self._module_of(name)
            if info.dtype not in DTYPES:
                self._refuse(name, f"is {shown(info.dtype)}, supported are {', '.join(DTYPES)}")
            sides.setdefault(module, {})[side] = info
        if not sides:
            raise BadCheckpoint(f"{self._file} holds no tensors")
        return tuple(self._pair(module, found) for module, found in sides.items())

    def _module_of(self, name: str) -> tuple[str, str]:
        """Return the module of a tensor, as the file names it, and which side of the pair it is."""
        found = TENSOR.fullmatch(name)
        if not found:
            self._refuse(name, "is no lora_A.weight or lora_B.weight of `base_model.model`")
        assert found
        canonical = self._canonical(found["module"])
        if canonical.startswith(self._family.tower_prefixes):
            self._refuse(name, "changes the vision tower; adapters change the language model only")
        if canonical not in self._modules:
            known = ", ".join(self._family.lora_modules)
            self._refuse(name, f"changes no module that adapters may change here: {known}")
        return found["module"], found["side"]

    def _canonical(self, module: str) -> str:
        return self._family.canonical_name(f"{module}.weight").removesuffix(".weight")

    def _pair(self, module: str, sides: dict[str, TensorInfo]) -> LoraPair:
        if missing := {"A", "B"} - sides.keys():
            self._refuse(module, f"has no lora_{missing.pop()}.weight")
        canonical = self._canonical(module)
        num_outputs, num_inputs = self._modules[canonical]
        rank = self._config.rank_of(module)
        if rank > self._max_rank:
            self._refuse(module, f"has rank {rank}: give --max-lora-rank {rank} or more")
        for side, wanted in (("A", (rank, num_inputs)), ("B", (num_outputs, rank))):
            if sides[side].shape != wanted:
                self._refuse(
                    module,
                    f"has a lora_{side} of {sides[side].shape}, the model and {CONFIG_FILE} make "
                    f"it {wanted}",
                )
            assert prod(wanted)
        layer, _, name = canonical.removeprefix(self._family.layers_name + ".").partition(".")
        return LoraPair(int(layer), name, sides["A"], sides["B"], self._config.scale_of(module))

    def _refuse(self, name: str, reason: str) -> None:
        raise BadCheckpoint(f"{self._file}: {shown(name)} {reason}")

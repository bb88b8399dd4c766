"""How config.json says that a checkpoint's weights are quantized. Imports no torch.

docs/quantization.md lists the formats that load. Any other is refused here, by its name, before a
weight is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from common.families.family import BadCheckpoint
from common.model_files import shown

Layout = Literal["fp8", "packed", "awq", "gptq"]
"""The tensors of a module: those of compressed-tensors in eight or four bits, of AWQ or of GPTQ."""
KEYS = ("quantization_config", "compression_config")
FLOAT_FORMATS = ("float-quantized", "naive-quantized")
CHECKPOINT_FORMATS = {"gptq": 0x11111111, "gptq_v2": 0}
"""What is added to each integer of eight zero points of a GPTQ checkpoint. Version 1 stores them
less one: so subtracted, a zero point of 0 borrows from the next one."""
MAX_GROUP = 2**20


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way in which modules of a checkpoint are quantized."""

    layout: Layout
    rows: int = 1
    """Outputs that share a scale; 0 for all."""
    columns: int = 0
    """Inputs that share a scale; 0 for all."""
    has_zeros: bool = True
    """Whether zero points are stored. If not, the middle of the values means zero."""
    zero_offset: int = 0
    """What is added to each stored integer of eight zero points. It may overflow."""
    is_ordered: bool = False
    """Whether a tensor must name the group of each input."""


def read_schemes(config: dict[str, Any], file: Path) -> tuple[Scheme, ...]:
    """Return the schemes that config.json names; none if the weights are not quantized.

    Raises
    ------
    BadCheckpoint
        if one of them is not supported, or is malformed.
    """
    text_config = config.get("text_config")
    sections = (config, text_config if isinstance(text_config, dict) else {})
    given: Any = next((s[key] for s in sections for key in KEYS if s.get(key)), None)
    if given is None:
        return ()
    if not isinstance(given, dict):
        raise BadCheckpoint(f"{file.parent}: quantization_config in {file.name} is not an object")
    if isinstance(given.get("quantization_config"), dict):
        given = given["quantization_config"] | {"quant_method": "compressed-tensors"}
    return QuantizationConfig(given, file).schemes()


class QuantizationConfig:
    """Reads the `quantization_config` of config.json, which may hold anything."""

    def __init__(self, given: dict[str, Any], file: Path) -> None:
        self._given = given
        self._file = file

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes. Raises BadCheckpoint if one is not supported."""
        method = self._given.get("quant_method")
        if method == "awq":
            return (self._awq(),)
        if method == "gptq":
            return (self._gptq(),)
        if method == "compressed-tensors":
            return self._compressed_tensors()
        self._refuse(f"quant_method {shown(method)}")

    def _awq(self) -> Scheme:
        self._check_bits(self._given)
        layouts = [self._given.get(key) for key in ("version", "format", "checkpoint_format")]
        layout = next((name for name in layouts if name is not None), "gemm")
        if str(layout).lower() != "gemm":
            self._refuse(f"AWQ in the layout {shown(layout)}")
        if self._given.get("zero_point", True) is not True:
            self._refuse("AWQ without zero points")
        return Scheme("awq", columns=self._group_size(self._given))

    def _gptq(self) -> Scheme:
        self._check_bits(self._given)
        given = self._given
        layout = given.get("checkpoint_format") or given.get("format") or "gptq"
        if not isinstance(layout, str) or layout not in CHECKPOINT_FORMATS:
            self._refuse(f"GPTQ in the layout {shown(layout)}")
        if given.get("is_marlin_format"):
            self._refuse("GPTQ in the layout 'marlin'")
        if given.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            self._refuse(f"GPTQ packed in {shown(given['pack_dtype'])}")
        for rule in self._values_of("dynamic"):
            if self._group_size(given | rule) != self._group_size(given):
                self._refuse("GPTQ with a group_size of its own in `dynamic`")
            self._check_bits(given | rule)
        return Scheme(
            "gptq",
            columns=self._group_size(given),
            zero_offset=CHECKPOINT_FORMATS[layout],
            is_ordered=bool(given.get("desc_act")),
        )

    def _compressed_tensors(self) -> tuple[Scheme, ...]:
        for key in ("kv_cache_scheme", "transform_config"):
            if self._given.get(key):
                self._refuse(f"compressed-tensors with a {key}")
        sparsity = self._given.get("sparsity_config")
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            self._refuse("compressed-tensors with a sparsity_config")
        groups = self._values_of("config_groups")
        return tuple(self._group(group) for group in groups if group.get("weights"))

    def _group(self, group: dict[str, Any]) -> Scheme:
        layout = group.get("format") or self._given.get("format")
        weights = group["weights"]
        if not isinstance(weights, dict):
            self._refuse("compressed-tensors with malformed weights")
        self._check_activations(group)
        kind = (weights.get("type"), weights.get("num_bits"))
        if layout in FLOAT_FORMATS and kind == ("float", 8):
            rows, columns = self._block(weights)
            return Scheme("fp8", rows, columns, has_zeros=False)
        if layout == "pack-quantized" and kind == ("int", 4):
            rows, columns = self._block(weights)
            if rows != 1:
                self._refuse(f"pack-quantized with the strategy {shown(weights.get('strategy'))}")
            return Scheme(
                "packed",
                columns=columns,
                has_zeros=weights.get("symmetric", True) is not True,
                is_ordered=weights.get("actorder") in ("group", "dynamic"),
            )
        self._refuse(f"{shown(layout)} with weights of {shown(kind[1])} bits ({shown(kind[0])})")

    def _check_activations(self, group: dict[str, Any]) -> None:
        """Refuse activations that are computed in integers. Those in FP8 are computed wider."""
        if group.get("output_activations"):
            self._refuse("compressed-tensors with output_activations")
        inputs = group.get("input_activations")
        if not inputs:
            return
        if not isinstance(inputs, dict) or inputs.get("type") != "float":
            self._refuse("compressed-tensors with activations in integers")

    def _block(self, weights: dict[str, Any]) -> tuple[int, int]:
        """Return the outputs and the inputs that share a scale."""
        match weights:
            case {"strategy": "tensor"}:
                return 0, 0
            case {"strategy": "channel"}:
                return 1, 0
            case {"strategy": "group"}:
                return 1, self._group_size(weights)
            case {"strategy": "block", "block_structure": [int(rows), int(columns)]} if (
                0 < rows <= MAX_GROUP and 0 < columns <= MAX_GROUP
            ):
                return rows, columns
        self._refuse(f"compressed-tensors with the strategy {shown(weights.get('strategy'))}")

    def _check_bits(self, given: dict[str, Any]) -> None:
        bits = given.get("bits")
        if bits != 4:
            self._refuse(f"{self._given['quant_method'].upper()} in {shown(bits)} bits")

    def _group_size(self, given: dict[str, Any]) -> int:
        """Return the inputs of a group; 0 for all."""
        size = given.get("group_size", 128)
        if size == -1:
            return 0
        if type(size) is not int or not 0 < size <= MAX_GROUP:
            self._refuse(f"a group_size of {shown(size)}")
        return size

    def _values_of(self, key: str) -> list[dict[str, Any]]:
        """Return the objects in an object, or none if it is missing."""
        section = self._given.get(key) or {}
        if not isinstance(section, dict) or not all(
            isinstance(value, dict) for value in section.values()
        ):
            self._refuse(f"a malformed {key}")
        return list(section.values())

    def _refuse(self, what: str) -> NoReturn:
        raise BadCheckpoint(
            f"{self._file.parent}: config.json says that the weights are quantized by {what}, "
            "which is not supported: use a checkpoint in FP8, AWQ, GPTQ or W4A16 as "
            "docs/quantization.md lists them, or one that is not quantized"
        )

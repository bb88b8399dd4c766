"""The tensors of quantized weights in a checkpoint's files. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.families.family import BadCheckpoint
from common.quantization import Layout, Scheme
from common.tensor_info import TensorInfo

NIBBLES = 8
"""The values of four bits in an int32."""
SCALE_DTYPES = ("F32", "F16", "BF16")
INDEX_DTYPES = ("I32", "I64")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """The last names of a module's tensors."""

    values: str
    scales: str
    zeros: str
    groups: str


PARTS: dict[Layout, Parts] = {
    "fp8": Parts("weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
    "packed": Parts("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
    "awq": Parts("qweight", "scales", "qzeros", "g_idx"),
    "gptq": Parts("qweight", "scales", "qzeros", "g_idx"),
}
DTYPES: dict[Layout, str] = {"fp8": "F8_E4M3", "packed": "I32", "awq": "I32", "gptq": "I32"}
"""The type of the values."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The weights of one module, and where their tensors lie."""

    name: str
    """The name of the values in their file."""
    scheme: Scheme
    values: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo | None = None
    groups: TensorInfo | None = None
    """The group of each input, if it does not follow from its place."""

    @property
    def shape(self) -> tuple[int, int]:
        """(num_outputs, num_inputs), which may be padded to whole integers if they are packed."""
        rows, columns = self.values.shape
        match self.scheme.layout:
            case "awq":
                return NIBBLES * columns, rows
            case "gptq":
                return columns, NIBBLES * rows
            case "packed":
                return rows, NIBBLES * columns
            case "fp8":
                return rows, columns

    @property
    def num_bytes(self) -> int:
        """The bytes of everything that is read of the module."""
        parts = (self.values, self.scales, self.zeros, self.groups)
        return sum(info.num_bytes for info in parts if info is not None)

    def may_have_shape(self, shape: Shape) -> bool:
        """Whether these may be weights of a shape, of which a format does not store every size."""
        num_outputs, num_inputs = self.shape
        spare = NIBBLES - 1 if self.scheme.layout == "packed" else 0
        return (
            len(shape) == 2
            and shape[0] == num_outputs
            and num_inputs - spare <= shape[1] <= num_inputs
        )

    @property
    def num_groups(self) -> int:
        """The groups of inputs of each output."""
        if self.scheme.columns == 0:
            return 1
        return -(-self.shape[1] // self.scheme.columns)


def find_quantized(
    schemes: Sequence[Scheme], tensors: Mapping[str, TensorInfo]
) -> dict[str, QuantizedWeight]:
    """Return the quantized weights by the names in the files that they would have as one tensor.

    The tensors say which modules are quantized, not the lists of names in config.json: those
    follow the module names of the tool that wrote them.

    Raises
    ------
    BadCheckpoint
        if a tensor is missing, or has another type or shape than its module's scheme needs.
    """
    found: dict[str, QuantizedWeight] = {}
    for name, info in tensors.items():
        module, _, last = name.rpartition(".")
        fitting = [s for s in schemes if PARTS[s.layout].values == last and fits(s, info)]
        if fitting:
            found[f"{module}.weight"] = read_module(module, fitting, tensors)
        elif last in ("qweight", "weight_packed"):
            raise BadCheckpoint(
                f"{info.file}: {name} ({info.dtype} {list(info.shape)}) is quantized in another "
                "way than quantization_config in config.json says: download the whole repository"
            )
    return found


def fits(scheme: Scheme, values: TensorInfo) -> bool:
    """Whether these may be the values of a module with this scheme."""
    return values.dtype == DTYPES[scheme.layout] and len(values.shape) == 2


def read_module(
    module: str, schemes: Sequence[Scheme], tensors: Mapping[str, TensorInfo]
) -> QuantizedWeight:
    """Return a module's weights in the first scheme whose tensors they are.

    Raises
    ------
    BadCheckpoint
        if they are those of no scheme; the message is about the first one.
    """
    errors: list[BadCheckpoint] = []
    for scheme in schemes:
        try:
            return ModuleReader(module, scheme, tensors).read()
        except BadCheckpoint as e:
            errors.append(e)
    raise errors[0]


class ModuleReader:
    """Finds and checks the tensors of one module."""

    def __init__(self, module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> None:
        self._module = module
        self._scheme = scheme
        self._tensors = tensors
        self._parts = PARTS[scheme.layout]
        self._values = tensors[f"{module}.{self._parts.values}"]

    def read(self) -> QuantizedWeight:
        """Return the weights. Raises BadCheckpoint if a tensor is missing or does not fit."""
        scheme = self._scheme
        weight = QuantizedWeight(
            f"{self._module}.{self._parts.values}", scheme, self._values, self._values
        )
        num_outputs, num_inputs = weight.shape
        num_groups = weight.num_groups
        packed_outputs = -(-num_outputs // NIBBLES)
        scales = scale_shapes(scheme, num_outputs, num_groups)
        zeros: Shape = (packed_outputs, num_groups)
        if scheme.layout in ("awq", "gptq"):
            zeros = (num_groups, packed_outputs)
        return QuantizedWeight(
            weight.name,
            scheme,
            self._values,
            self._part(self._parts.scales, scales, SCALE_DTYPES),
            self._part(self._parts.zeros, [zeros], ("I32",)) if scheme.has_zeros else None,
            self._groups(num_inputs),
        )

    def _groups(self, num_inputs: int) -> TensorInfo | None:
        layout = self._scheme.layout
        is_named = f"{self._module}.{self._parts.groups}" in self._tensors
        if layout in ("fp8", "awq") or not (self._scheme.is_ordered or is_named):
            return None
        return self._part(self._parts.groups, [(num_inputs,)], INDEX_DTYPES)

    def _part(self, last: str, shapes: Sequence[Shape], dtypes: Sequence[str]) -> TensorInfo:
        name = f"{self._module}.{last}"
        info = self._tensors.get(name)
        values = f"{self._module}.{self._parts.values}"
        if info is None:
            raise BadCheckpoint(
                f"{self._values.file}: {values} is quantized, and {name} is missing: download the "
                "whole repository"
            )
        if info.dtype not in dtypes:
            raise BadCheckpoint(
                f"{info.file}: {name} is {info.dtype}, supported are {', '.join(dtypes)}"
            )
        if info.shape not in shapes:
            raise BadCheckpoint(
                f"{info.file}: {name} has shape {info.shape}, and {values} of shape "
                f"{self._values.shape} makes it {shapes[0]}"
            )
        return info


def scale_shapes(scheme: Scheme, num_outputs: int, num_groups: int) -> list[Shape]:
    """Return the shapes that the scales may have."""
    if scheme.layout in ("awq", "gptq"):
        return [(num_groups, num_outputs)]
    if scheme.rows == 0:
        return [(1,), (), (1, 1)]
    num_rows = -(-num_outputs // scheme.rows)
    whole = (num_rows, num_groups)
    return [whole, (num_rows,)] if scheme.columns == 0 else [whole]
